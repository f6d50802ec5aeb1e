"""Kernels of `orthogonalize_skew`: Newton-Schulz steps of skew blocks.

With X skew, all that a step ``X ← aX + bAX + cA²X``, ``A = X Xᵀ``, makes is symmetric or skew. Its
products are ``L Rᵀ``, both operands read along their rows::

    A = X Xᵀ                    symmetric
    P = bA + cA Aᵀ              symmetric
    X = aX + X Pᵀ               skew

X from the left, which A and P commute with: ``P X`` would be ``−P Xᵀ``, and a sum of products that
is only negated afterwards loses its last product to the ptxas of Triton 3.6 to 3.8.

*Blocks up to* `WHOLE` are a program each, which keeps all of a block. *Larger ones* go through
memory, as tiles on and above the diagonal; the other half is their mirror image, and tiles on the
diagonal are made exactly symmetric or skew as well, since what they are not grows. All products of
all blocks are one launch: programs draw the tiles in order, and a tile waits until its block has
what it reads. Those are tiles of lower numbers, which others have drawn before, so that whoever
waits, waits for a program that runs.

Operands are bf16, padded with zeros to whole tiles; sums are fp32, rounded once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import (
    MULTIPROCESSORS,
    input_precision,
    launch,
    power_of_two,
)
from poetx_compile.ops.kernels.tiles import (
    above_diagonal,
    add_product,
    packed_index,
    position,
    tile_of,
)
from poetx_compile.ops.kernels.unpack import unpack_kernel
from poetx_compile.ops.newton_schulz import BOUND, COEFFICIENTS, SMALLEST, Coefficients


@triton.jit
def inverse_norm(norm, SMALLEST: tl.constexpr):
    """1 / the Frobenius norm of a skew matrix, from that of its packed entries.

    0 for what counts as zero; what is not finite makes the matrix NaN.
    """
    norm *= 1.4142135623730951
    return tl.where(norm < SMALLEST, 0.0, 1.0 / norm)


@triton.jit
def inverse_bound(squares, BOUND: tl.constexpr):
    """1 / the bound of the singular values, from the sum of squares of A."""
    return tl.where(squares == 0.0, 0.0, 1.0 / (BOUND * tl.sqrt(tl.sqrt(0.5 * squares))))


@triton.jit
def whole_blocks_kernel(
    packed,  # [blocks, B(B-1)/2]
    norm,  # f32[blocks]: of the packed entries
    out,  # f32[blocks, B(B-1)/2]
    B: tl.constexpr,
    N: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    BOUND: tl.constexpr,
    SMALLEST: tl.constexpr,
    OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = msign(Q), a block a program."""
    block = tl.program_id(0).to(tl.int64)
    first = block * (B * (B - 1) // 2)
    rows = tl.arange(0, N)
    stored = above_diagonal(rows, rows, B)
    upper = tl.load(packed + first + packed_index(rows, rows, B), mask=stored, other=0.0)
    inverse = inverse_norm(tl.load(norm + block), SMALLEST)
    upper = upper.to(tl.float32) * inverse
    x = (upper - tl.trans(upper)).to(OPERANDS)
    total = upper
    for step in tl.static_range(len(COEFFICIENTS)):
        square = tl.dot(x, tl.trans(x), input_precision=PRECISION).to(OPERANDS)
        scale = 1.0
        if step == 0:
            wide = square.to(tl.float32)
            scale = inverse_bound(tl.sum(wide * wide), BOUND)
        s2 = scale * scale
        total = tl.dot(square, square, input_precision=PRECISION)
        total *= COEFFICIENTS[step][2] * s2 * s2
        total += COEFFICIENTS[step][1] * s2 * square.to(tl.float32)
        polynomial = total.to(OPERANDS)
        total = tl.dot(polynomial, x, input_precision=PRECISION)
        total += COEFFICIENTS[step][0] * x.to(tl.float32)
        total *= scale
        x = total.to(OPERANDS)
    # Not the addresses of the load: kept over all products they would fill the registers.
    rows += (inverse < 0).to(tl.int32)
    stored = above_diagonal(rows, rows, B)
    tl.store(out + first + packed_index(rows, rows, B), total, mask=stored)


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


@triton.jit(do_not_specialize=["blocks"])
def tiles_kernel(
    matrices,  # [3, blocks, N, N]: X; the others are scratch
    norm,  # f32[blocks]: of the packed entries
    squares,  # f32[blocks, tiles]: scratch
    progress,  # int32[1 + blocks]: zeros; tiles drawn, tiles ready of each block
    blocks,
    N: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    BOUND: tl.constexpr,
    SMALLEST: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, tiles of a block or more
    PRECISION: tl.constexpr,
):
    """X = msign(X), in the first matrices where the number of steps is even, else in the second."""
    side: tl.constexpr = N // TILE
    tiles: tl.constexpr = side * (side + 1) // 2  # on and above the diagonal
    steps: tl.constexpr = len(COEFFICIENTS)
    ready = progress + 1
    of_product = blocks * tiles
    matrix = blocks.to(tl.int64) * (N * N)
    drawn = tl.atomic_add(progress, 1, sem="relaxed")
    while drawn < 3 * steps * of_product:
        number = drawn
        # Its answer comes during the product.
        drawn = tl.atomic_add(progress, 1, sem="relaxed")
        product = number // of_product
        block = number % of_product // tiles
        tile = number % tiles
        row_tile = 0
        for row in tl.static_range(1, side):
            row_tile += (tile >= row * side - row * (row - 1) // 2).to(tl.int32)
        column_tile = tile - row_tile * side + row_tile * (row_tile - 1) // 2 + row_tile
        rows = row_tile * TILE + tl.arange(0, TILE)
        columns = column_tile * TILE + tl.arange(0, TILE)

        step, kind = product // 3, product % 3
        a, b, c = 0.0, 0.0, 0.0
        for i in tl.static_range(steps):
            a = tl.where(step == i, COEFFICIENTS[i][0], a)
            b = tl.where(step == i, COEFFICIENTS[i][1], b)
            c = tl.where(step == i, COEFFICIENTS[i][2], c)

        # The block's earlier products are complete.
        while tl.atomic_add(ready + block, 0, sem="acquire") < product * tiles:
            pass

        # alpha addend + beta left right^T; step by step X and A change places.
        base = matrices + block.to(tl.int64) * (N * N)
        x = base + (step % 2) * matrix
        square = base + (1 - step % 2) * matrix
        polynomial = base + 2 * matrix
        alpha, beta = 0.0, 1.0
        if step == 0:
            inverse = inverse_norm(tl.load(norm + block), SMALLEST)
            if kind == 0:
                beta = inverse * inverse
            else:
                parts = tl.arange(0, PARTS)
                of_block = squares + block * tiles + parts
                found = tl.load(of_block, mask=parts < tiles, other=0.0)
                scale = inverse_bound(tl.sum(found), BOUND)
                if kind == 1:
                    alpha = b * scale * scale
                    beta = c * scale * scale * scale * scale
                else:
                    alpha = a * scale * inverse
                    beta = scale * inverse
        else:
            if kind == 1:
                alpha = b
                beta = c
            if kind == 2:
                alpha = a
        left = tl.where(kind == 1, square, x)
        right = tl.where(kind == 0, x, tl.where(kind == 1, square, polynomial))
        target = tl.where(kind == 1, polynomial, square)
        total = tl.zeros((TILE, TILE), tl.float32)
        total = add_product(total, left, right, rows, columns, N, TILE_K, PRECISION)
        total *= beta
        if kind > 0:
            # In fp32: a number times a bf16 tile would be rounded to bf16.
            total += alpha * tile_of(left, rows, columns, N).to(tl.float32)

        if product == 0:
            part = tl.sum(total * total) * tl.where(row_tile == column_tile, 1.0, 2.0)
            tl.store(squares + block * tiles + tile, part)
        value = total.to(matrices.dtype.element_ty)
        mirrored = tl.trans(value)
        mirrored = tl.where(kind == 2, -mirrored, mirrored)
        if row_tile == column_tile:
            value = (value + mirrored) * 0.5
        tl.store(target + rows[:, None] * N + columns[None, :], value)
        if row_tile != column_tile:
            tl.store(target + columns[:, None] * N + rows[None, :], mirrored)
        tl.debug_barrier()  # all threads of the program have written
        tl.atomic_add(ready + block, 1, sem="release")


class Tiling(NamedTuple):
    """Sizes of a product: a tile of the result, a step of the sum, warps, steps in flight."""

    tile: int
    tile_k: int
    warps: int
    stages: int
    programs: int
    """Of a multiprocessor."""
    registers: int | None
    """Of a thread, at most."""


WHOLE = 64
"""b up to which a block is one program's."""


def tiling_of(block_size: int) -> Tiling:
    """Large tiles read fewer bytes, small ones waste less of a half and of the padding."""

    def work(tile: int) -> int:
        side = -(-block_size // tile)
        return side * (side + 1) // 2 * tile**2 * side * tile

    # By elements multiplied, small tiles take half as long again.
    if 1.5 * work(64) < work(128):
        return Tiling(64, 64, 4, 4, programs=3, registers=None)
    return Tiling(128, 64, 8, 3, programs=2, registers=128)


def orthogonalize_skew(
    skew: Tensor,
    block_size: int,
    *,
    tiling: Tiling | None = None,
    operands: torch.dtype = torch.bfloat16,
    coefficients: Coefficients = COEFFICIENTS,
) -> Tensor:
    """`ops.orthogonalize_skew` of fp32 blocks; at least one, b ≥ 2.

    Args:
        skew, block_size: those of the op.
        tiling: of what is computed by tiles; by default that is done beyond `WHOLE`.
        operands: what products take.
        coefficients: of the steps.
    """
    skew = skew.contiguous()
    norm = torch.linalg.vector_norm(skew, dim=1)
    if tiling is None and block_size <= WHOLE:
        return whole_blocks(skew, norm, block_size, operands, coefficients)
    tiling = tiling or tiling_of(block_size)
    out = torch.empty_like(skew)
    matrices = unpacked(skew, block_size, tiling, operands)
    result = by_tiles(matrices, norm, tiling, coefficients)
    moved = constants_of_tiles(matrices, block_size)
    launch(pack_kernel, _programs(result, moved["TILE"]), result, out, **moved)
    return out


def whole_blocks(
    skew: Tensor,
    norm: Tensor,
    block_size: int,
    operands: torch.dtype = torch.bfloat16,
    coefficients: Coefficients = COEFFICIENTS,
) -> Tensor:
    """msign of packed blocks of any dtype, by their norms: fp32 [blocks, b(b−1)/2]."""
    out = torch.empty_like(skew, dtype=torch.float32)
    side = power_of_two(block_size, 16, 128)
    launch(
        whole_blocks_kernel,
        *(skew.shape[0], skew, norm, out),
        B=block_size,
        N=side,
        OPERANDS=getattr(tl, str(operands).removeprefix("torch.")),
        num_warps={16: 1, 32: 1, 64: 4}.get(side, 8),
        num_stages=1,
        **_constants(coefficients),
    )
    return out


def unpacked(skew: Tensor, block_size: int, tiling: Tiling, dtype: torch.dtype) -> Tensor:
    """[3, blocks, N, N] with N a multiple of the tile: the first are the matrices, padded."""
    padded = -(-block_size // tiling.tile) * tiling.tile
    matrices = skew.new_empty(3, skew.shape[0], padded, padded, dtype=dtype)
    moved = constants_of_tiles(matrices, block_size)
    given = skew, matrices, matrices, skew.shape[0]
    launch(unpack_kernel, _programs(matrices[0], moved["TILE"]), *given, HAS_REST=False, **moved)
    return matrices


def by_tiles(
    matrices: Tensor, norm: Tensor, tiling: Tiling, coefficients: Coefficients = COEFFICIENTS
) -> Tensor:
    """The steps of `tiles_kernel`.

    Args:
        matrices: as `unpacked` makes them; overwritten.
        norm: fp32 [blocks]: of the packed entries.
        coefficients: of the steps.

    Returns:
        The result [blocks, N, N], of the matrices' memory; skew but for rounding.
    """
    _, blocks, padded, _ = matrices.shape
    side = padded // tiling.tile
    tiles = side * (side + 1) // 2
    launch(
        tiles_kernel,
        min(MULTIPROCESSORS * tiling.programs, blocks * tiles),
        *(matrices, norm, norm.new_empty(blocks, tiles)),
        *(torch.zeros(1 + blocks, dtype=torch.int32, device=norm.device), blocks),
        N=padded,
        TILE=tiling.tile,
        TILE_K=tiling.tile_k,
        PARTS=power_of_two(tiles, 1, 1 << 20),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **_constants(coefficients),
        **({} if tiling.registers is None else {"maxnreg": tiling.registers}),
    )
    return matrices[len(coefficients) % 2]


def _constants(coefficients: Coefficients) -> dict[str, Any]:
    return {
        "COEFFICIENTS": tuple(coefficients),
        "BOUND": BOUND,
        "SMALLEST": SMALLEST,
        "PRECISION": input_precision(),
    }


def constants_of_tiles(matrices: Tensor, block_size: int) -> dict[str, int]:
    """Constants of a launch that reads or writes all tiles of the matrices."""
    padded = matrices.shape[-1]
    tile = math.gcd(padded, 64)
    return {"B": block_size, "N": padded, "TILE": tile, "num_warps": 4, "num_stages": 1}


def _programs(matrix: Tensor, tile: int) -> int:
    return matrix.shape[0] * (matrix.shape[1] // tile) ** 2
