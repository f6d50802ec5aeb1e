"""Triton kernels of `rotate_blocks`: ``x + x (G − I)`` by blocks of columns.

The columns are gathered and scattered by kernels of their own (`permute.permute_columns`): a gather
of single 2-byte columns inside the product costs 3 to 20 times the plain product, a permutation of
whole rows in shared memory costs one more pass over x at copy bandwidth.

For 2-byte x, ``G − I`` is rounded once (and transposed) by a small kernel. For 64 < b ≤ 256 it then
stays in shared memory (where that is large enough) while the tokens stream by: x is read once, out
is written once. Reading tiles of both for every tile of out, as `rotate_kernel` does (fp32 x, other
b, unaligned rows), runs into the bandwidth of the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import (
    ceil_div,
    input_precision,
    known,
    launch,
    power_of_two,
    shared_memory,
)
from poetx_compile.ops.kernels.permute import permute_columns

_TARGET_PROGRAMS = 132
"""Programs of `rotate_resident_kernel` at b = 256: one for each multiprocessor of a large GPU."""
_TILE_T = 64
"""Tokens of a step of `rotate_resident_kernel`."""


@triton.jit
def rounded_delta_kernel(
    rotation,  # f32[blocks, B, B]
    out,  # [blocks, B, B] of the dtype of x
    B: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    TILE: tl.constexpr,
):
    """out = G - I or G^T - I, rounded to out's dtype."""
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    program = tl.program_id(0)
    base = (program // (tiles * tiles)).to(tl.int64) * (B * B)
    tile = program % (tiles * tiles)
    rows = (tile // tiles) * TILE + tl.arange(0, TILE)
    columns = (tile % tiles) * TILE + tl.arange(0, TILE)
    r = rows[:, None]
    c = columns[None, :]
    inside = (r < B) & (c < B)
    delta = tl.load(rotation + base + r * B + c, mask=inside, other=0.0)
    delta -= tl.where(r == c, 1.0, 0.0)
    if TRANSPOSE:
        delta = tl.trans(delta)
        r = columns[:, None]
        c = rows[None, :]
        inside = (r < B) & (c < B)
    tl.store(out + base + r * B + c, delta.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    x,  # [tokens, width]
    matrix,  # [blocks, B, B]: G - I rounded to the dtype of x, or G itself
    out,  # like x
    tokens,
    width,
    blocks,
    B: tl.constexpr,
    MATRIX_IS_G: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = x + x (G - I) on the first blocks B columns, a copy of x behind them."""
    tiles: tl.constexpr = (B + TILE_N - 1) // TILE_N
    column_programs = blocks * tiles
    if HAS_TAIL:
        column_programs += (width - blocks * B + TILE_N - 1) // TILE_N
    # All columns of some tokens before the next tokens: x is read from memory once, G from L2.
    program = tl.program_id(0)
    column_program = program % column_programs
    tokens_at = (program // column_programs).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    row_inside = (tokens_at < tokens)[:, None]
    x_rows = x + (tokens_at * width)[:, None]
    out_rows = out + (tokens_at * width)[:, None]
    if column_program < blocks * tiles:
        block = column_program // tiles
        ns = (column_program % tiles) * TILE_N + tl.arange(0, TILE_N)
        n_inside = (ns < B)[None, :]
        matrix += block.to(tl.int64) * (B * B)
        product = tl.zeros((TILE_T, TILE_N), tl.float32)
        for start in range(0, B, TILE_K):
            ks = start + tl.arange(0, TILE_K)
            left = tl.load(
                x_rows + (block * B + ks)[None, :], mask=row_inside & (ks < B)[None, :], other=0.0
            )
            inside = (ks < B)[:, None] & n_inside
            if MATRIX_IS_G:
                if TRANSPOSE:  # noqa: SIM108 (a compile-time branch)
                    at = ks[:, None] + ns[None, :] * B
                else:
                    at = ks[:, None] * B + ns[None, :]
                right = tl.load(matrix + at, mask=inside, other=0.0)
                right -= tl.where(ks[:, None] == ns[None, :], 1.0, 0.0)
            else:
                right = tl.load(matrix + ks[:, None] * B + ns[None, :], mask=inside, other=0.0)
            product = tl.dot(left, right, product, input_precision=PRECISION)
        columns = (block * B + ns)[None, :]
        inside = row_inside & n_inside
        identity = tl.load(x_rows + columns, mask=inside, other=0.0)
        result = identity.to(tl.float32) + product
        tl.store(out_rows + columns, result.to(out.dtype.element_ty), mask=inside)
    else:
        tail = (column_program - blocks * tiles) * TILE_N + tl.arange(0, TILE_N)
        columns = (blocks * B + tail)[None, :]
        inside = row_inside & (columns < width)
        tl.store(out_rows + columns, tl.load(x_rows + columns, mask=inside), mask=inside)


@triton.jit
def rotate_resident_kernel(
    x,  # [tokens, width], 2-byte elements
    delta,  # [blocks, B, B]: G - I rounded to the dtype of x
    out,  # like x
    tokens,
    width,
    blocks,
    tokens_a_split,  # a multiple of TILE_T
    B: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two >= B
    TILE_T: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """out = x + x (G - I) on one block of columns (or a copy of the tail) of a split of the tokens.

    G - I stays in shared memory while the tokens stream by.
    """
    column_programs = blocks
    if HAS_TAIL:
        column_programs += 1
    program = tl.program_id(0)
    block = program % column_programs
    first = (program // column_programs) * tokens_a_split
    last = tl.minimum(first + tokens_a_split, tokens)
    ns = tl.arange(0, PADDED)
    columns = (block * B + ns)[None, :]
    if block < blocks:
        n_inside = (ns < B)[None, :]
        delta += block.to(tl.int64) * (B * B)
        stored = (ns < B)[:, None] & n_inside
        right = tl.load(delta + ns[:, None] * B + ns[None, :], mask=stored, other=0.0)
        for start in range(first, last, TILE_T):
            rows = start + tl.arange(0, TILE_T)
            inside = (rows < last)[:, None] & n_inside
            at = (rows.to(tl.int64) * width)[:, None] + columns
            left = tl.load(x + at, mask=inside, other=0.0)
            result = left.to(tl.float32) + tl.dot(left, right)
            tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    else:
        for start in range(first, last, TILE_T):
            rows = start + tl.arange(0, TILE_T)
            inside = (rows < last)[:, None] & (columns < width)
            at = (rows.to(tl.int64) * width)[:, None] + columns
            tl.store(out + at, tl.load(x + at, mask=inside), mask=inside)


def rotate_blocks(
    x: Tensor,
    rotation: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    transpose: bool,
) -> Tensor:
    """`ops.rotate_blocks` of fp32, bf16 or fp16 x and fp32 rotations; blocks and x not empty."""
    if gather is not None:
        x = permute_columns(x, gather, False)
    x, rotation = x.contiguous(), rotation.contiguous()
    if x.element_size() != 2:
        out = _rotate(x, rotation, rotation, transpose)
    else:
        delta = _rounded_delta(rotation, x.dtype, transpose)
        b = rotation.shape[1]
        # A small G − I is cheap to read again, and b = 512 fits into no shared memory.
        resident = 64 < b <= 256 and _aligned(b, x.shape[-1])
        resident = resident and _resident_bytes(b) <= shared_memory()
        out = _rotate_resident(x, delta) if resident else _rotate(x, rotation, delta, transpose)
    return out if scatter is None else permute_columns(out, scatter, True)


def _resident_bytes(block_size: int) -> int:
    """Shared memory of `rotate_resident_kernel`: G − I, two tiles of x on their way, one of out."""
    padded = power_of_two(block_size, 128, 256)
    return 2 * padded * (padded + 3 * _TILE_T)


def _rotate_resident(x: Tensor, delta: Tensor) -> Tensor:
    """``x + x (G − I)`` of 2-byte x, by `rotate_resident_kernel`."""
    blocks, b, _ = delta.shape
    width = x.shape[-1]
    tokens = x.numel() // width
    padded = power_of_two(b, 128, 256)
    has_tail = blocks * b < width
    # Splits of the tokens: one wave of programs.
    splits = max(1, _TARGET_PROGRAMS * (256 // padded) // (blocks + has_tail))
    out = torch.empty_like(x)
    launch(
        rotate_resident_kernel,
        splits * (blocks + has_tail),
        x,
        delta,
        out,
        tokens,
        width,
        blocks,
        ceil_div(tokens, splits * _TILE_T) * _TILE_T,
        B=b,
        PADDED=padded,
        TILE_T=_TILE_T,
        HAS_TAIL=has_tail,
        num_warps=8 if padded == 256 else 4,
        num_stages=3,
    )
    return out


def _rotate(x: Tensor, rotation: Tensor, matrix: Tensor, transpose: bool) -> Tensor:
    """``x + x (G − I)`` by `rotate_kernel`; `matrix` is the rotation or its rounded delta."""
    blocks, b, _ = rotation.shape
    width = x.shape[-1]
    tokens = x.numel() // width
    half = x.element_size() == 2
    # 2-byte: 128×128 in 8 warps is the tile of a plain GEMM. fp32 needs three times the operands;
    # unaligned rows need registers for their addresses, which a larger tile would spill.
    aligned = _aligned(b, width)
    tile_t = 128 if half and aligned else 64
    tile_n = power_of_two(b, 16, (64 if half else 32) * (2 if aligned else 1))
    tail = -(-(width - blocks * b) // tile_n)
    out = torch.empty_like(x)
    launch(
        rotate_kernel,
        ceil_div(tokens, tile_t) * (blocks * -(-b // tile_n) + tail),
        x,
        matrix,
        out,
        tokens,
        width,
        blocks,
        B=b,
        MATRIX_IS_G=not half,
        TRANSPOSE=transpose,
        TILE_T=tile_t,
        TILE_N=tile_n,
        TILE_K=power_of_two(b, 16, 64 if half else 32),
        HAS_TAIL=tail > 0,
        PRECISION=input_precision(),
        num_warps=8 if half and (tile_n == 128 or not aligned) else 4,
        num_stages=3,
    )
    return out


def _aligned(block_size: int, width: Any) -> bool:
    """Whether every row of a block begins at a multiple of 16 bytes, as Triton can know it."""
    return block_size % 8 == 0 and known(width, 16) % 16 == 0


def _rounded_delta(rotation: Tensor, dtype: torch.dtype, transpose: bool) -> Tensor:
    """``G − I`` (of Gᵀ with `transpose`) rounded to `dtype`."""
    blocks, b, _ = rotation.shape
    tile = power_of_two(b, 16, 64)
    delta = torch.empty_like(rotation, dtype=dtype)
    launch(
        rounded_delta_kernel,
        blocks * (-(-b // tile)) ** 2,
        rotation,
        delta,
        B=b,
        TRANSPOSE=transpose,
        TILE=tile,
        num_warps=4,
        num_stages=1,
    )
    return delta
