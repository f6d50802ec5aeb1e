"""Triton kernels of `rotate_blocks`: ``x + x (G − I)`` by blocks of columns.

The columns are gathered and scattered by kernels of their own (`permute.permute_columns`): a gather
of single 2-byte columns inside the product costs 3 to 20 times the plain product, a permutation of
whole rows in shared memory costs one more pass over x at copy bandwidth.

For 2-byte x, ``G − I`` is rounded once (and transposed) by a small kernel, so that the product
streams 2-byte tiles into the tensor cores; each of them is read once for every 128 tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import ceil_div, input_precision, launch, power_of_two
from poetx_compile.ops.kernels.permute import permute_columns


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
    x = x.contiguous()
    rotation = rotation.contiguous()
    blocks, b, _ = rotation.shape
    width = x.shape[-1]
    tokens = x.numel() // width
    half = x.element_size() == 2
    matrix = _rounded_delta(rotation, x.dtype, transpose) if half else rotation
    # 2-byte: 128×128 in 8 warps is the tile of a plain GEMM. fp32 needs three times the operands;
    # unaligned rows (odd b) need registers for their addresses, which the wide tile would spill.
    wide = half and b % 8 == 0
    tile_n = power_of_two(b, 16, 128 if wide else 64)
    tile_t = 128 if wide else 64
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
        num_warps=8 if half and tile_n == 128 else 4,
        num_stages=3,
    )
    return out if scatter is None else permute_columns(out, scatter, True)


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
