"""The layers that are compared: plain `nn.Linear`, and the same weight prepared for POET-X."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from benchmarks import gate
from benchmarks.options import Session
from poetx_compile.layers.prepared import equivalence_of


def drop_compiled() -> None:
    """Drop the compiled code of earlier layers, and what only they hold.

    All layers run the code of `nn.Linear.forward`: the guards of one would be checked for the next.
    """
    torch._dynamo.reset()
    gc.collect()


def linear(
    session: Session, in_features: int, out_features: int, *, trained: bool = True
) -> nn.Linear:
    """`nn.Linear` without bias, its weight trained or frozen."""
    module = nn.Linear(
        in_features, out_features, bias=False, device=session.device, dtype=session.dtype
    )
    with torch.no_grad():
        module.weight.normal_(std=in_features**-0.5, generator=session.generator)
    module.weight.requires_grad_(trained)
    return module


def poetx_linear(
    session: Session, in_features: int, out_features: int, config: poetx.POETXConfig
) -> nn.Linear:
    """A prepared `nn.Linear` whose rotations are not the identity."""
    module = linear(session, in_features, out_features)
    poetx.prepare(module, config)
    turn_(module, session.generator)
    return module


def turn_(module: nn.Module, generator: torch.Generator) -> None:
    """Set the rotations of a prepared linear at random, below the angle guard."""
    equivalence = equivalence_of(module)
    assert equivalence is not None, "prepare has left the linear as it was"
    for side in equivalence.sides:
        gate.random_skew_(side.skew, side.block, generator)


def compiled(module: nn.Module, stage: str) -> Callable[[Tensor], Tensor]:
    """`torch.compile` of a module, with this package's backend where it is prepared.

    Args:
        stage: ``"inductor"``, or an earlier one to run the benchmark without code generation.
    """
    if equivalence_of(module) is None:
        return torch.compile(module, backend=stage, dynamic=False)
    options: dict[str, Any] = {"stage": stage}
    return torch.compile(module, backend=poetx.poetx_backend, dynamic=False, options=options)
