"""Triton kernels of the Cayley-Neumann expansion, batched over blocks, from packed storage.

Forward of order k, with ``P = Q²`` and the coefficients c of `polynomial.coefficients`: a
Horner scheme in P, one launch a product, the sums fused into the products' loads and epilogues::

    k = 3:   P = Q Q;   G = P (2Q + P) + I + 2Q + 2P                  2 launches

Backward of order 3 (`polynomial.polynomial_backward`; q = −Q, S and A twice the symmetric and skew
part of the incoming gradient), three launches of four products::

    1:  N = S q + A        E = A q + 2S
    2:  M = (N − Nᵀ) q + Eᵀ
    3:  result = M q + q Mᵀ + 2A,  above the diagonal, written packed

No intermediate but P (forward) and N, E, M (backward) exists in memory; Q never does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import input_precision, launch, power_of_two
from poetx_compile.ops.polynomial import coefficients


@triton.jit
def _skew_tile(packed, rows, columns, B: tl.constexpr):
    """Q[rows, columns] of one block: the index arithmetic is part of the load."""
    r = rows[:, None]
    c = columns[None, :]
    low = tl.minimum(r, c)
    high = tl.maximum(r, c)
    index = low * (2 * B - low - 1) // 2 + (high - low - 1)
    stored = (r != c) & (high < B)
    value = tl.load(packed + index, mask=stored, other=0.0)
    return tl.where(r < c, value, -value)


@triton.jit
def _tile(matrix, rows, columns, B: tl.constexpr):
    """matrix[rows, columns] of one block, zero outside."""
    inside = (rows[:, None] < B) & (columns[None, :] < B)
    return tl.load(matrix + rows[:, None] * B + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_tile(matrix, rows, columns, value, B: tl.constexpr):
    inside = (rows[:, None] < B) & (columns[None, :] < B)
    tl.store(matrix + rows[:, None] * B + columns[None, :], value, mask=inside)


@triton.jit
def _position(B: tl.constexpr, TILE: tl.constexpr):
    """(block, row tile, column tile) of this program; row tiles of a block run side by side."""
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    program = tl.program_id(0)
    tile = program % (tiles * tiles)
    return (program // (tiles * tiles)).to(tl.int64), tile // tiles, tile % tiles


@triton.jit
def horner_step_kernel(
    packed,  # f32[blocks, B(B-1)/2]
    power,  # f32[blocks, B, B]: P, read unless LEFT_IS_Q
    inner,  # f32[blocks, B, B]: H, read where RIGHT_H is not zero
    out,  # f32[blocks, B, B]
    B: tl.constexpr,
    LEFT_IS_Q: tl.constexpr,
    RIGHT_Q: tl.constexpr,
    RIGHT_H: tl.constexpr,
    OUT_I: tl.constexpr,
    OUT_Q: tl.constexpr,
    OUT_P: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = (Q or P) (RIGHT_Q Q + RIGHT_H H) + OUT_I I + OUT_Q Q + OUT_P P."""
    block, row_tile, column_tile = _position(B, TILE)
    packed += block * (B * (B - 1) // 2)
    power += block * (B * B)
    inner += block * (B * B)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    result = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, B, TILE_K):
        ks = start + tl.arange(0, TILE_K)
        if LEFT_IS_Q:  # noqa: SIM108 (a compile-time branch)
            left = _skew_tile(packed, rows, ks, B)
        else:
            left = _tile(power, rows, ks, B)
        right = tl.zeros((TILE_K, TILE), tl.float32)
        if RIGHT_Q != 0:
            right += RIGHT_Q * _skew_tile(packed, ks, columns, B)
        if RIGHT_H != 0:
            right += RIGHT_H * _tile(inner, ks, columns, B)
        result = tl.dot(left, right, result, input_precision=PRECISION)
    if OUT_I != 0:
        result += tl.where(rows[:, None] == columns[None, :], OUT_I, 0.0)
    if OUT_Q != 0:
        result += OUT_Q * _skew_tile(packed, rows, columns, B)
    if OUT_P != 0:
        result += OUT_P * _tile(power, rows, columns, B)
    _store_tile(out + block * (B * B), rows, columns, result, B)


@triton.jit
def backward_first_kernel(
    grad,  # f32[blocks, B, B]
    packed,  # f32[blocks, B(B-1)/2]
    n_out,  # f32[blocks, B, B]
    e_out,  # f32[blocks, B, B]
    B: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """N = S q + A and E = A q + 2S, with S = grad + grad^T, A = grad - grad^T, q = -Q."""
    block, row_tile, column_tile = _position(B, TILE)
    packed += block * (B * (B - 1) // 2)
    grad += block * (B * B)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    n = tl.zeros((TILE, TILE), tl.float32)
    e = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, B, TILE_K):
        ks = start + tl.arange(0, TILE_K)
        direct = _tile(grad, rows, ks, B)
        flipped = tl.trans(_tile(grad, ks, rows, B))
        q = -_skew_tile(packed, ks, columns, B)
        n = tl.dot(direct + flipped, q, n, input_precision=PRECISION)
        e = tl.dot(direct - flipped, q, e, input_precision=PRECISION)
    direct = _tile(grad, rows, columns, B)
    flipped = tl.trans(_tile(grad, columns, rows, B))
    _store_tile(n_out + block * (B * B), rows, columns, n + direct - flipped, B)
    _store_tile(e_out + block * (B * B), rows, columns, e + 2 * (direct + flipped), B)


@triton.jit
def backward_second_kernel(
    n,  # f32[blocks, B, B]
    e,  # f32[blocks, B, B]
    packed,  # f32[blocks, B(B-1)/2]
    m_out,  # f32[blocks, B, B]
    B: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M = (N - N^T) q + E^T."""
    block, row_tile, column_tile = _position(B, TILE)
    packed += block * (B * (B - 1) // 2)
    n += block * (B * B)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    result = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, B, TILE_K):
        ks = start + tl.arange(0, TILE_K)
        left = _tile(n, rows, ks, B) - tl.trans(_tile(n, ks, rows, B))
        q = -_skew_tile(packed, ks, columns, B)
        result = tl.dot(left, q, result, input_precision=PRECISION)
    result += tl.trans(_tile(e + block * (B * B), columns, rows, B))
    _store_tile(m_out + block * (B * B), rows, columns, result, B)


@triton.jit
def backward_third_kernel(
    grad,  # f32[blocks, B, B]
    m,  # f32[blocks, B, B]
    packed,  # f32[blocks, B(B-1)/2]
    out,  # f32[blocks, B(B-1)/2]
    B: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Above the diagonal of M q + q M^T + 2A, packed."""
    block, row_tile, column_tile = _position(B, TILE)
    if row_tile > column_tile:
        return
    packed += block * (B * (B - 1) // 2)
    m += block * (B * B)
    grad += block * (B * B)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    result = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, B, TILE_K):
        ks = start + tl.arange(0, TILE_K)
        right = -_skew_tile(packed, ks, columns, B)
        result = tl.dot(_tile(m, rows, ks, B), right, result, input_precision=PRECISION)
        left = -_skew_tile(packed, rows, ks, B)
        flipped = tl.trans(_tile(m, columns, ks, B))
        result = tl.dot(left, flipped, result, input_precision=PRECISION)
    skew_part = _tile(grad, rows, columns, B) - tl.trans(_tile(grad, columns, rows, B))
    result += 2 * skew_part
    r = rows[:, None]
    c = columns[None, :]
    index = r * (2 * B - r - 1) // 2 + (c - r - 1)
    tl.store(out + block * (B * (B - 1) // 2) + index, result, mask=(r < c) & (c < B))


def _tiling(block_size: int) -> tuple[int, dict[str, Any]]:
    """Programs a block, and the constants of a launch.

    64×64 tiles keep the two accumulators of `backward_first_kernel` in registers and give 16
    programs a block at b = 256: a batch of eight blocks fills a large GPU.
    """
    tile = power_of_two(block_size, 16, 64)
    tiles = -(-block_size // tile)
    constants = {
        "B": block_size,
        "TILE": tile,
        "TILE_K": min(tile, 32),
        "PRECISION": input_precision(),
        "num_warps": 4 if tile >= 32 else 1,
        "num_stages": 2,
    }
    return tiles * tiles, constants


def cayley_neumann(skew: Tensor, block_size: int, order: int) -> Tensor:
    """`ops.cayley_neumann` of fp32 blocks: ⌈(k+1)/2⌉ launches, at least one."""
    skew = skew.contiguous()
    blocks = skew.shape[0]
    programs, constants = _tiling(block_size)
    c = coefficients(order)
    degree = order + 1

    def step(power: Tensor, inner: Tensor, **weights: Any) -> Tensor:
        out = skew.new_empty(blocks, block_size, block_size)
        launch(
            horner_step_kernel, programs * blocks, skew, power, inner, out, **weights, **constants
        )
        return out

    only_square = degree == 2
    power = step(
        skew,
        skew,
        LEFT_IS_Q=True,
        RIGHT_Q=1.0,
        RIGHT_H=0.0,
        OUT_I=c[0] if only_square else 0.0,
        OUT_Q=c[1] if only_square else 0.0,
        OUT_P=0.0,
    )
    if only_square:
        return power
    # G = … + P(c₂ₜ I + c₂ₜ₊₁ Q + c₂ₜ₊₂ P): the identity part of the innermost factor goes into the
    # epilogue as c₂ₜ P, so that no product with I is rounded.
    top = -(-degree // 2) - 1
    inner, right_q, right_h = power, c[2 * top + 1], 1.0 if degree % 2 == 0 else 0.0
    out_p = c[2 * top]
    for j in reversed(range(top)):
        inner = step(
            power,
            inner,
            LEFT_IS_Q=False,
            RIGHT_Q=right_q,
            RIGHT_H=right_h,
            OUT_I=c[2 * j],
            OUT_Q=c[2 * j + 1],
            OUT_P=out_p,
        )
        right_q, right_h, out_p = 0.0, 1.0, 0.0
    return inner


def cayley_neumann_backward(grad: Tensor, skew: Tensor, block_size: int, order: int) -> Tensor:
    """`ops.cayley_neumann_backward` of fp32 blocks of order 3: three launches."""
    assert order == 3, order
    grad, skew = grad.contiguous(), skew.contiguous()
    programs, constants = _tiling(block_size)
    programs = programs * skew.shape[0]
    n, e, m = (torch.empty_like(grad) for _ in range(3))
    out = torch.empty_like(skew)
    launch(backward_first_kernel, programs, grad, skew, n, e, **constants)
    launch(backward_second_kernel, programs, n, e, skew, m, **constants)
    launch(backward_third_kernel, programs, grad, m, skew, out, **constants)
    return out
