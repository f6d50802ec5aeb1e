"""Triton kernels that turn one weight from both sides in place.

With S the weight in permuted coordinates, L and R the deltas ``Rᵀ_out − I`` and ``R_in − I``::

    U = S + L S           the rows
    W = U + U Rᵀ          the columns; rounded once, written where it belongs

A weight stays in its natural order: rows are gathered and scattered for nothing, columns too where
they come in runs (`common.is_fused`). A delta is rounded once, which a small rotation can afford
(`rotation_delta`), U is rounded as an operand alone, and bf16 results stochastically.

Where a weight is turned by both sides, and by blocks that `turn_panels` does not take, it takes two
launches, through a scratch of the weight's size: U, in bf16 as two numbers. All
rows are read before the second launch writes any.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import (
    chunk_length,
    input_precision,
    is_fused,
    launch,
    power_of_two,
    row_or,
    run_length,
)
from poetx_compile.ops.kernels.permute import chunk_columns, permute_columns, source_columns
from poetx_compile.ops.kernels.rounding import matrix_bits, signed, stochastic_bf16
from poetx_compile.ops.kernels.turn_panels import natural_rows


@triton.jit
def turn_rows_kernel(
    weight,  # [rows, width]
    delta,  # [blocks, B, B], like weight: of the rows, transposed
    row_index,  # int64 [rows / ROW_CHUNK]
    gather,  # int64 [width / CHUNK]; CHUNK = 0: not read
    high_out,  # [rows, width], like weight
    low_out,  # [rows, width]: what rounding took off high_out; HAS_LOW = False: not written
    rows,
    width,
    blocks,
    B: tl.constexpr,
    ROW_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = S + delta S by blocks of the rows, where S is the weight in permuted coordinates."""
    tiles_m: tl.constexpr = (B + TILE_M - 1) // TILE_M
    column_tiles = tl.cdiv(width, TILE_N)
    # The tiles of a block of rows side by side: they read the same rows of the weight.
    program = tl.program_id(0)
    block = program // (tiles_m * column_tiles)
    ms = (program % tiles_m) * TILE_M + tl.arange(0, TILE_M)
    columns = (program // tiles_m % column_tiles) * TILE_N + tl.arange(0, TILE_N)
    row = block * B + ms
    row_there = (ms < B) & (row < rows)
    there = columns < width
    source = source_columns(gather, columns, there, CHUNK, RUN)
    own_rows = natural_rows(row_index, row, row_there, ROW_CHUNK) * width
    inside = row_there[:, None] & there[None, :]
    own = tl.load(weight + own_rows[:, None] + source[None, :], mask=inside, other=0.0)
    total = own.to(tl.float32)
    delta += block.to(tl.int64) * (B * B)
    for start in range(0, tl.where(block < blocks, B, 0), TILE_K):
        ks = start + tl.arange(0, TILE_K)
        stored = (ms < B)[:, None] & (ks < B)[None, :]
        left = tl.load(delta + ms[:, None] * B + ks[None, :], mask=stored, other=0.0)
        stream_rows = natural_rows(row_index, block * B + ks, ks < B, ROW_CHUNK) * width
        read = (ks < B)[:, None] & there[None, :]
        stream = tl.load(weight + stream_rows[:, None] + source[None, :], mask=read, other=0.0)
        total = tl.dot(left, stream, total, input_precision=PRECISION)
    at = (row.to(tl.int64) * width)[:, None] + columns[None, :]
    high = total.to(high_out.dtype.element_ty)
    tl.store(high_out + at, high, mask=inside)
    if HAS_LOW:
        low = (total - high.to(tl.float32)).to(low_out.dtype.element_ty)
        tl.store(low_out + at, low, mask=inside)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "layer"])
def turn_columns_kernel(
    high,  # [rows, width]
    low,  # [rows, width]; HAS_LOW = False: not read
    delta,  # [blocks, B, B], like high
    row_index,  # int64 [rows / ROW_CHUNK]
    scatter,  # int64 [width / CHUNK]; CHUNK = 0: not read
    apply,  # int32: nothing is written where it is zero; HAS_APPLY = False: not read
    out,  # [rows, width], like high
    rows,
    width,
    blocks,
    seed_low,  # all of these are 32 bits
    seed_high,
    step,
    layer,
    B: tl.constexpr,
    ROW_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_APPLY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[natural order] = U + U delta^T by blocks of the columns, with U = high + low."""
    if HAS_APPLY and tl.load(apply) == 0:
        return
    tiles_n: tl.constexpr = (B + TILE_N - 1) // TILE_N
    column_blocks = tl.cdiv(width, B)
    program = tl.program_id(0)
    block = program // tiles_n % column_blocks
    ns = (program % tiles_n) * TILE_N + tl.arange(0, TILE_N)
    row = program // (tiles_n * column_blocks) * TILE_M + tl.arange(0, TILE_M)
    columns = block * B + ns
    there = (ns < B) & (columns < width)
    row_there = row < rows
    inside = row_there[:, None] & there[None, :]
    at_row = (row.to(tl.int64) * width)[:, None]
    total = tl.load(high + at_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_LOW:
        total += tl.load(low + at_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    delta += block.to(tl.int64) * (B * B)
    for start in range(0, tl.where(block < blocks, B, 0), TILE_K):
        ks = start + tl.arange(0, TILE_K)
        read = row_there[:, None] & (ks < B)[None, :]
        left = tl.load(high + at_row + (block * B + ks)[None, :], mask=read, other=0.0)
        stored = (ns < B)[:, None] & (ks < B)[None, :]
        right = tl.load(delta + ns[:, None] * B + ks[None, :], mask=stored, other=0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    target = columns
    if CHUNK > 0:
        chunk = tl.load(scatter + columns // CHUNK, mask=there, other=0)
        target = chunk_columns(chunk, columns, CHUNK, RUN)
    out += natural_rows(row_index, row, row_there, ROW_CHUNK)[:, None] * width + target[None, :]
    if STOCHASTIC:
        bits = matrix_bits(row, columns, seed_low, seed_high, step, layer, B % 8 == 0)
        tl.store(out, stochastic_bf16(total, bits), mask=inside)
    else:
        tl.store(out, total.to(out.dtype.element_ty), mask=inside)


class Tiling(NamedTuple):
    """Sizes of a launch: a tile of the result, a step of the sum, warps, steps in flight."""

    tile_m: int
    tile_n: int
    tile_k: int
    warps: int
    stages: int


NARROW = Tiling(128, 128, 64, 8, 5), Tiling(128, 128, 64, 8, 3)
"""Of bf16, for rows and columns."""
UNALIGNED = Tiling(64, 128, 64, 8, 3), Tiling(64, 128, 64, 8, 3)
"""Of bf16 whose blocks begin at no multiple of 4: addresses and bits of single elements take
registers."""
WIDE = Tiling(64, 64, 32, 4, 3), Tiling(64, 64, 32, 4, 3)
"""Of fp32."""


def turn_by_deltas(
    weight: Tensor,
    delta_in: Tensor,
    delta_out: Tensor,
    perm_in: Tensor,
    perm_out: Tensor,
    seed: int,
    step: int,
    layer: int,
    apply: Tensor | None,
) -> None:
    """The same by given deltas, ``R_in − I`` and ``R_outᵀ − I`` [blocks, b, b] of its dtype."""
    rows, width = weight.shape
    narrow = weight.dtype == torch.bfloat16
    gather: Tensor | None = perm_in
    matrix = weight
    b_in = delta_in.shape[1] if delta_in.shape[0] else 16
    b_out = delta_out.shape[1] if delta_out.shape[0] else 16
    if not is_fused(perm_in, width, b_in):  # single columns: a pass of their own, there and back
        matrix, gather = permute_columns(weight, perm_in, False), None
    high = torch.empty_like(weight)
    low = torch.empty_like(weight) if narrow else high
    index = perm_out.select(0, 0)
    aligned = b_in % 4 == b_out % 4 == width % 16 == 0
    of_rows, of_columns = (NARROW if aligned else UNALIGNED) if narrow else WIDE
    shared = {
        "ROW_CHUNK": chunk_length(perm_out, rows),
        "CHUNK": chunk_length(gather, width),
        "RUN": run_length(width, b_in, gather),
        "HAS_LOW": narrow,
        "PRECISION": input_precision(),
    }
    tile_m = power_of_two(b_out, 16, of_rows.tile_m)
    tiles = -(-rows // b_out) * -(-b_out // tile_m)
    launch(
        turn_rows_kernel,
        tiles * -(-width // of_rows.tile_n),
        matrix,
        delta_out,
        index,
        row_or(gather, 0, index),
        high,
        low,
        rows,
        width,
        delta_out.shape[0],
        B=b_out,
        TILE_M=tile_m,
        TILE_N=of_rows.tile_n,
        TILE_K=power_of_two(b_out, 16, of_rows.tile_k),
        num_warps=of_rows.warps,
        num_stages=of_rows.stages,
        **shared,
    )
    tile_n = power_of_two(b_in, 16, of_columns.tile_n)
    tiles = -(-width // b_in) * -(-b_in // tile_n)
    launch(
        turn_columns_kernel,
        tiles * -(-rows // of_columns.tile_m),
        high,
        low,
        delta_in,
        index,
        row_or(gather, 0, index),
        index if apply is None else apply.to(torch.int32),
        matrix,
        rows,
        width,
        delta_in.shape[0],
        signed(seed),
        signed(seed >> 32),
        signed(step),
        signed(layer),
        B=b_in,
        TILE_M=of_columns.tile_m,
        TILE_N=tile_n,
        TILE_K=power_of_two(b_in, 16, of_columns.tile_k),
        HAS_APPLY=apply is not None,
        STOCHASTIC=narrow,
        num_warps=of_columns.warps,
        num_stages=of_columns.stages,
        **shared,
    )
    if matrix is not weight:
        weight.copy_(permute_columns(matrix, perm_in, True))
