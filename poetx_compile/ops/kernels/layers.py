"""Several tensors in one launch: where each one is, in a table that the kernels read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.turn_weight import Turn

ALIGNED = 16
"""Elements by whose multiples the weights of a launch lie apart: what keeps loads whole vectors."""


class Side(NamedTuple):
    """The deltas of one side of a layer: `blocks` of `stack`, from `first` on."""

    stack: Tensor  # [all blocks, b, b]
    first: int
    blocks: int

    @property
    def deltas(self) -> Tensor:
        return self.stack[self.first : self.first + self.blocks]

    @property
    def block(self) -> int:
        return self.stack.shape[1]


class Layer(NamedTuple):
    """A weight and what it is turned by; ``None`` is a side that stays."""

    turn: Turn
    side_in: Side | None
    side_out: Side | None


@triton.jit
def layer_of(table, layers, index, weight, row_pair, column_pair):
    """(weight, row pair, column pair, number) of a layer: pointers, and its counter of rounding."""
    entry = table + index
    weight += tl.load(entry) * 16
    row_pair += tl.load(entry + layers)
    column_pair += tl.load(entry + 2 * layers)
    number = tl.load(entry + 3 * layers).to(tl.int32)
    return weight, row_pair, column_pair, number


@triton.jit
def first_block_of(table, layers, index, OUT: tl.constexpr):
    """The first of a layer's deltas of its inputs, or of its outputs."""
    return tl.load(table + index + (4 + OUT) * layers)


def together(weight: Tensor, other: Tensor) -> bool:
    """Whether two weights of one kind can be in one launch."""
    return (other.data_ptr() - weight.data_ptr()) % (ALIGNED * weight.element_size()) == 0


def table_of(
    weights: Sequence[Tensor],
    row_pairs: Sequence[Tensor],
    column_pairs: Sequence[Tensor],
    numbers: Sequence[int],
    first_in: Sequence[int],
    first_out: Sequence[int],
) -> Tensor:
    """The table of a launch: int64 [6 · layers], of places behind the first layer's."""
    places = tuple(place // ALIGNED for place in apart(weights))
    pairs = apart(row_pairs) + apart(column_pairs)
    return on_device((*places, *pairs, *numbers, *first_in, *first_out), weights[0].device)


def table_of_layers(layers: Sequence[Layer]) -> Tensor:
    """The table of a launch that turns these."""
    turns, sides_in, sides_out = zip(*layers, strict=True)
    return table_of(
        [turn.weight for turn in turns],
        [turn.perm_out for turn in turns],
        [turn.perm_in for turn in turns],
        [turn.layer for turn in turns],
        [0 if side is None else side.first for side in sides_in],
        [0 if side is None else side.first for side in sides_out],
    )


def apart(tensors: Sequence[Tensor], of: Tensor | None = None) -> tuple[int, ...]:
    """How many elements lie between the begin of `of`, the first tensor, and those of all."""
    of = tensors[0] if of is None else of
    first, size = of.data_ptr(), of.element_size()
    return tuple((tensor.data_ptr() - first) // size for tensor in tensors)


@functools.lru_cache(maxsize=1024)
def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 on the device; of what is the same step by step, the same tensor. Nobody waits."""
    pinned: dict[str, Any] = {"pin_memory": True} if device.type == "cuda" else {}
    host = torch.tensor(values, dtype=torch.int64, **pinned)
    return host.to(device, non_blocking=True)
