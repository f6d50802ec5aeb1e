"""Kernels of `orthogonalize_skew`: Newton-Schulz steps of skew blocks.

Unpacking with the division by the norm is one launch, packing another; the products between are a
library's. Operands are bf16, padded with zeros to whole tiles; sums are fp32, rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import launch, power_of_two
from poetx_compile.ops.kernels.tiles import above_diagonal, packed_index, position, tile_of
from poetx_compile.ops.kernels.unpack import store_skew
from poetx_compile.ops.newton_schulz import newton_schulz


@triton.jit
def unpack_normalized_kernel(
    packed,  # f32[blocks, B(B-1)/2]
    norm,  # f32[blocks]: of the packed entries
    out,  # [blocks, N, N]
    B: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """out = Q / |Q|, by the Frobenius norm; a block of zeros stays."""
    block, row_tile, column_tile = position(N, TILE)
    if row_tile > column_tile:
        return
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    packed += block * (B * (B - 1) // 2)
    stored = above_diagonal(rows, columns, B)
    value = tl.load(packed + packed_index(rows, columns, B), mask=stored, other=0.0)
    length = tl.maximum(tl.load(norm + block) * 1.4142135623730951, 1.1754943508222875e-38)
    store_skew(out + block * (N * N), rows, columns, row_tile == column_tile, value / length, N)


@triton.jit
def pack_kernel(
    matrix,  # [blocks, N, N]
    out,  # f32[blocks, B(B-1)/2]
    B: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """out = what is above the diagonal."""
    block, row_tile, column_tile = position(N, TILE)
    if row_tile > column_tile:
        return
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    value = tile_of(matrix + block * (N * N), rows, columns, N).to(tl.float32)
    out += block * (B * (B - 1) // 2)
    stored = above_diagonal(rows, columns, B)
    tl.store(out + packed_index(rows, columns, B), value, mask=stored)


def orthogonalize_skew(
    skew: Tensor, block_size: int, *, operands: torch.dtype = torch.bfloat16
) -> Tensor:
    """`ops.orthogonalize_skew` of fp32 blocks; at least one, b ≥ 2.

    Args:
        skew, block_size: those of the op.
        operands: what products take.
    """
    skew = skew.contiguous()
    tile = power_of_two(block_size, 16, 64)
    blocks, tiles = skew.shape[0], -(-block_size // tile)
    padded, programs = tiles * tile, blocks * tiles * tiles
    sizes = {"B": block_size, "N": padded, "TILE": tile, "num_warps": 4, "num_stages": 1}
    x = skew.new_empty(blocks, padded, padded, dtype=operands)
    norm = torch.linalg.vector_norm(skew, dim=1)
    launch(unpack_normalized_kernel, programs, skew, norm, x, **sizes)
    out = torch.empty_like(skew)
    launch(pack_kernel, programs, newton_schulz(x), out, **sizes)
    return out
