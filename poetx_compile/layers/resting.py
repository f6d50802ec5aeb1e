"""Skew parameters of zero: in the merged form those of all layers share one memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from poetx_compile.layers.registry import registry


def zero_skews(
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    rest: bool,
    kept: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Zeros of both shapes [blocks, packed].

    Args:
        rest: in the memory that is shared (`Registry.zeros`).
        kept: what was given before.

    Returns:
        The zeros, and the shared memory that they are in: to be kept, or ``None``.
    """
    if not rest:
        return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes], None
    size = max(blocks * packed for blocks, packed in shapes)
    # CUDA graphs know the address: what was given once is kept.
    if kept is None or (kept.dtype, kept.device) != (dtype, device) or kept.numel() < size:
        kept = registry.zeros(size, dtype, device)
    return [kept[: blocks * packed].view(blocks, packed) for blocks, packed in shapes], kept
