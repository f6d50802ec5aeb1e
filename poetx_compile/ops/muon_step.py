"""A step of `POETXMuon` on a GPU: what its kernels take, and when they are there.

They are defined by the plain torch operations of the optimiser, which run everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from poetx_compile._torch import _disable_dynamo
from poetx_compile.ops.kernels import Kernel, current


class Part(NamedTuple):
    """A run of blocks of a parameter, at least one: contiguous tensors of one device."""

    gradient: Tensor
    """[blocks, b(b−1)/2], fp32, bf16 or fp16."""
    momentum: Tensor
    """[blocks, b(b−1)/2], fp32, bf16 or int8, written."""
    scale: Tensor | None
    """fp32 [blocks, groups] of int8 (`optim.momentum`), written."""

    def of(self, rows: slice) -> Part:
        """Some of its blocks."""
        gradient, momentum, scale = self
        return Part(gradient[rows], momentum[rows], None if scale is None else scale[rows])


def _kernel() -> Kernel:
    return Kernel("muon.muon_steps", lambda *_: True)


def fused(parts: Sequence[Part], block_size: int) -> bool:
    """Whether the kernels of `muon_steps` run for these parts of fp32 rotations."""
    first, stored, _ = parts[0]
    if block_size < 2 or not _kernel().applies(first, stored):
        return False
    dtype, stored_dtype, device = first.dtype, stored.dtype, first.device
    return all(
        gradient.dtype == dtype
        and momentum.dtype == stored_dtype
        and gradient.device == device
        and gradient.is_contiguous()
        and momentum.is_contiguous()
        for gradient, momentum, _ in parts
    )


@_disable_dynamo  # a compiled step of the optimiser calls it as it is
def muon_steps(
    parts: Sequence[Part],
    turning: int,
    block_size: int,
    mu: float,
    rate: float,
    seed: int,
    step: int,
) -> Tensor:
    """Momenta ``m ← m + (1 − μ)(g − m)``, and steps ``−rate · msign(g + μ(m − g))``.

    Args:
        parts: for which `fused` holds.
        turning: how many of them turn, from the first on; of the others there is the momentum
            alone.
        block_size: b.
        mu: μ, of the momentum.
        rate: of the rotations.
        seed, step: what the rounding of a narrow momentum follows from.

    Returns:
        fp32 [blocks of those that turn, b(b−1)/2], one part after another.
    """
    with current(parts[0].gradient.device):
        return _kernel().load()(parts, turning, block_size, mu, rate, seed, step)
