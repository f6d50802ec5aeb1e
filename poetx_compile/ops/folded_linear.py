"""``poetx::folded_linear``: a linear over a folded weight, with the gradients of its rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.permute import check_pair
from poetx_compile.ops.registry import define


def check_product(x: Tensor, weight: Tensor) -> None:
    """Raise unless x [..., m] may be multiplied by a weight [n, m] of its dtype."""
    torch._check(
        weight.dim() == 2 and x.dim() >= 1 and x.shape[-1] == weight.shape[1],
        lambda: (
            f"poetx: x must be [..., m] for a weight [n, m], got {list(x.shape)} and "
            f"{list(weight.shape)}"
        ),
    )
    torch._check(
        x.dtype == weight.dtype and x.is_floating_point(),
        lambda: f"poetx: x and weight must have one dtype, got {x.dtype} and {weight.dtype}",
    )


def _check(x, weight, tangent_in, tangent_out, perm_in, perm_out) -> None:
    check_product(x, weight)
    _check_side("in", tangent_in, perm_in, weight.shape[1])
    _check_side("out", tangent_out, perm_out, weight.shape[0])


def _check_side(side, tangent, pair, width) -> None:
    torch._check(
        tangent is not None or pair is None, lambda: f"poetx: perm_{side} without tangent_{side}"
    )
    if tangent is None:
        return
    torch._check(
        tangent.dim() == 3
        and tangent.shape[1] == tangent.shape[2]
        and tangent.shape[0] * tangent.shape[1] <= width,
        lambda: (
            f"poetx: tangent_{side} must be [blocks, b, b] with blocks·b ≤ {width}, "
            f"got {list(tangent.shape)}"
        ),
    )
    check_pair(pair, width, f"perm_{side}")


def folded_linear_reference(
    x: Tensor,
    weight: Tensor,
    tangent_in: Tensor | None,
    tangent_out: Tensor | None,
    perm_in: Tensor | None,
    perm_out: Tensor | None,
) -> Tensor:
    """``V = X Wᵀ`` with W from `fold_weight`; the tangents carry the gradients of the rotations.

    Their value is zero, and the permutations are in the weight. With ``X' = X[:, perm_in]`` and
    ``V' = V[:, perm_out]``, for blocks k of their columns::

        dX = dV W,   dE_in,k = X'_kᵀ dX'_k,   dE_out,k = dV'_kᵀ V'_k

    (`rotation_tangent` says what E is and takes it from there: E_in of Q_in, E_out transposed, of
    −Q_out.) No activation is rotated, nothing but X and V is saved, and there is no gradient of W:
    POET-X (arXiv 2603.05500) in its folded form.

    Args:
        x: [..., m] of the weight's dtype; autocast casts it, as the input of a linear.
        weight: W [n, m], taken as a constant.
        tangent_in: zeros [blocks, b, b] from `rotation_tangent`, or ``None`` where this side is
            not folded.
        tangent_out: the same of the output side, transposed: its rotation stands on the left.
        perm_in, perm_out: permutation pairs of folded sides; ``None`` where x or V is in permuted
            coordinates itself.

    Returns:
        [..., n] of x's dtype, without a bias.
    """
    return torch.mm(rows_of(x), weight.t()).reshape(*x.shape[:-1], weight.shape[0])


folded_linear = define(
    "folded_linear",
    folded_linear_reference,
    check=_check,
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    casts_first=True,
    drawn="product",
)


def _setup(ctx, inputs, output) -> None:
    x, weight, tangent_in, tangent_out, perm_in, perm_out = inputs
    _, _, needs_in, needs_out, *_ = ctx.needs_input_grad
    ctx.blocks_in = tangent_in.shape[:2] if needs_in else None
    ctx.blocks_out = tangent_out.shape[:2] if needs_out else None
    ctx.save_for_backward(
        x if needs_in else None,
        weight,
        output if needs_out else None,
        perm_in if needs_in else None,
        perm_out if needs_out else None,
    )


FEW_BLOCKS = 64
"""Up to as many blocks the products of both sides are one launch: alone, neither fills a GPU."""


def _backward(ctx, grad):
    x, weight, v, perm_in, perm_out = ctx.saved_tensors
    of_in, of_out = ctx.blocks_in, ctx.blocks_out  # (blocks, b), or None
    grad_in = grad_out = None
    # One matrix for all that read it: a compiler would copy a transposed gradient for each reader.
    rows = rows_of(grad)
    needs_x = ctx.needs_input_grad[0]
    grad_rows = torch.mm(rows, weight) if needs_x or of_in is not None else None
    product = torch.ops.poetx.block_product
    if of_in and of_out and of_in[1] == of_out[1] and of_in[0] + of_out[0] <= FEW_BLOCKS:
        (blocks_in, b), (blocks_out, _) = of_in, of_out
        stacked = torch.ops.poetx.stacked_block_products(
            rows_of(x), grad_rows, rows, rows_of(v), blocks_in, blocks_out, b, perm_in, perm_out
        )
        grad_in, grad_out = stacked[:blocks_in], stacked[blocks_in:]
    else:
        if of_in is not None:
            grad_in = product(rows_of(x), grad_rows, *of_in, perm_in, perm_in)
        if of_out is not None:
            grad_out = product(rows, rows_of(v), *of_out, perm_out, perm_out)
    grad_x = None
    if needs_x and grad_rows is not None:
        grad_x = grad_rows.reshape(*grad.shape[:-1], weight.shape[1])
    return grad_x, None, grad_in, grad_out, None, None


def rows_of(x: Tensor) -> Tensor:
    """[..., d] as one matrix."""
    return x.reshape(-1, x.shape[-1])


folded_linear.register_autograd(_backward, setup_context=_setup)
