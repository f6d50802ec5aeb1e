"""``poetx::identity_equivalence``: the weight of a layer whose rotations are the identity.

With a merge at every step the effective weight *is* the stored one, in its natural order, whenever
the model runs; what remains of `orthogonal_equivalence` is its gradient. Composite like that op:
one node in Dynamo's graph, where the passes match it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from poetx_compile.ops.cayley import check_skew
from poetx_compile.ops.gains import scaled
from poetx_compile.ops.orthogonal_equivalence import orthogonal_equivalence, transformed
from poetx_compile.ops.permute import check_pair, pair_index
from poetx_compile.ops.precision import without_autocast
from poetx_compile.ops.registry import OPS, Op

_library = torch.library.Library("poetx", "FRAGMENT")
_library.define(
    "identity_equivalence(Tensor weight, Tensor skew_in, Tensor skew_out, Tensor perm_in, "
    "Tensor perm_out, int block_in, int block_out, Tensor? gain_in=None, Tensor? gain_out=None) "
    "-> Tensor"
)


def identity_equivalence(
    weight: Tensor,
    skew_in: Tensor,
    skew_out: Tensor,
    perm_in: Tensor,
    perm_out: Tensor,
    block_in: int,
    block_out: int,
    gain_in: Tensor | None = None,
    gain_out: Tensor | None = None,
) -> Tensor:
    """The weight as it is, whose gradient goes to the skew parameters at zero (POET).

    `orthogonal_equivalence` of ``weight[perm_out][:, perm_in]`` at ``Q = 0``: the same value, and
    the same gradients with respect to both Q. One level of differentiation: a gradient of Q has no
    gradient with respect to Q, and torch raises where one is asked for.

    Args:
        weight: W [n, m] in its natural order. A constant: it gets no gradient.
        skew_in: [blocks_in, b(b−1)/2] packed skew parameters of the input side, fp32 or fp64, zero.
            Their values are not read, so they may be zeros of stride 0.
        skew_out: the same of the output side.
        perm_in, perm_out: permutation pairs int64 [2, m/c] and [2, n/c]: which columns and rows
            form the blocks.
        block_in, block_out: block size of each side.
        gain_in, gain_out: [m] and [n], of the skew parameters' dtype, or ``None``: the result is
            ``diag(gain_out) W diag(gain_in)``.

    Returns:
        [n, m] of the weight's dtype; without gains `weight` itself in memory: nothing is copied or
        computed.
    """
    gains = () if gain_in is None and gain_out is None else (gain_in, gain_out)
    return torch.ops.poetx.identity_equivalence(
        weight, skew_in, skew_out, perm_in, perm_out, block_in, block_out, *gains
    )


def check_sides(weight, skew_in, skew_out, perm_in, perm_out, block_in, block_out) -> None:
    """Raise unless these are arguments of `identity_equivalence`."""
    torch._check(
        weight.dim() == 2 and weight.is_floating_point(),
        lambda: (
            "poetx: weight must be a floating point matrix, "
            f"got {weight.dtype} {list(weight.shape)}"
        ),
    )
    for side, skew, pair, block, width in (
        ("in", skew_in, perm_in, block_in, weight.shape[1]),
        ("out", skew_out, perm_out, block_out, weight.shape[0]),
    ):
        check_pair(pair, width, f"perm_{side}")
        check_skew(skew, block)
        torch._check(
            skew.shape[0] * block <= width,
            lambda skew=skew, block=block, width=width: (
                f"poetx: {skew.shape[0]} blocks of {block} do not fit into {width} columns"
            ),
        )


@without_autocast
def _compose(
    weight,
    skew_in,
    skew_out,
    perm_in,
    perm_out,
    block_in,
    block_out,
    gain_in=None,
    gain_out=None,
):
    """The op over others, for autograd and AOTAutograd."""
    check_sides(weight, skew_in, skew_out, perm_in, perm_out, block_in, block_out)
    constant = weight.detach() if weight.requires_grad else weight
    if transformed():  # of these, autograd functions and custom ops know nothing
        rows = pair_index(perm_out, 0, weight.shape[0])
        columns = pair_index(perm_in, 0, weight.shape[1])
        permuted = constant.index_select(0, rows).index_select(1, columns)
        return orthogonal_equivalence(
            *(permuted, skew_in, skew_out, perm_in, perm_out, block_in, block_out, 1),
            *(gain_in, gain_out),
        )
    same = _Identity.apply(constant, skew_in, skew_out, perm_in, perm_out, block_in, block_out)
    return scaled(same, gain_in, gain_out).to(weight.dtype)


class _Identity(torch.autograd.Function):
    """A function and not an op of its own: an op may not return its argument, and would copy it."""

    @staticmethod
    def forward(weight, skew_in, skew_out, perm_in, perm_out, block_in, block_out):
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, skew_in, skew_out, perm_in, perm_out, *ctx.block_sizes = inputs
        ctx.blocks = skew_in.shape[0], skew_out.shape[0]
        ctx.save_for_backward(weight, perm_in, perm_out)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor):
        weight, perm_in, perm_out = ctx.saved_tensors
        (blocks_in, blocks_out), (b_in, b_out) = ctx.blocks, ctx.block_sizes
        _, needs_in, needs_out, *_ = ctx.needs_input_grad
        products = torch.ops.poetx.skew_block_products
        of_in = products(grad, weight, blocks_in, b_in, perm_in) if needs_in else None
        of_out = products(weight.mT, grad.mT, blocks_out, b_out, perm_out) if needs_out else None
        return None, of_in, of_out, None, None, None, None


_library.impl("identity_equivalence", _compose, "CompositeImplicitAutograd")
OPS["identity_equivalence"] = Op(_compose, drawn="weight")
