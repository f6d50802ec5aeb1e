"""Several weights in one launch: where each one is, in a table that the kernels read."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNED = 16
"""Elements by whose multiples the weights of a launch lie apart: what keeps loads whole vectors."""


@triton.jit
def layer_of(table, layers, index, weight, row_pair, column_pair):
    """(weight, row pair, column pair, number, first block of its deltas) of a layer.

    Pointers, and its counter of rounding.
    """
    entry = table + index
    weight += tl.load(entry) * 16
    row_pair += tl.load(entry + layers)
    column_pair += tl.load(entry + 2 * layers)
    number = tl.load(entry + 3 * layers).to(tl.int32)
    return weight, row_pair, column_pair, number, tl.load(entry + 4 * layers)


def together(weight: Tensor, other: Tensor) -> bool:
    """Whether two weights of one kind can be in one launch."""
    return (other.data_ptr() - weight.data_ptr()) % (ALIGNED * weight.element_size()) == 0


def table_of(
    weights: Sequence[Tensor],
    row_pairs: Sequence[Tensor],
    column_pairs: Sequence[Tensor],
    numbers: Sequence[int],
    first_blocks: Sequence[int],
) -> Tensor:
    """The table of a launch: int64 [5, layers], of addresses relative to the first layer's."""

    def apart(tensors: Sequence[Tensor], unit: int) -> list[int]:
        addresses = [tensor.data_ptr() for tensor in tensors]
        return [(address - addresses[0]) // unit for address in addresses]

    columns = (
        apart(weights, ALIGNED * weights[0].element_size()),
        apart(row_pairs, 8),
        apart(column_pairs, 8),
        numbers,
        first_blocks,
    )
    return _on_device(tuple(tuple(column) for column in columns), weights[0].device)


@functools.lru_cache(maxsize=256)
def _on_device(values: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """A copy that waits for the device, of tables that are the same step by step."""
    return torch.tensor(values, dtype=torch.int64, device=device)
