"""``poetx::rotation_delta``: ``G − I`` of packed skew blocks, rounded to what a product takes.

What a rotation adds to a weight. It is small where the rotation is, so that it keeps its relative
precision in bf16, where a diagonal entry 1 − θ²/2 of G would lose it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.cayley import (
    cayley_exact,
    cayley_neumann_reference,
    check_skew,
    rotations,
)
from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.kernels.common import LOW_PRECISION
from poetx_compile.ops.kernels.low_precision import low_precision_applies
from poetx_compile.ops.registry import define


def check_blocks(skew: Tensor, block_size: int, order: int | None, _, flipped: int) -> None:
    """Check the arguments of an op of packed skew blocks, the last `flipped` of them transposed."""
    check_skew(skew, block_size, 1 if order is None else order)
    torch._check(
        0 <= flipped <= skew.shape[0],
        lambda: f"poetx: flipped must be a number of the {skew.shape[0]} blocks, got {flipped}",
    )


def transpose_last(skew: Tensor, flipped: int) -> Tensor:
    """`skew` with its last `flipped` blocks transposed, which negates them: ``Qᵀ = −Q``.

    A copy, or `skew` itself where there are none.
    """
    if flipped == 0:
        return skew
    others = skew.shape[0] - flipped
    return -skew if others == 0 else torch.cat([skew[:others], -skew[others:]])


def minus_identity(rotation: Tensor) -> Tensor:
    """``G − I`` of [..., b, b]."""
    return rotation - torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)


def rotation_delta_reference(
    skew: Tensor, block_size: int, order: int | None, dtype: torch.dtype, flipped: int = 0
) -> Tensor:
    """``G − I`` of packed skew blocks, for `fold_weight`. Takes no gradient.

    Args:
        skew: [blocks, b(b−1)/2], float32 or float64: the entries of Q above the diagonal.
        block_size: b ≥ 1.
        order: k ≥ 1 of the Cayley-Neumann expansion, or ``None`` for the exact transform.
        dtype: of the result. For bf16 and fp16 the products inside may take bf16 operands, sums
            stay fp32 (docs/numerics.md).
        flipped: how many blocks, the last ones, are transposed: ``G(−Q) = G(Q)ᵀ``.

    Returns:
        [blocks, b, b] of `dtype`.
    """
    skew = transpose_last(skew, flipped)
    if order is None:
        return minus_identity(cayley_exact(skew, block_size)).to(dtype)
    return minus_identity(cayley_neumann_reference(skew, block_size, order)).to(dtype)


def _without_kernel(
    skew: Tensor, block_size: int, order: int | None, dtype: torch.dtype, flipped: int
) -> Tensor:
    """The reference over the op: the expansion has kernels for more arguments than the delta."""
    return minus_identity(rotations(transpose_last(skew, flipped), block_size, order)).to(dtype)


def _fake(skew, block_size, order, dtype, flipped):
    return skew.new_empty(skew.shape[0], block_size, block_size, dtype=dtype)


def _kernel_takes(skew: Tensor, block_size: int, order: int | None, dtype, flipped: int) -> bool:
    rounded = skew.dtype == torch.float32 and dtype in LOW_PRECISION
    return rounded and low_precision_applies(block_size, order)


rotation_delta = define(
    "rotation_delta",
    rotation_delta_reference,
    check=check_blocks,
    fake=_fake,
    kernel=Kernel("cayley_low_precision.rotation_delta", _kernel_takes),
    without_kernel=_without_kernel,
    # The exact transform calls a solver: nothing to fuse there.
    expands=lambda skew, block_size, order, *_: order is not None,
    ieee=True,
    drawn="rotation",
)
