"""`fold_weight` by Triton kernels: the rows of a weight rotated, and written where they belong.

Both sides at once are the subject of `fold_both`. One after the other, the columns are what
`rotate_blocks` does to the rows of any matrix; here are the rows: one block of ``G − I`` stays in
shared memory while the columns of its rows stream by, so that the weight is read
once and written once. A row is a contiguous run, so its permutation is free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import (
    MULTIPROCESSORS,
    ceil_div,
    chunk_length,
    launch,
    power_of_two,
    row_or,
    shared_memory,
)
from poetx_compile.ops.kernels.fold_both import fits, fold_both
from poetx_compile.ops.kernels.rotate import resident_bytes, resident_stages, rotate_by_delta
from poetx_compile.ops.permute import pair_index

_TILE_N = 64
"""Columns of a step."""


@triton.jit
def fold_rows_kernel(
    weight,  # [rows, width], 2-byte elements
    delta,  # [blocks, B, B]: G - I, like weight
    index,  # int64 [rows / CHUNK]: where the chunks of rows belong; CHUNK = 0: not read
    out,  # like weight
    rows,
    width,
    blocks,
    row_programs,  # the blocks, with those behind the last one that is rotated
    columns_a_split,  # a multiple of TILE_N
    B: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two >= B
    CHUNK: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """out[index[r]] = (weight + (G - I) weight)[r] on one block of rows, a split of the columns.

    The rows behind the last block are copied.
    """
    program = tl.program_id(0)
    block = program % row_programs
    first = (program // row_programs) * columns_a_split
    last = tl.minimum(first + columns_a_split, width)
    ks = tl.arange(0, PADDED)
    source = block * B + ks
    row_inside = (ks < B) & (source < rows)
    target = source
    if CHUNK > 0:
        target = tl.load(index + source // CHUNK, mask=row_inside, other=0) * CHUNK
        target += source % CHUNK
    target = target.to(tl.int64) * width
    row_inside = row_inside[:, None]
    start_of = source.to(tl.int64) * width
    if block < blocks:
        delta += block.to(tl.int64) * (B * B)
        stored = (ks < B)[:, None] & (ks < B)[None, :]
        left = tl.load(delta + ks[:, None] * B + ks[None, :], mask=stored, other=0.0)
        for start in range(first, last, TILE_N):
            columns = start + tl.arange(0, TILE_N)
            inside = row_inside & (columns < last)[None, :]
            tile = tl.load(weight + start_of[:, None] + columns[None, :], mask=inside, other=0.0)
            result = tile.to(tl.float32) + tl.dot(left, tile)
            at = target[:, None] + columns[None, :]
            tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    else:
        for start in range(first, last, TILE_N):
            columns = start + tl.arange(0, TILE_N)
            inside = row_inside & (columns < last)[None, :]
            tile = tl.load(weight + start_of[:, None] + columns[None, :], mask=inside, other=0.0)
            tl.store(out + target[:, None] + columns[None, :], tile, mask=inside)


def fold_weight(
    weight: Tensor,
    delta_in: Tensor | None,
    delta_out: Tensor | None,
    perm_in: Tensor | None,
    perm_out: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`ops.fold_weight` to bf16 or fp16, with at least one rotation."""
    folded = weight.to(dtype).contiguous()
    if delta_in is not None and delta_out is not None and fits(weight, delta_in, delta_out):
        return fold_both(folded, delta_in, delta_out, perm_in, perm_out)
    if delta_out is not None:
        folded = _fold_rows(folded, delta_out.contiguous(), perm_out)
    if delta_in is not None:
        folded = rotate_by_delta(folded, delta_in, None, perm_in, transpose=True)
    return folded


def _fold_rows(weight: Tensor, delta: Tensor, pair: Tensor | None) -> Tensor:
    """``L S`` with its rows where `pair`, if there is one, puts them."""
    blocks, b, _ = delta.shape
    rows, width = weight.shape
    if not (64 < b <= 256 and b % 8 == 0 and width % 16 == 0) or (
        resident_bytes(b) > shared_memory()
    ):
        # What does not fit into shared memory, or is not aligned: a library product does as well.
        head, rest = weight.split([blocks * b, rows - blocks * b])
        head = head.view(blocks, b, width)
        turned = torch.cat([torch.baddbmm(head, delta, head).view(blocks * b, width), rest])
        return turned if pair is None else turned.index_select(0, pair_index(pair, 1, rows))
    padded = power_of_two(b, 128, 256)
    row_programs = -(-rows // b)
    out = torch.empty_like(weight)
    splits = max(1, MULTIPROCESSORS * (256 // padded) // row_programs)
    launch(
        fold_rows_kernel,
        splits * row_programs,
        weight,
        delta,
        row_or(pair, 0, weight),
        out,
        rows,
        width,
        blocks,
        row_programs,
        ceil_div(width, splits * _TILE_N) * _TILE_N,
        B=b,
        PADDED=padded,
        CHUNK=chunk_length(pair, rows),
        TILE_N=_TILE_N,
        num_warps=8 if padded == 256 else 4,
        num_stages=resident_stages(),
    )
    return out
