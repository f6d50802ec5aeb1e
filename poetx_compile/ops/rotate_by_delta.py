"""``poetx::rotate_by_delta``: `rotate_blocks` by rotations that are rounded already.

What Inductor's graphs hold in place of `rotate_blocks` where the rotations of many products come as
one stack and are rounded together (`compile.lowerings.deltas`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.kernels.common import LOW_PRECISION, permutable, static
from poetx_compile.ops.permute import check_pair, pair_index
from poetx_compile.ops.registry import define


def check_product(x: Tensor, matrices: Tensor, name: str, gather, scatter) -> None:
    """Check x [..., d], `matrices` [blocks, b, b] that are called `name`, and the permutations."""
    torch._check(
        x.dim() >= 1 and x.is_floating_point(),
        lambda: f"poetx: x must be floating point [..., d], got {x.dtype} {list(x.shape)}",
    )
    torch._check(
        matrices.dim() == 3 and matrices.shape[1] == matrices.shape[2],
        lambda: f"poetx: {name} must be [blocks, b, b], got {list(matrices.shape)}",
    )
    torch._check(
        matrices.shape[0] * matrices.shape[1] <= x.shape[-1],
        lambda: (
            f"poetx: {matrices.shape[0]} blocks of {matrices.shape[1]} do not fit into "
            f"{x.shape[-1]} columns"
        ),
    )
    check_pair(gather, x.shape[-1], "gather")
    check_pair(scatter, x.shape[-1], "scatter")


def _check(x: Tensor, delta: Tensor, gather, scatter, _) -> None:
    check_product(x, delta, "delta", gather, scatter)
    torch._check(
        delta.dtype == x.dtype,
        lambda: f"poetx: delta must be of x's dtype {x.dtype}, got {delta.dtype}",
    )


def rotate_by_delta_reference(
    x: Tensor,
    delta: Tensor,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    transpose: bool = False,
) -> Tensor:
    """``y[..., σ] = x[..., γ] + x[..., γ] · blockdiag(Δ₁, …)``. Takes no gradient.

    Args:
        x: [..., d], floating point.
        delta: ``Δ = G − I`` [blocks, b, b] with blocks·b ≤ d, of x's dtype.
        gather, scatter, transpose: as for `rotate_blocks`.

    Returns:
        [..., d], contiguous, of x's dtype.
    """
    if transpose:
        delta = delta.mT
    blocks, b, _ = delta.shape
    width = x.shape[-1]
    if gather is not None:
        x = x.index_select(-1, pair_index(gather, 0, width))
    if blocks > 0:
        head = x[..., : blocks * b].reshape(-1, blocks, b)
        rotated = head + torch.bmm(head.transpose(0, 1), delta).transpose(0, 1)
        rotated = rotated.reshape(*x.shape[:-1], blocks * b)
        x = rotated if blocks * b == width else torch.cat([rotated, x[..., blocks * b :]], dim=-1)
    if scatter is not None:
        x = x.index_select(-1, pair_index(scatter, 1, width))
    return x


def _kernel_takes(x: Tensor, delta: Tensor, gather, scatter, transpose: bool) -> bool:
    return x.dtype in LOW_PRECISION and static(delta.shape[1]) and permutable(x, gather, scatter)


rotate_by_delta = define(
    "rotate_by_delta",
    rotate_by_delta_reference,
    check=_check,
    fake=lambda x, *_: x.new_empty(x.shape),
    kernel=Kernel("rotate.rotate_by_delta", _kernel_takes),
    drawn="activation",
)
