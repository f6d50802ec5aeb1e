"""The rotations of prepared models: their parameters, and values away from the identity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.distributed import shards
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.sides import Side
from poetx_compile.ops.packing import unpack
from poetx_compile.optim.merge import merge


def sides(model: nn.Module) -> Iterator[Side]:
    """Both sides of every layer."""
    for e in model.modules():
        if isinstance(e, OrthogonalEquivalence):
            yield from e.sides


def skews(model: nn.Module) -> list[nn.Parameter]:
    return [side.skew for side in sides(model)]


@torch.no_grad()
def turn(model: nn.Module, angle: float = 0.2, seed: int = 1) -> nn.Module:
    """Random rotations, each block's skew matrix of spectral norm `angle`; the model.

    The same ones in every process, however they are sharded.
    """
    generator = torch.Generator().manual_seed(seed)
    for side in sides(model):
        if side.skew.numel():
            values = torch.randn(side.skew.shape, generator=generator, dtype=torch.float64)
            norm = torch.linalg.matrix_norm(unpack(values, side.block), ord=2)
            shards.write(side.skew, angle * values / norm[:, None])
    return model


def trained(model: nn.Module, merges: int = 2, **config: Any) -> nn.Module:
    """Prepared, merged a few times and turned."""
    poetx.prepare(model, poetx.POETXConfig(**{"block_size": 4} | config))
    for _ in range(merges):
        turn(model)
        merge(model, redraw=True)
    return turn(model)
