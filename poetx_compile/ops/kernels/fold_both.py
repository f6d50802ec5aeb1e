"""Triton kernel of `fold_weight` with rotations on both sides: one pass over the weight.

A program keeps one block of ``G_out − I`` in shared memory and goes through tiles of
the columns of its rows::

    T      = S + S (G_in − I)ᵀ      the columns: S and G_in − I stream by
    result = T + (G_out − I) T      the rows: T rounded as an operand alone

T never leaves the program, so that the weight is read from memory once, written once and rounded
once. Rows are written where they belong, columns too where they come in runs (`common.is_fused`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import (
    MULTIPROCESSORS,
    chunk_length,
    is_fused,
    launch,
    power_of_two,
    row_or,
    run_length,
    shared_memory,
)
from poetx_compile.ops.kernels.permute import chunk_columns, permute_columns


@triton.jit
def fold_both_kernel(
    weight,  # [rows, width], 2-byte elements
    left_delta,  # [blocks_left, B_LEFT, B_LEFT]: G_out - I, like weight
    right_delta,  # [blocks_right, B_RIGHT, B_RIGHT]: G_in - I, like weight
    row_index,  # int64 [rows / ROW_CHUNK]: where the chunks of rows belong; ROW_CHUNK = 0: not read
    scatter,  # int64 [width / SCATTER], the same of the columns
    out,  # like weight
    rows,
    width,
    blocks_left,
    blocks_right,
    row_programs,  # the blocks of rows, with those behind the last one that is rotated
    tiles,  # of the columns
    tiles_a_split,
    B_LEFT: tl.constexpr,
    B_RIGHT: tl.constexpr,
    ROW_CHUNK: tl.constexpr,
    SCATTER: tl.constexpr,
    RUN: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two >= B_LEFT
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """out[row_index][:, scatter] = (I + left_delta) weight (I + right_delta)^T by blocks.

    Behind the last block of a side its delta is zero.
    """
    tiles_a_block: tl.constexpr = (B_RIGHT + TILE_N - 1) // TILE_N
    program = tl.program_id(0)
    row_block = program % row_programs
    first = (program // row_programs) * tiles_a_split
    last = tl.minimum(first + tiles_a_split, tiles)

    ks = tl.arange(0, PADDED)
    row = row_block * B_LEFT + ks
    row_there = (ks < B_LEFT) & (row < rows)
    target = row
    if ROW_CHUNK > 0:
        target = tl.load(row_index + row // ROW_CHUNK, mask=row_there, other=0) * ROW_CHUNK
        target += row % ROW_CHUNK
    out_rows = out + (target.to(tl.int64) * width)[:, None]
    row_there = row_there[:, None]
    weight += row_block.to(tl.int64) * B_LEFT * width
    in_rows = (ks * width)[:, None]

    left_delta += row_block.to(tl.int64) * (B_LEFT * B_LEFT)
    stored = (ks < B_LEFT)[:, None] & (ks < B_LEFT)[None, :] & (row_block < blocks_left)
    left = tl.load(left_delta + ks[:, None] * B_LEFT + ks[None, :], mask=stored, other=0.0)

    for tile in range(first, last):
        block = tile // tiles_a_block
        ns = tile % tiles_a_block * TILE_N + tl.arange(0, TILE_N)
        columns = block * B_RIGHT + ns
        there = (ns < B_RIGHT) & (columns < width)
        inside = row_there & there[None, :]
        total = tl.load(weight + in_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        block_delta = right_delta + block.to(tl.int64) * (B_RIGHT * B_RIGHT)
        turned = (ns < B_RIGHT)[:, None] & (block < blocks_right)
        for start in range(0, B_RIGHT, TILE_K):
            js = start + tl.arange(0, TILE_K)
            source = block * B_RIGHT + js
            read = row_there & ((js < B_RIGHT) & (source < width))[None, :]
            panel = tl.load(weight + in_rows + source[None, :], mask=read, other=0.0)
            at = ns[:, None] * B_RIGHT + js[None, :]
            right = tl.load(block_delta + at, mask=turned & (js < B_RIGHT)[None, :], other=0.0)
            total = tl.dot(panel, tl.trans(right), total)
        result = tl.dot(left, total.to(left.dtype), total)
        if SCATTER > 0:
            chunk = tl.load(scatter + columns // SCATTER, mask=there, other=0)
            columns = chunk_columns(chunk, columns, SCATTER, RUN)
        tl.store(out_rows + columns[None, :], result.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class FoldTiling:
    """Sizes of `fold_both_kernel`.

    Args:
        tile_n: columns of a tile of the result.
        tile_k: columns of a step of the first product.
        stages: of the steps in flight.
    """

    tile_n: int = 128
    tile_k: int = 32
    stages: int = 4

    def shared_bytes(self, block_size: int) -> int:
        """Shared memory of a program whose rows are a block of `block_size`."""
        rows = _padded(block_size)
        streaming = self.stages * (rows + self.tile_n) * self.tile_k
        return 2 * (rows * rows + max(streaming, rows * self.tile_n))  # T follows the stream


def fits(weight: Tensor, delta_in: Tensor, delta_out: Tensor) -> bool:
    """Whether `fold_both` takes these: aligned blocks of middle size, and enough shared memory."""
    sizes = delta_in.shape[1], delta_out.shape[1]
    aligned = weight.shape[1] % 16 == 0 and all(b % 8 == 0 for b in sizes)
    middle = all(64 < b <= 256 for b in sizes)
    return aligned and middle and FoldTiling().shared_bytes(sizes[1]) <= shared_memory()


def fold_both(
    weight: Tensor,
    delta_in: Tensor,
    delta_out: Tensor,
    perm_in: Tensor | None,
    perm_out: Tensor | None,
    *,
    tiling: FoldTiling | None = None,
) -> Tensor:
    """``W[perm_out][:, perm_in] = L S D_inᵀ`` where `fits`.

    One launch, and one more that permutes single columns.

    Args:
        weight: S [n, m], contiguous bf16 or fp16, also the dtype of the result.
        delta_in, delta_out, perm_in, perm_out: those of the op.
        tiling: sizes to try.
    """
    rows, width = weight.shape
    blocks_left, b_left, _ = delta_out.shape
    blocks_right, b_right, _ = delta_in.shape
    tiling = tiling or FoldTiling()
    afterwards = None
    if perm_in is not None and not is_fused(perm_in, width, b_right):
        perm_in, afterwards = None, perm_in
    padded = _padded(b_left)
    row_programs = -(-rows // b_left)
    # Tiles of whole blocks: of the last one, which may be cut short, as many as of the others.
    tiles = -(-width // b_right) * -(-b_right // tiling.tile_n)
    splits = _splits(row_programs, tiles, MULTIPROCESSORS * (256 // padded))
    out = torch.empty_like(weight)
    launch(
        fold_both_kernel,
        splits * row_programs,
        weight,
        delta_out.contiguous(),
        delta_in.contiguous(),
        row_or(perm_out, 0, weight),
        row_or(perm_in, 0, weight),
        out,
        rows,
        width,
        blocks_left,
        blocks_right,
        row_programs,
        tiles,
        -(-tiles // splits),
        B_LEFT=b_left,
        B_RIGHT=b_right,
        ROW_CHUNK=chunk_length(perm_out, rows),
        SCATTER=chunk_length(perm_in, width),
        RUN=run_length(width, b_right, perm_in),
        PADDED=padded,
        TILE_N=tiling.tile_n,
        TILE_K=tiling.tile_k,
        num_warps=8,
        num_stages=tiling.stages,
    )
    return out if afterwards is None else permute_columns(out, afterwards, True)


def _padded(block_size: int) -> int:
    return power_of_two(block_size, 128, 256)


def _splits(row_programs: int, tiles: int, resident: int) -> int:
    """Into how many programs the tiles of a block of rows are divided.

    The fewest that take the least time where `resident` programs run at once: a wave takes its
    tiles and about half as long as one to fetch the rows' delta.
    """

    def time(splits: int) -> float:
        return -(-splits * row_programs // resident) * (-(-tiles // splits) + 0.5)

    return min(range(1, tiles + 1), key=time)
