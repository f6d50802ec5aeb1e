"""``poetx::merged_linear``: a linear over a plain weight, with the gradients of its rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.folded_linear import FEW_BLOCKS, check_product, rows_of
from poetx_compile.ops.identity_equivalence import check_sides
from poetx_compile.ops.registry import define


def merged_linear_reference(
    x: Tensor,
    weight: Tensor,
    skew_in: Tensor,
    skew_out: Tensor,
    perm_in: Tensor,
    perm_out: Tensor,
    block_in: int,
    block_out: int,
) -> Tensor:
    """``V = X Wᵀ`` where the rotations of W are the identity; the skew parameters get gradients.

    With ``X' = X[:, perm_in]`` and ``V' = V[:, perm_out]``, for blocks k of their columns::

        dX = dV W,   dQ_in,k = 2 (X'_kᵀ dX'_k − dX'_kᵀ X'_k),   dQ_out,k = 2 (V'_kᵀ dV'_k − …)

    No activation is rotated or permuted, nothing but X and V is saved, and there is no gradient of
    W: POET-X (arXiv 2603.05500) with a merge at every step.

    Args:
        x: [..., m] of the weight's dtype; autocast casts it, as the input of a linear.
        weight: W [n, m] in its natural order, taken as a constant.
        skew_in, skew_out, perm_in, perm_out, block_in, block_out: as for `identity_equivalence`;
            the values of the skew parameters are not read.

    Returns:
        [..., n] of x's dtype, without a bias.
    """
    return torch.mm(rows_of(x), weight.t()).reshape(*x.shape[:-1], weight.shape[0])


def _check(x, weight, *sides) -> None:
    check_product(x, weight)
    check_sides(weight, *sides)


merged_linear = define(
    "merged_linear",
    merged_linear_reference,
    check=_check,
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    casts_first=True,
    drawn="product",
)


def _setup(ctx, inputs, output) -> None:
    x, weight, skew_in, skew_out, perm_in, perm_out, block_in, block_out = inputs
    _, _, needs_in, needs_out, *_ = ctx.needs_input_grad
    ctx.blocks_in = (skew_in.shape[0], block_in) if needs_in else None
    ctx.blocks_out = (skew_out.shape[0], block_out) if needs_out else None
    ctx.save_for_backward(
        x if needs_in else None,
        weight,
        output if needs_out else None,
        perm_in if needs_in else None,
        perm_out if needs_out else None,
    )


def _fill_little(of_in: tuple[int, int], of_out: tuple[int, int]) -> bool:
    """Whether the products of both sides, (blocks, b) each, are one launch: `FEW_BLOCKS` of 256.

    A larger block has the tiles of several. With more of them each side fills a GPU alone, and two
    launches are faster by a tenth.
    """
    (blocks_in, b), (blocks_out, other) = of_in, of_out
    return b == other and (blocks_in + blocks_out) * (-(-b // 256)) ** 2 <= FEW_BLOCKS


def _backward(ctx, grad):
    x, weight, v, perm_in, perm_out = ctx.saved_tensors
    of_in, of_out = ctx.blocks_in, ctx.blocks_out  # (blocks, b), or None
    grad_in = grad_out = None
    # One matrix for all that read it: a compiler would copy a transposed gradient for each reader.
    rows = rows_of(grad)
    needs_x = ctx.needs_input_grad[0]
    grad_rows = torch.mm(rows, weight) if needs_x or of_in is not None else None
    products = torch.ops.poetx.skew_block_products
    if of_in and of_out and _fill_little(of_in, of_out):
        first, second = (rows_of(x), grad_rows), (rows_of(v), rows)
        both = products(*first, *of_in, perm_in, *second, of_out[0], perm_out)
        grad_in, grad_out = both[: of_in[0]], both[of_in[0] :]
    else:
        if of_in is not None:
            grad_in = products(rows_of(x), grad_rows, *of_in, perm_in)
        if of_out is not None:
            grad_out = products(rows_of(v), rows, *of_out, perm_out)
    grad_x = None
    if needs_x and grad_rows is not None:
        grad_x = grad_rows.reshape(*grad.shape[:-1], weight.shape[1])
    return grad_x, None, grad_in, grad_out, *[None] * 4


merged_linear.register_autograd(_backward, setup_context=_setup)
