"""Several tensors in one launch: where each one is, in a table that the kernels read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNED = 16
"""Elements by whose multiples the weights of a launch lie apart: what keeps loads whole vectors."""


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
    places = [place // ALIGNED for place in apart(weights)]
    pairs = apart(row_pairs) + apart(column_pairs)
    return on_device((*places, *pairs, *numbers, *first_in, *first_out), weights[0].device)


def apart(tensors: Sequence[Tensor], of: Tensor | None = None) -> tuple[int, ...]:
    """How many elements lie between the begin of `of`, the first tensor, and those of all."""
    of = tensors[0] if of is None else of
    first, size = of.data_ptr(), of.element_size()
    return tuple([(tensor.data_ptr() - first) // size for tensor in tensors])


@functools.lru_cache(maxsize=1024)
def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 on the device; of what is the same step by step, the same tensor. Nobody waits."""
    pinned: dict[str, Any] = {"pin_memory": True} if device.type == "cuda" else {}
    host = torch.tensor(values, dtype=torch.int64, **pinned)
    return host.to(device, non_blocking=True)
