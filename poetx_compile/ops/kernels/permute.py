"""Triton kernels of `permute_columns`, and the index of a gather inside other kernels.

A gather of single 2-byte columns from global memory runs at a sixth of the copy bandwidth: every
lane of a load touches a cache line of its own. So the row lies in shared memory while single
columns are permuted: rows are read and written in order and only shared memory is indexed at
random. Two rows of 2-byte elements travel as one row of 4-byte words, which halves the random
accesses.

Chunks of columns need none of that: each thread copies vectors of its own, and the neighbours of a
chunk in a cache line are read by the same program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import (
    FUSED_RUN,
    ceil_div,
    chunk_length,
    known,
    launch,
    power_of_two,
    run_length,
)


@triton.jit
def chunk_columns(chunk, columns, CHUNK: tl.constexpr, RUN: tl.constexpr):
    """Where `columns` lie whose chunks of CHUNK columns have the numbers `chunk`.

    Aligned groups of RUN columns stay together (`run_length`): knowing that, the compiler loads and
    stores whole vectors. With RUN = 1 it is told nothing.
    """
    source = chunk.to(tl.int32) * CHUNK + columns % CHUNK
    if RUN > 1:
        source = tl.max_contiguous(tl.multiple_of(source, RUN), RUN)
    return source


@triton.jit
def source_columns(row, columns, inside, CHUNK: tl.constexpr, RUN: tl.constexpr):
    """Where `columns` lie under one row of a permutation pair; CHUNK = 0: where they are.

    For addresses of loads alone. Inductor takes what goes into a call whose result is an address of
    stores for written: there the row has to be loaded by the kernel itself.
    """
    source = columns
    if CHUNK > 0:
        chunk = tl.load(row + columns // CHUNK, mask=inside, other=0)
        source = chunk_columns(chunk, columns, CHUNK, RUN)
    return source


@triton.jit
def permute_columns_kernel(
    x,  # [tokens, WIDTH], 2- or 4-byte elements
    index,  # int64 [WIDTH // CHUNK]
    out,  # like x
    tokens,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two >= WIDTH
    STEPS: tl.constexpr,  # of one row, or of two 2-byte rows
    PAIRED: tl.constexpr,
):
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    source = source_columns(index, columns, inside, CHUNK, 1)
    rows_a_step: tl.constexpr = 2 if PAIRED else 1
    first = tl.program_id(0).to(tl.int64) * (STEPS * rows_a_step)
    for step in range(STEPS):
        row = first + step * rows_a_step
        here = inside & (row < tokens)
        at = row * WIDTH + columns
        if PAIRED:
            second = inside & (row + 1 < tokens)
            low = tl.load(x + at, mask=here).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            high = tl.load(x + at + WIDTH, mask=second).to(tl.int16, bitcast=True).to(tl.int32)
            word = tl.gather(low | (high << 16), source, 0)
            low = word.to(tl.int16).to(out.dtype.element_ty, bitcast=True)
            high = (word >> 16).to(tl.int16).to(out.dtype.element_ty, bitcast=True)
            tl.store(out + at, low, mask=here)
            tl.store(out + at + WIDTH, high, mask=second)
        else:
            word = tl.gather(tl.load(x + at, mask=here), source, 0)
            tl.store(out + at, word, mask=here)


@triton.jit
def permute_chunks_kernel(
    x,  # [tokens, WIDTH]
    index,  # int64 [WIDTH // CHUNK]
    out,  # like x
    tokens,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,  # a power of two that divides CHUNK
    TILE_T: tl.constexpr,
    TILE_RUNS: tl.constexpr,
):
    """Runs of RUN columns, moved whole; the tiles of some rows side by side."""
    tiles: tl.constexpr = (WIDTH // RUN + TILE_RUNS - 1) // TILE_RUNS
    program = tl.program_id(0)
    rows = (program // tiles).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    columns = ((program % tiles) * TILE_RUNS + tl.arange(0, TILE_RUNS)) * RUN
    source = source_columns(index, columns, columns < WIDTH, CHUNK, 1)
    source = tl.multiple_of(source, RUN)
    inside = (rows < tokens)[:, None, None] & (columns < WIDTH)[None, :, None]
    at = (rows * WIDTH)[:, None, None] + tl.arange(0, RUN)[None, None, :]
    runs = tl.load(x + at + source[None, :, None], mask=inside)
    tl.store(out + at + columns[None, :, None], runs, mask=inside)


def permute_columns(x: Tensor, pair: Tensor, inverse: bool) -> Tensor:
    """`ops.permute_columns` of 2- or 4-byte elements.

    Rows that are `permutable`: of at most `MAX_PERMUTE_WIDTH`, unless the pair is one of chunks.
    """
    x = x.contiguous()
    index = pair.select(0, 1 if inverse else 0)
    chunk = chunk_length(pair, x.shape[-1])
    run = run_length(x.shape[-1], 0, pair)
    if run >= FUSED_RUN:
        return _permute_chunks(x, index, chunk, run)
    return _permute_rows(x, index, chunk)


def _permute_chunks(x: Tensor, index: Tensor, chunk: int, run: int) -> Tensor:
    """``x[..., index]`` by runs of columns."""
    width = x.shape[-1]
    tokens = x.numel() // width
    # 64 (2-byte) or 32 elements a thread: eight vectors of 16 bytes on their way.
    tile_runs = power_of_two(width // run, 1, 1024 // run)
    tile_t = 16384 // x.element_size() // (tile_runs * run)
    out = torch.empty_like(x)
    launch(
        permute_chunks_kernel,
        ceil_div(tokens, tile_t) * -(-width // (tile_runs * run)),
        x,
        index,
        out,
        tokens,
        WIDTH=width,
        CHUNK=chunk,
        RUN=run,
        TILE_T=tile_t,
        TILE_RUNS=tile_runs,
        num_warps=4,
        num_stages=1,
    )
    return out


def _permute_rows(x: Tensor, index: Tensor, chunk: int) -> Tensor:
    """``x[..., index]`` through shared memory."""
    paired = x.element_size() == 2
    out = torch.empty_like(x)
    width = x.shape[-1]
    tokens = x.numel() // width
    padded = power_of_two(width, 32, 1 << 30)
    # The index (8 bytes a column) is read once a program; with many rows it is worth a loop.
    steps = max(1, min(8, known(tokens, 8192) // 2048))
    launch(
        permute_columns_kernel,
        ceil_div(tokens, steps * (2 if paired else 1)),
        x,
        index,
        out,
        tokens,
        WIDTH=width,
        CHUNK=chunk,
        PADDED=padded,
        STEPS=steps,
        PAIRED=paired,
        num_warps=power_of_two(padded // 1024, 1, 16),  # 32 elements a thread
        num_stages=1,
    )
    return out
