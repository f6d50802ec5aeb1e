"""Packed storage of skew-symmetric b×b blocks: the strict upper triangle, row by row.

Entry (i, j), i < j, of a block is element ``i(2b − i − 1)/2 + (j − i − 1)`` of its b(b−1)/2 values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(block: int) -> int:
    """b(b−1)/2: the number of stored values of one block."""
    return block * (block - 1) // 2


def unpack(packed: Tensor, block: int) -> Tensor:
    """[blocks, b(b−1)/2] → skew-symmetric [blocks, b, b]; a gather, no scatter into zeros."""
    if block == 1:
        return packed.new_zeros(packed.shape[0], 1, 1)
    i = torch.arange(block, device=packed.device)
    row, column = i[:, None], i[None, :]
    low, high = torch.minimum(row, column), torch.maximum(row, column)
    index = low * (2 * block - low - 1) // 2 + (high - low - 1)
    # Row b−1 has no entry above the diagonal and its formula runs past the end.
    index = index.clamp(0, packed_size(block) - 1)
    values = packed[:, index]
    zero = torch.zeros((), dtype=packed.dtype, device=packed.device)
    return torch.where(row < column, values, torch.where(row > column, -values, zero))


def pack(skew: Tensor) -> Tensor:
    """The entries above the diagonal: [blocks, b, b] → [blocks, b(b−1)/2]."""
    block = skew.shape[-1]
    row, column = torch.triu_indices(block, block, offset=1, device=skew.device)
    return skew[:, row, column]
