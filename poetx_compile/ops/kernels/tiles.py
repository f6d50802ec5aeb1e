"""What the Triton kernels of b×b blocks share: tiles of matrices and the packed index.

Matrices of a block are row-major; N is the side padded to whole tiles, B the block size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(matrix, rows, columns, N: tl.constexpr):
    """matrix[rows, columns] of one padded block."""
    return tl.load(matrix + rows[:, None] * N + columns[None, :])


@triton.jit
def masked_tile(matrix, rows, columns, B: tl.constexpr):
    """matrix[rows, columns] of one block, zero outside."""
    inside = (rows[:, None] < B) & (columns[None, :] < B)
    return tl.load(matrix + rows[:, None] * B + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(matrix, rows, columns, value, WIDTH: tl.constexpr):
    """Write the part that lies in the matrix."""
    inside = (rows[:, None] < WIDTH) & (columns[None, :] < WIDTH)
    tl.store(matrix + rows[:, None] * WIDTH + columns[None, :], value, mask=inside)


@triton.jit
def identity(rows, columns):
    return tl.where(rows[:, None] == columns[None, :], 1.0, 0.0)


@triton.jit
def packed_index(rows, columns, B: tl.constexpr):
    r = rows[:, None]
    return r * (2 * B - r - 1) // 2 + (columns[None, :] - r - 1)


@triton.jit
def above_diagonal(rows, columns, B: tl.constexpr):
    return (rows[:, None] < columns[None, :]) & (columns[None, :] < B)


@triton.jit
def sign_of(block, first_negated):
    """-1 of the blocks from number `first_negated` on, which are transposed."""
    return tl.where(block < first_negated, 1.0, -1.0)


@triton.jit
def position(N: tl.constexpr, TILE: tl.constexpr, HIGH: tl.constexpr = 1):
    """(block, row tile, column tile) of this program; the tiles of a block run side by side.

    Tiles are TILE columns wide and HIGH times as many rows high.
    """
    tiles: tl.constexpr = N // TILE
    of_block: tl.constexpr = tiles * (tiles // HIGH)
    program = tl.program_id(0)
    tile = program % of_block
    return (program // of_block).to(tl.int64), tile // tiles, tile % tiles


@triton.jit
def add_product(
    total,
    left,
    right,
    rows,
    columns,
    N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + (left right^T)[rows, columns]."""
    for start in range(0, N, TILE_K):
        ks = start + tl.arange(0, TILE_K)
        left_tile = tile_of(left, rows, ks, N)
        right_tile = tl.trans(tile_of(right, columns, ks, N))
        total = tl.dot(left_tile, right_tile, total, input_precision=PRECISION)
    return total
