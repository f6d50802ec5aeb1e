"""``POETXMuon(fused_rotations=True)`` on a GPU: what its kernels take, and when they are there.

Their definition are the plain torch operations of the optimiser, which run everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from poetx_compile._torch import _disable_dynamo
from poetx_compile.ops.kernels import Kernel


class Part(NamedTuple):
    """A run of blocks of a parameter, and what a step does with them: contiguous tensors."""

    skew: Tensor
    """fp32 [blocks, b(b−1)/2], written: Q."""
    gradient: Tensor
    """[blocks, b(b−1)/2], fp32, bf16 or fp16."""
    momentum: Tensor
    """[blocks, b(b−1)/2], fp32, bf16 or int8, written."""
    scale: Tensor | None
    """fp32 [blocks, groups] of int8 (`optim.momentum`), written."""

    def of(self, rows: slice) -> Part:
        """Some of its blocks."""
        skew, gradient, momentum, scale = self
        cut = None if scale is None else scale[rows]
        return Part(skew[rows], gradient[rows], momentum[rows], cut)


def _takes(*tensors: Tensor) -> bool:
    return all(t.is_contiguous() for t in tensors)


def _kernel() -> Kernel:
    return Kernel("muon.muon_step", _takes)


def fused(parts: Sequence[Part], block_size: int) -> bool:
    """Whether the kernels of `muon_step` run for these parts: at least one, none of them empty."""
    dtypes = {(p.skew.dtype, p.gradient.dtype, p.momentum.dtype) for p in parts}
    if len(dtypes) > 1 or parts[0].skew.dtype != torch.float32 or block_size < 2:
        return False
    return _kernel().applies(*(tensor for part in parts for tensor in part if tensor is not None))


@_disable_dynamo  # a compiled step of the optimiser calls it as it is
def muon_step(
    parts: Sequence[Part],
    block_size: int,
    mu: float,
    rate: float,
    keep: float,
    seed: int,
    step: int,
    wanted: bool = True,
) -> None:
    """A step of some blocks: ``m ← m + (1 − μ)(g − m)``, ``Q ← keep Q − rate msign(g + μ(m − g))``.

    Args:
        parts: for which `fused` holds.
        block_size: b.
        mu: μ, of the momentum.
        rate, keep: of the rotations.
        seed, step: what the rounding of a narrow momentum follows from.
        wanted: whether rotations are written at all.
    """
    with torch.cuda.device(parts[0].skew.device):
        _kernel().load()(parts, block_size, mu, rate, keep, seed, step, wanted)
