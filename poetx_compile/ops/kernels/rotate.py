"""Triton kernels of `rotate_blocks`: ``x + x (G − I)`` by blocks of columns.

Columns are gathered and scattered inside the product where they come in runs long enough for the
loads and stores of whole vectors (`common.is_fused`). All others are permuted by a kernel of its
own, `permute.permute_columns`, one more pass over x at copy bandwidth: a gather of single 2-byte
columns inside the product would cost 3 to 20 times the plain product.

For 2-byte x, ``G − I`` is rounded once (and transposed) by a small kernel. For 64 < b ≤ 256 it then
stays in shared memory (where that is large enough) while the tokens stream by: x is read once, out
is written once. Reading tiles of both for every tile of out, as `rotate_kernel` does (fp32 x, other
b, unaligned rows), runs into the bandwidth of the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import (
    MULTIPROCESSORS,
    ceil_div,
    chunk_length,
    input_precision,
    is_fused,
    known,
    launch,
    power_of_two,
    row_or,
    run_length,
    shared_memory,
    sums_in_tensor_memory,
)
from poetx_compile.ops.kernels.permute import chunk_columns, permute_columns, source_columns

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
def _tile_of_columns(column_program, width, blocks, B: tl.constexpr, TILE: tl.constexpr):
    """The columns of a tile of a block or, behind the blocks, of the rest; and which there are."""
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    block = column_program // tiles
    rest = column_program - blocks * tiles
    in_block = rest < 0
    first = tl.where(in_block, block * B + column_program % tiles * TILE, blocks * B + rest * TILE)
    columns = first + tl.arange(0, TILE)
    return columns, columns < tl.where(in_block, (block + 1) * B, width)


@triton.jit
def rotate_kernel(
    x,  # [tokens, width]
    matrix,  # [blocks, B, B]: G - I rounded to the dtype of x, or G itself
    gather,  # int64 [width / GATHER]; GATHER = 0: not read
    scatter,  # int64 [width / SCATTER]; SCATTER = 0: not read
    out,  # like x
    tokens,
    width,
    blocks,
    column_programs,  # tiles of the blocks, then of the rest
    B: tl.constexpr,
    GATHER: tl.constexpr,  # columns in a chunk
    SCATTER: tl.constexpr,
    RUN: tl.constexpr,
    MATRIX_IS_G: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[:, scatter] = x' + x' (G - I), x' = x[:, gather]; behind the blocks a copy of x'."""
    tiles: tl.constexpr = (B + TILE_N - 1) // TILE_N
    # All columns of some tokens before the next tokens: x is read from memory once, G from L2.
    program = tl.program_id(0)
    column_program = program % column_programs
    tokens_at = (program // column_programs).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    row_inside = (tokens_at < tokens)[:, None]
    x_rows = x + (tokens_at * width)[:, None]
    columns, there = _tile_of_columns(column_program, width, blocks, B, TILE_N)
    inside = row_inside & there[None, :]
    source = source_columns(gather, columns, there, GATHER, RUN)
    target = columns
    if SCATTER > 0:
        chunk = tl.load(scatter + columns // SCATTER, mask=there, other=0)
        target = chunk_columns(chunk, columns, SCATTER, RUN)
    out_at = out + (tokens_at * width)[:, None] + target[None, :]
    if column_program < blocks * tiles:
        block = column_program // tiles
        ns = column_program % tiles * TILE_N + tl.arange(0, TILE_N)
        matrix += block.to(tl.int64) * (B * B)
        product = tl.zeros((TILE_T, TILE_N), tl.float32)
        for start in range(0, B, TILE_K):
            ks = start + tl.arange(0, TILE_K)
            left_columns = source_columns(gather, block * B + ks, ks < B, GATHER, RUN)
            left = tl.load(
                x_rows + left_columns[None, :], mask=row_inside & (ks < B)[None, :], other=0.0
            )
            stored = (ks < B)[:, None] & (ns < B)[None, :]
            if TRANSPOSE:  # noqa: SIM108 (a compile-time branch)
                at = ks[:, None] + ns[None, :] * B
            else:
                at = ks[:, None] * B + ns[None, :]
            right = tl.load(matrix + at, mask=stored, other=0.0)
            if MATRIX_IS_G:
                right -= tl.where(ks[:, None] == ns[None, :], 1.0, 0.0)
            product = tl.dot(left, right, product, input_precision=PRECISION)
        identity = tl.load(x_rows + source[None, :], mask=inside, other=0.0)
        result = identity.to(tl.float32) + product
        tl.store(out_at, result.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out_at, tl.load(x_rows + source[None, :], mask=inside), mask=inside)


@triton.jit
def rotate_resident_kernel(
    x,  # [tokens, width], 2-byte elements
    delta,  # [blocks, B, B]: G - I rounded to the dtype of x
    gather,  # int64 [width / GATHER]; GATHER = 0: not read
    scatter,  # int64 [width / SCATTER]; SCATTER = 0: not read
    out,  # like x
    tokens,
    width,
    blocks,
    column_programs,  # the blocks, then tiles of the rest
    tokens_a_split,  # a multiple of TILE_T
    B: tl.constexpr,
    GATHER: tl.constexpr,  # columns in a chunk
    SCATTER: tl.constexpr,
    RUN: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two >= B
    TRANSPOSE: tl.constexpr,
    TILE_T: tl.constexpr,
):
    """`rotate_kernel` on one block of columns (a tile of the rest) of a split of the tokens.

    G - I stays in shared memory while the tokens stream by.
    """
    program = tl.program_id(0)
    block = program % column_programs
    first = (program // column_programs) * tokens_a_split
    last = tl.minimum(first + tokens_a_split, tokens)
    columns, there = _tile_of_columns(block, width, blocks, B, PADDED)
    source = source_columns(gather, columns, there, GATHER, RUN)[None, :]
    target = columns
    if SCATTER > 0:
        chunk = tl.load(scatter + columns // SCATTER, mask=there, other=0)
        target = chunk_columns(chunk, columns, SCATTER, RUN)
    target = target[None, :]
    if block < blocks:
        ns = tl.arange(0, PADDED)
        delta += block.to(tl.int64) * (B * B)
        stored = (ns < B)[:, None] & (ns < B)[None, :]
        right = tl.load(delta + ns[:, None] * B + ns[None, :], mask=stored, other=0.0)
        if TRANSPOSE:
            right = tl.trans(right)
        for start in range(first, last, TILE_T):
            rows = start + tl.arange(0, TILE_T)
            inside = (rows < last)[:, None] & there[None, :]
            at = (rows.to(tl.int64) * width)[:, None]
            left = tl.load(x + at + source, mask=inside, other=0.0)
            result = left.to(tl.float32) + tl.dot(left, right)
            tl.store(out + at + target, result.to(out.dtype.element_ty), mask=inside)
    else:
        for start in range(first, last, TILE_T):
            rows = start + tl.arange(0, TILE_T)
            inside = (rows < last)[:, None] & there[None, :]
            at = (rows.to(tl.int64) * width)[:, None]
            tl.store(out + at + target, tl.load(x + at + source, mask=inside), mask=inside)


def rotate_blocks(
    x: Tensor,
    rotation: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    transpose: bool,
) -> Tensor:
    """`ops.rotate_blocks` of fp32, bf16 or fp16 x and fp32 rotations; blocks and x not empty."""
    rotation = rotation.contiguous()
    if x.element_size() == 2:
        delta = rounded_delta(rotation, x.dtype, transpose)
        return rotate_by_delta(x, delta, gather, scatter, False)
    return _permuted(
        x,
        rotation.shape[1],
        gather,
        scatter,
        lambda x, *fused: _rotate(x, rotation, *fused, is_g=True, transpose=transpose),
    )


def rotate_by_delta(
    x: Tensor, delta: Tensor, gather: Tensor | None, scatter: Tensor | None, transpose: bool
) -> Tensor:
    """`ops.rotate_by_delta` of bf16 or fp16; blocks and x not empty."""
    b, width = delta.shape[1], x.shape[-1]
    # A small G − I is cheap to read again, and b = 512 fits into no shared memory.
    resident = 64 < b <= 256 and _aligned(b, width) and resident_bytes(b) <= shared_memory()
    delta = delta.contiguous()

    def rotate(x: Tensor, *fused: Tensor | None) -> Tensor:
        if resident:
            return _rotate_resident(x, delta, *fused, transpose=transpose)
        return _rotate(x, delta, *fused, is_g=False, transpose=transpose)

    return _permuted(x, b, gather, scatter, rotate)


def _permuted(
    x: Tensor,
    block_size: int,
    gather: Tensor | None,
    scatter: Tensor | None,
    rotate: Callable[..., Tensor],
) -> Tensor:
    """`rotate` with the permutations it can fuse, the others as passes of their own around it."""
    width = x.shape[-1]
    if gather is not None and not is_fused(gather, width, block_size):
        x, gather = permute_columns(x, gather, False), None
    afterwards = None
    if scatter is not None and not is_fused(scatter, width, block_size):
        scatter, afterwards = None, scatter
    out = rotate(x.contiguous(), gather, scatter)
    return out if afterwards is None else permute_columns(out, afterwards, True)


def resident_stages() -> int:
    """Tiles on their way to a kernel that keeps a block in shared memory, and one more."""
    return 2 if sums_in_tensor_memory() else 3


def resident_bytes(block_size: int) -> int:
    """Shared memory of `rotate_resident_kernel`: G − I, two tiles of x on their way, one of out."""
    padded = power_of_two(block_size, 128, 256)
    return 2 * padded * (padded + 3 * _TILE_T)


def _rotate_resident(
    x: Tensor, delta: Tensor, gather: Tensor | None, scatter: Tensor | None, *, transpose: bool
) -> Tensor:
    """The rotation of 2-byte x, by `rotate_resident_kernel`."""
    blocks, b, _ = delta.shape
    width = x.shape[-1]
    tokens = x.numel() // width
    padded = power_of_two(b, 128, 256)
    column_programs = blocks + -(-(width - blocks * b) // padded)
    # Splits of the tokens: one wave of programs.
    splits = max(1, MULTIPROCESSORS * (256 // padded) // column_programs)
    out = torch.empty_like(x)
    launch(
        rotate_resident_kernel,
        splits * column_programs,
        x,
        delta,
        row_or(gather, 0, x),
        row_or(scatter, 0, x),
        out,
        tokens,
        width,
        blocks,
        column_programs,
        ceil_div(tokens, splits * _TILE_T) * _TILE_T,
        B=b,
        GATHER=chunk_length(gather, width),
        SCATTER=chunk_length(scatter, width),
        RUN=run_length(width, b, gather, scatter),
        PADDED=padded,
        TRANSPOSE=transpose,
        TILE_T=_TILE_T,
        num_warps=8 if padded == 256 else 4,
        num_stages=resident_stages(),
    )
    return out


def _rotate(
    x: Tensor,
    matrix: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    *,
    is_g: bool,
    transpose: bool,
) -> Tensor:
    """The rotation by `rotate_kernel`; `matrix` is G or its rounded G − I."""
    blocks, b, _ = matrix.shape
    width = x.shape[-1]
    tokens = x.numel() // width
    half = x.element_size() == 2
    # 2-byte: 128×128 in 8 warps is the tile of a plain GEMM. fp32 needs three times the operands;
    # unaligned rows need registers for their addresses, which a larger tile would spill.
    aligned = _aligned(b, width)
    tile_t = 128 if half and aligned else 64
    tile_n = power_of_two(b, 16, (64 if half else 32) * (2 if aligned else 1))
    column_programs = blocks * -(-b // tile_n) + -(-(width - blocks * b) // tile_n)
    out = torch.empty_like(x)
    launch(
        rotate_kernel,
        ceil_div(tokens, tile_t) * column_programs,
        x,
        matrix,
        row_or(gather, 0, x),
        row_or(scatter, 0, x),
        out,
        tokens,
        width,
        blocks,
        column_programs,
        B=b,
        GATHER=chunk_length(gather, width),
        SCATTER=chunk_length(scatter, width),
        RUN=run_length(width, b, gather, scatter),
        MATRIX_IS_G=is_g,
        TRANSPOSE=transpose,
        TILE_T=tile_t,
        TILE_N=tile_n,
        TILE_K=power_of_two(b, 16, 64 if half else 32),
        PRECISION=input_precision(),
        num_warps=8 if half and (tile_n == 128 or not aligned) else 4,
        # A gather takes two stages to load its index; three are left for x, as without one.
        num_stages=3 if gather is None else 5,
    )
    return out


def _aligned(block_size: int, width: Any) -> bool:
    """Whether every row of a block begins at a multiple of 16 bytes, as Triton can know it."""
    return block_size % 8 == 0 and known(width, 16) % 16 == 0


def rounded_delta(rotation: Tensor, dtype: torch.dtype, transpose: bool) -> Tensor:
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
