"""Triton kernel of `fold_weight` with rotations on both sides: one pass over the weight.

A program keeps one block of ``G_in − I`` in shared memory and goes through panels of the rows of
its columns::

    U      = S + (G_out − I) S     the rows: G_out − I and S stream by
    result = U + U (G_in − I)ᵀ     the columns: U rounded as an operand alone

U never leaves the program, nor its registers: what the first product leaves in a thread is what the
second wants of its left operand. So the weight is read from memory once, written once and rounded
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
    column_programs,  # the blocks of columns, with those behind the last one that is rotated
    panels,  # of the rows
    panels_a_split,
    B_LEFT: tl.constexpr,
    B_RIGHT: tl.constexpr,
    ROW_CHUNK: tl.constexpr,
    SCATTER: tl.constexpr,
    RUN: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two >= B_RIGHT
    PANEL: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """out[row_index][:, scatter] = (I + left_delta) weight (I + right_delta)^T by blocks.

    Behind the last block of a side its delta is zero.
    """
    panels_a_block: tl.constexpr = (B_LEFT + PANEL - 1) // PANEL
    program = tl.program_id(0)
    block = program % column_programs
    first = (program // column_programs) * panels_a_split
    last = tl.minimum(first + panels_a_split, panels)
    ns = tl.arange(0, PADDED)
    columns = block * B_RIGHT + ns
    there = (ns < B_RIGHT) & (columns < width)
    target = columns
    if SCATTER > 0:
        chunk = tl.load(scatter + columns // SCATTER, mask=there, other=0)
        target = chunk_columns(chunk, columns, SCATTER, RUN)
    block_delta = right_delta + block.to(tl.int64) * (B_RIGHT * B_RIGHT)
    stored = (ns < B_RIGHT)[:, None] & (ns < B_RIGHT)[None, :] & (block < blocks_right)
    at = ns[:, None] * B_RIGHT + ns[None, :]
    right = tl.trans(tl.load(block_delta + at, mask=stored, other=0.0))
    for panel in range(first, last):
        row_block = panel // panels_a_block
        ms = panel % panels_a_block * PANEL + tl.arange(0, PANEL)
        row = row_block * B_LEFT + ms
        row_there = (ms < B_LEFT) & (row < rows)
        inside = row_there[:, None] & there[None, :]
        block_rows = weight + row_block.to(tl.int64) * B_LEFT * width
        own = tl.load(block_rows + (ms * width)[:, None] + columns[None, :], inside, other=0.0)
        total = own.to(tl.float32)
        left_rows = left_delta + row_block.to(tl.int64) * (B_LEFT * B_LEFT)
        left_rows += (ms * B_LEFT)[:, None]
        for start in range(0, tl.where(row_block < blocks_left, B_LEFT, 0), TILE_K):
            js = start + tl.arange(0, TILE_K)
            turned = (ms < B_LEFT)[:, None] & (js < B_LEFT)[None, :]
            left = tl.load(left_rows + js[None, :], mask=turned, other=0.0)
            source = block_rows + (js * width)[:, None] + columns[None, :]
            read = (js < B_LEFT)[:, None] & there[None, :]
            stream = tl.load(source, mask=read, other=0.0)
            total = tl.dot(left, stream, total)
        result = tl.dot(total.to(weight.dtype.element_ty), right, total)
        to_row = row
        if ROW_CHUNK > 0:
            to_row = tl.load(row_index + row // ROW_CHUNK, mask=row_there, other=0) * ROW_CHUNK
            to_row += row % ROW_CHUNK
        out_rows = out + (to_row.to(tl.int64) * width)[:, None]
        tl.store(out_rows + target[None, :], result.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class FoldTiling:
    """Sizes of `fold_both_kernel`.

    Args:
        panel: rows of a tile of the result.
        tile_k: rows of the weight in a step of the first product.
        stages: of the steps in flight.
    """

    panel: int = 128
    tile_k: int = 32
    stages: int = 4

    def shared_bytes(self, block_size: int) -> int:
        """Shared memory of a program whose columns are a block of `block_size`."""
        columns = _padded(block_size)
        streaming = self.stages * (self.panel + columns) * self.tile_k
        return 2 * (columns * columns + max(streaming, self.panel * columns))


def fits(weight: Tensor, delta_in: Tensor, delta_out: Tensor) -> bool:
    """Whether `fold_both` takes these: aligned blocks of middle size, and enough shared memory."""
    sizes = delta_in.shape[1], delta_out.shape[1]
    aligned = weight.shape[1] % 16 == 0 and all(b % 8 == 0 for b in sizes)
    middle = all(64 < b <= 256 for b in sizes)
    return aligned and middle and FoldTiling().shared_bytes(sizes[0]) <= shared_memory()


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
    padded = _padded(b_right)
    column_programs = -(-width // b_right)
    # Panels of whole blocks: of the last one, which may be cut short, as many as of the others.
    panels = -(-rows // b_left) * -(-b_left // tiling.panel)
    splits = column_splits(column_programs, panels, MULTIPROCESSORS * (256 // padded))
    out = torch.empty_like(weight)
    launch(
        fold_both_kernel,
        splits * column_programs,
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
        column_programs,
        panels,
        -(-panels // splits),
        B_LEFT=b_left,
        B_RIGHT=b_right,
        ROW_CHUNK=chunk_length(perm_out, rows),
        SCATTER=chunk_length(perm_in, width),
        RUN=run_length(width, b_right, perm_in),
        PADDED=padded,
        PANEL=tiling.panel,
        TILE_K=tiling.tile_k,
        num_warps=8,
        num_stages=tiling.stages,
    )
    return out if afterwards is None else permute_columns(out, afterwards, True)


def _padded(block_size: int) -> int:
    return power_of_two(block_size, 128, 256)


def column_splits(column_programs: int, panels: int, resident: int) -> int:
    """Into how many programs the panels of a block of columns are divided.

    The fewest that take the least time where `resident` programs run at once: a wave takes its
    panels and about a third as long as one to fetch the columns' delta.
    """

    def time(splits: int) -> float:
        return -(-splits * column_programs // resident) * (-(-panels // splits) + 0.35)

    return min(range(1, panels + 1), key=time)
