"""Triton kernel of `block_product`: blocks of ``Xᵀ Y``, the tokens split over programs.

There are only d·b values to compute, each a sum over all tokens, so the tokens are split until the
grid fills the device; the partial sums are added by one reduction in a fixed order. No atomics: two
runs give the same bits. The split depends on the sizes alone, not on the device.

Columns are gathered by `permute.permute_columns` beforehand, for the reason given in `rotate`.
"""

from __future__ import annotations

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

_TARGET_PROGRAMS = 128
"""Programs wanted: about one for each multiprocessor of a large GPU."""
_FOUR_STAGES = 4 * 2 * 128 * 64 * 2
"""Bytes of shared memory of four stages of two 128×64 tiles of 2-byte elements."""
_TOKENS_A_SPLIT = 512
"""At least, so that the partial sums stay a small part of the traffic."""


@triton.jit
def block_product_kernel(
    x,  # [tokens, width]
    y,  # [tokens, width]
    out,  # f32[splits, blocks, B, B]
    tokens,
    width,
    blocks,
    tokens_a_split,  # a multiple of TILE_T
    B: tl.constexpr,
    TILE: tl.constexpr,
    TILE_T: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[split, block] = X_block^T Y_block over the tokens of the split."""
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    program = tl.program_id(0)
    tile = program % (tiles * tiles)
    block = (program // (tiles * tiles)) % blocks
    split = program // (tiles * tiles * blocks)
    rows = (tile // tiles) * TILE + tl.arange(0, TILE)
    columns = (tile % tiles) * TILE + tl.arange(0, TILE)
    first = split.to(tl.int64) * tokens_a_split
    x += block * B + rows[None, :]
    y += block * B + columns[None, :]
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, tokens_a_split, TILE_T):
        ts = first + start + tl.arange(0, TILE_T)
        there = (ts < tokens)[:, None]
        at = (ts * width)[:, None]
        left = tl.load(x + at, mask=there & (rows < B)[None, :], other=0.0)
        right = tl.load(y + at, mask=there & (columns < B)[None, :], other=0.0)
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    base = (split * blocks + block).to(tl.int64) * (B * B)
    inside = (rows < B)[:, None] & (columns < B)[None, :]
    tl.store(out + base + rows[:, None] * B + columns[None, :], total, mask=inside)


def block_product(
    x: Tensor,
    y: Tensor,
    blocks: int,
    block_size: int,
    gather_x: Tensor | None,
    gather_y: Tensor | None,
) -> Tensor:
    """`ops.block_product` of fp32, bf16 or fp16 tensors; at least one block."""
    if gather_x is not None:
        x = permute_columns(x, gather_x, False)
    if gather_y is not None:
        y = permute_columns(y, gather_y, False)
    x, y = x.contiguous(), y.contiguous()
    width = x.shape[-1]
    tokens = x.numel() // width
    half = x.dtype == y.dtype and x.element_size() == 2
    tile = power_of_two(block_size, 16, 128 if half else 64)
    tile_t = 64 if half else 32
    tiles = (-(-block_size // tile)) ** 2
    wanted = -(-_TARGET_PROGRAMS // (tiles * blocks))
    splits = max(1, min(wanted, known(tokens, 8192) // _TOKENS_A_SPLIT))
    shape = (blocks, block_size, block_size)
    partial = x.new_empty(shape if splits == 1 else (splits, *shape), dtype=torch.float32)
    launch(
        block_product_kernel,
        splits * blocks * tiles,
        x,
        y,
        partial,
        tokens,
        width,
        blocks,
        ceil_div(tokens, splits * tile_t) * tile_t,
        B=block_size,
        TILE=tile,
        TILE_T=tile_t,
        WIDEN=x.dtype != y.dtype,
        PRECISION=input_precision(),
        num_warps=4,
        num_stages=4 if half and shared_memory() > _FOUR_STAGES else 3,
    )
    return partial if splits == 1 else partial.sum(0)
