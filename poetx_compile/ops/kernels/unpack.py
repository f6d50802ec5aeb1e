"""Triton kernels that unpack skew blocks, and split a gradient into symmetric and skew part.

Bandwidth-bound. What they write is rounded to the dtype of the output: a rounded skew matrix is
skew, a rounded symmetric one symmetric.
"""

from __future__ import annotations

import triton
import triton.language as tl

from poetx_compile.ops.kernels.tiles import (
    above_diagonal,
    masked_tile,
    packed_index,
    position,
    sign_of,
    store_tile,
)


@triton.jit
def _packed_tile(packed, rows, columns, sign, B: tl.constexpr):
    """Q, times `sign`, on a tile, zero below the diagonal."""
    stored = above_diagonal(rows, columns, B)
    return sign * tl.load(packed + packed_index(rows, columns, B), mask=stored, other=0.0)


@triton.jit
def store_skew(out, rows, columns, on_diagonal, value, N: tl.constexpr):
    """Write a tile on or above the diagonal of a skew matrix, and its mirror image."""
    mirrored = -tl.trans(value)
    if on_diagonal:
        store_tile(out, rows, columns, value + mirrored, N)
    else:
        store_tile(out, rows, columns, value, N)
        store_tile(out, columns, rows, mirrored, N)


@triton.jit(do_not_specialize=["first_negated"], do_not_specialize_on_alignment=["packed"])
def unpack_kernel(
    packed,  # f32[blocks, B(B-1)/2]
    out,  # [blocks, N, N]
    rest_out,  # [blocks, N, N], like out; HAS_REST = False: not written
    first_negated,  # blocks from this number on are negated
    B: tl.constexpr,
    N: tl.constexpr,
    HAS_REST: tl.constexpr,
    TILE: tl.constexpr,
):
    """out = Q, rest_out = Q - out: what rounding took off."""
    block, row_tile, column_tile = position(N, TILE)
    if row_tile > column_tile:
        return
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    packed += block * (B * (B - 1) // 2)
    base = block * (N * N)
    on_diagonal = row_tile == column_tile
    value = _packed_tile(packed, rows, columns, sign_of(block, first_negated), B)
    store_skew(out + base, rows, columns, on_diagonal, value, N)
    if HAS_REST:
        rest = value - value.to(out.dtype.element_ty).to(tl.float32)
        store_skew(rest_out + base, rows, columns, on_diagonal, rest, N)


@triton.jit(do_not_specialize=["first_negated"], do_not_specialize_on_alignment=["packed"])
def unpack_and_split_kernel(
    packed,  # f32[blocks, B(B-1)/2]
    grad,  # f32[blocks, B, B]
    q_out,  # [blocks, N, N]
    s_out,  # [blocks, N, N]
    a_out,  # [blocks, N, N]
    first_negated,  # blocks of Q from this number on are negated
    B: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Q, S = grad + grad^T, A = grad - grad^T."""
    block, row_tile, column_tile = position(N, TILE)
    if row_tile > column_tile:
        return
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    packed += block * (B * (B - 1) // 2)
    grad += block * (B * B)
    q_out += block * (N * N)
    s_out += block * (N * N)
    a_out += block * (N * N)
    value = _packed_tile(packed, rows, columns, sign_of(block, first_negated), B)
    store_skew(q_out, rows, columns, row_tile == column_tile, value, N)
    direct = masked_tile(grad, rows, columns, B)
    transposed = tl.trans(masked_tile(grad, columns, rows, B))
    s = direct + transposed
    a = direct - transposed
    store_tile(s_out, rows, columns, s, N)
    store_tile(a_out, rows, columns, a, N)
    if row_tile != column_tile:
        store_tile(s_out, columns, rows, tl.trans(s), N)
        store_tile(a_out, columns, rows, -tl.trans(a), N)
