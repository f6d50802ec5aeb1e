"""Triton kernels of `orthogonalize_skew`: Newton-Schulz steps of skew blocks, half of each product.

With X skew, all that a step ``X ← aX + b A X + c A² X``, ``A = X Xᵀ``, makes is symmetric or skew:
only what is on and above the diagonal is computed, and mirrored. Products are ``L Rᵀ``, both
operands read along their rows::

    A = X Xᵀ                symmetric
    B = b A + c A Aᵀ        symmetric
    X = a X − B Xᵀ          skew; the last one is written packed, as it is summed

Operands are bf16, padded with zeros to whole tiles; sums are fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import input_precision, launch, power_of_two
from poetx_compile.ops.kernels.tiles import add_product, packed_index, tile_of
from poetx_compile.ops.kernels.unpack import unpack_kernel
from poetx_compile.ops.newton_schulz import COEFFICIENTS, STEPS


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
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = ALPHA addend + BETA left right^T, which is symmetric or SKEW, from its upper half."""
    tiles_n: tl.constexpr = N // TILE_N
    of_block: tl.constexpr = tiles_n * (N // TILE_M)
    program = tl.program_id(0)
    tile = program % of_block
    first_row, first_column = tile // tiles_n * TILE_M, tile % tiles_n * TILE_N
    if first_row >= first_column + TILE_N:
        return
    block = (program // of_block).to(tl.int64)
    left += block * (N * N)
    right += block * (N * N)
    rows = first_row + tl.arange(0, TILE_M)
    columns = first_column + tl.arange(0, TILE_N)
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    total = BETA * add_product(total, left, right, rows, columns, N, TILE_K, PRECISION)
    if ALPHA != 0:
        total += ALPHA * tile_of(addend + block * (N * N), rows, columns, N)
    r, c = rows[:, None], columns[None, :]
    if PACKED:
        out += block * (B * (B - 1) // 2)
        tl.store(out + packed_index(rows, columns, B), total, mask=(r < c) & (c < B))
    else:
        if SKEW:
            total = tl.where(r == c, 0.0, total)
        out += block * (N * N)
        result = total.to(out.dtype.element_ty)
        tl.store(out + r * N + c, result, mask=r <= c)
        image = tl.trans(-result if SKEW else result)
        tl.store(
            out + columns[:, None] * N + rows[None, :], image, mask=rows[None, :] < columns[:, None]
        )


class Tiling(NamedTuple):
    """Sizes of a product: a tile of the result, a step of the sum, warps, steps in flight."""

    tile_m: int
    tile_n: int
    tile_k: int
    warps: int
    stages: int


def tiling_of(block_size: int) -> Tiling:
    """Small tiles waste less of a half, large ones read fewer bytes."""
    side = power_of_two(block_size, 16, 64 if block_size <= 256 else 128)
    return Tiling(side, side, min(side, 64), 4 if side > 16 else 1, 3)


def orthogonalize_skew(
    skew: Tensor,
    block_size: int,
    *,
    tiling: Tiling | None = None,
    operands: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`ops.orthogonalize_skew` of fp32 blocks; at least one, b ≥ 2.

    Args:
        skew, block_size: those of the op.
        tiling: sizes to try.
        operands: what products take.
    """
    tile_m, tile_n, tile_k, warps, stages = tiling or tiling_of(block_size)
    blocks, step = skew.shape[0], max(tile_m, tile_n)
    padded = -(-block_size // step) * step
    norm = torch.linalg.vector_norm(skew, dim=1, keepdim=True) * 2**0.5
    scaled = skew / norm.clamp_min(torch.finfo(skew.dtype).tiny)
    x, square, polynomial = (skew.new_empty(blocks, padded, padded, dtype=operands) for _ in "xab")
    narrow = min(tile_m, 64)
    launch(
        unpack_kernel,
        blocks * (padded // narrow) ** 2,
        *(scaled, x, x, blocks),
        B=block_size,
        N=padded,
        HAS_REST=False,
        TILE=narrow,
        num_warps=4,
        num_stages=1,
    )
    out = torch.empty_like(scaled)

    def product(left, right, addend, result, alpha, beta, *, skew=False, packed=False):
        launch(
            mirrored_product_kernel,
            blocks * (padded // tile_m) * (padded // tile_n),
            *(left, right, addend, result),
            B=block_size,
            N=padded,
            ALPHA=alpha,
            BETA=beta,
            SKEW=skew,
            PACKED=packed,
            TILE_M=tile_m,
            TILE_N=tile_n,
            TILE_K=tile_k,
            PRECISION=input_precision(),
            num_warps=warps,
            num_stages=stages,
        )

    a, b, c = COEFFICIENTS
    other = torch.empty_like(x)
    for step in range(STEPS):
        last = step == STEPS - 1
        product(x, x, x, square, 0.0, 1.0)
        product(square, square, square, polynomial, b, c)
        # Not in place: other programs still read x.
        product(polynomial, x, x, out if last else other, a, -1.0, skew=True, packed=last)
        x, other = other, x
    return out
