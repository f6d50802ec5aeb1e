"""``poetx::rotation_delta``: ``G − I`` of packed skew blocks, rounded to what a product takes.

What a rotation adds to a weight. It is small where the rotation is, so that it keeps its relative
precision in bf16, where a diagonal entry 1 − θ²/2 of G would lose it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops import kernels
from poetx_compile.ops.cayley import (
    cayley_exact,
    cayley_neumann_reference,
    check_skew,
    rotations,
)
from poetx_compile.ops.precision import ieee_fp32, without_autocast


def _check(skew: Tensor, block_size: int, order: int | None, flipped: int) -> None:
    check_skew(skew, block_size, 1 if order is None else order)
    check_flipped(skew, flipped)


def check_flipped(skew: Tensor, flipped: int) -> None:
    """Check that there are as many blocks of `skew` as are taken negated."""
    torch._check(
        0 <= flipped <= skew.shape[0],
        lambda: f"poetx: flipped must be a number of the {skew.shape[0]} blocks, got {flipped}",
    )


def flip(skew: Tensor, flipped: int) -> Tensor:
    """`skew` with its last `flipped` blocks negated: a copy, or itself where there are none."""
    if flipped == 0:
        return skew
    kept = skew.shape[0] - flipped
    return -skew if kept == 0 else torch.cat([skew[:kept], -skew[kept:]])


def rotation_delta_reference(
    skew: Tensor, block_size: int, order: int | None, dtype: torch.dtype, flipped: int = 0
) -> Tensor:
    """The definition of `rotation_delta` over those of the other ops."""
    turned = flip(skew, flipped)
    if order is None:
        return minus_identity(cayley_exact(turned, block_size)).to(dtype)
    return minus_identity(cayley_neumann_reference(turned, block_size, order)).to(dtype)


def minus_identity(rotation: Tensor) -> Tensor:
    """``G − I`` of [..., b, b]."""
    return rotation - torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)


@torch.library.custom_op("poetx::rotation_delta", mutates_args=())
@without_autocast
@ieee_fp32()
def rotation_delta(
    skew: Tensor, block_size: int, order: int | None, dtype: torch.dtype, flipped: int = 0
) -> Tensor:
    """``G − I`` of packed skew blocks, for `fold_weight`. Takes no gradient.

    Args:
        skew: [blocks, b(b−1)/2], float32 or float64: the entries of Q above the diagonal.
        block_size: b ≥ 1.
        order: k ≥ 1 of the Cayley-Neumann expansion, or ``None`` for the exact transform.
        dtype: of the result. For bf16 and fp16 the products inside may take bf16 operands, sums
            stay fp32 (docs/numerics.md).
        flipped: how many blocks, the last ones, are taken of −Q: ``G(−Q) = G(Q)ᵀ``.

    Returns:
        [blocks, b, b] of `dtype`.
    """
    _check(skew, block_size, order, flipped)
    if kernels.applies("rotation_delta", skew, block_size, order, dtype, flipped):
        return kernels.run("rotation_delta", skew, block_size, order, dtype, flipped)
    # The expansion has kernels for more arguments than the delta.
    return minus_identity(rotations(flip(skew, flipped), block_size, order)).to(dtype)


@rotation_delta.register_fake
def _(
    skew: Tensor, block_size: int, order: int | None, dtype: torch.dtype, flipped: int = 0
) -> Tensor:
    _check(skew, block_size, order, flipped)
    return skew.new_empty(skew.shape[0], block_size, block_size, dtype=dtype)
