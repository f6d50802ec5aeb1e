"""Kernels of `orthogonalize_skew`: Newton-Schulz steps of skew blocks.

With X skew, all that a step ``X ← aX + b A X + c A² X``, ``A = X Xᵀ``, makes is symmetric or skew.
Products are ``L Rᵀ``, both operands read along their rows::

    A = X Xᵀ                symmetric
    B = b A + c A Aᵀ        symmetric
    X = a X − B Xᵀ          skew

*By Triton* only the tiles on and above the diagonal are computed, and mirrored; the last product is
written packed, as it is summed. *By the library* all of them are, at a higher rate and with one
more pass over each addend.

Operands are bf16, padded with zeros to whole tiles; sums are fp32, rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import input_precision, launch, power_of_two
from poetx_compile.ops.kernels.tiles import (
    above_diagonal,
    add_product,
    packed_index,
    position,
    tile_of,
)
from poetx_compile.ops.kernels.unpack import store_skew
from poetx_compile.ops.newton_schulz import COEFFICIENTS, STEPS, newton_schulz


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


@triton.jit
def mirrored_product_kernel(
    left,  # [blocks, N, N], 2-byte elements, like right and addend
    right,  # [blocks, N, N]
    addend,  # [blocks, N, N]; ALPHA = 0: not read
    out,  # [blocks, N, N], like left; f32[blocks, B(B-1)/2] where PACKED
    B: tl.constexpr,
    N: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    SKEW: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = ALPHA addend + BETA left right^T, which is symmetric or SKEW, from its upper half."""
    block, row_tile, column_tile = position(N, TILE)
    if row_tile > column_tile:
        return
    left += block * (N * N)
    right += block * (N * N)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    total = BETA * add_product(total, left, right, rows, columns, N, TILE_K, PRECISION)
    if ALPHA != 0:
        # In fp32: a constant times a bf16 tile would be rounded to bf16, and so would the constant.
        total += ALPHA * tile_of(addend + block * (N * N), rows, columns, N).to(tl.float32)
    if PACKED:
        out += block * (B * (B - 1) // 2)
        stored = above_diagonal(rows, columns, B)
        tl.store(out + packed_index(rows, columns, B), total, mask=stored)
    else:
        out += block * (N * N)
        r, c = rows[:, None], columns[None, :]
        # Masks by element would make a store of each element: tiles are written whole.
        if row_tile == column_tile:
            total = tl.where(r < c, total, tl.trans(-total if SKEW else total))
            if SKEW:
                total = tl.where(r == c, 0.0, total)
            tl.store(out + r * N + c, total.to(out.dtype.element_ty))
        else:
            tl.store(out + r * N + c, total.to(out.dtype.element_ty))
            image = tl.trans((-total if SKEW else total).to(out.dtype.element_ty))
            tl.store(out + columns[:, None] * N + rows[None, :], image)


class Tiling(NamedTuple):
    """Sizes of a product: a tile of the result, a step of the sum, warps, steps in flight."""

    tile: int
    tile_k: int
    warps: int
    stages: int


def tiling_of(block_size: int) -> Tiling:
    """Small tiles waste less of a half, large ones read fewer bytes."""
    side = power_of_two(block_size, 16, 128)
    return Tiling(side, min(side, 64), {16: 1, 128: 8}.get(side, 4), 4)


LIBRARY_FROM = 1 << 30
"""b from which the products are the library's."""


def orthogonalize_skew(
    skew: Tensor,
    block_size: int,
    *,
    tiling: Tiling | None = None,
    by_library: bool | None = None,
    operands: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`ops.orthogonalize_skew` of fp32 blocks; at least one, b ≥ 2.

    Args:
        skew, block_size: those of the op.
        tiling, by_library: to try, in place of what is chosen by b.
        operands: what products take.
    """
    tiling = tiling or tiling_of(block_size)
    blocks, padded = skew.shape[0], -(-block_size // tiling.tile) * tiling.tile
    skew = skew.contiguous()
    narrow = min(tiling.tile, 64)
    tiles = blocks * (padded // narrow) ** 2
    sizes = {"B": block_size, "N": padded, "TILE": narrow, "num_warps": 4, "num_stages": 1}
    x = skew.new_empty(blocks, padded, padded, dtype=operands)
    norm = torch.linalg.vector_norm(skew, dim=1)
    launch(unpack_normalized_kernel, tiles, skew, norm, x, **sizes)
    if by_library if by_library is not None else block_size >= LIBRARY_FROM:
        out = torch.empty_like(skew)
        launch(pack_kernel, tiles, newton_schulz(x), out, **sizes)
        return out
    return _mirrored(x, torch.empty_like(skew), block_size, tiling)


def _mirrored(x: Tensor, out: Tensor, block_size: int, tiling: Tiling) -> Tensor:
    """The steps from normalised x [blocks, N, N], which is overwritten, to packed `out`."""
    blocks, padded, _ = x.shape
    square, polynomial, other = (torch.empty_like(x) for _ in range(3))

    def product(left, right, addend, result, alpha, beta, *, skew=False, packed=False):
        launch(
            mirrored_product_kernel,
            blocks * (padded // tiling.tile) ** 2,
            *(left, right, addend, result),
            B=block_size,
            N=padded,
            ALPHA=alpha,
            BETA=beta,
            SKEW=skew,
            PACKED=packed,
            TILE=tiling.tile,
            TILE_K=tiling.tile_k,
            PRECISION=input_precision(),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )

    a, b, c = COEFFICIENTS
    for step in range(STEPS):
        last = step == STEPS - 1
        product(x, x, x, square, 0.0, 1.0)
        product(square, square, square, polynomial, b, c)
        # Not in place: other programs still read x.
        product(polynomial, x, x, out if last else other, a, -1.0, skew=True, packed=last)
        x, other = other, x
    return out
