"""Triton kernels of the Cayley-Neumann expansion, batched over blocks.

Q is unpacked once, by a bandwidth-bound kernel. Every product after it has the form ``L Rᵀ`` of two
row-major matrices, because Q is skew, its even powers are symmetric and all of them commute: both
operands are read along their rows, the order in which tensor cores take 32-bit operands. Of a
symmetric or skew result only the tiles on and above the diagonal are computed, and mirrored.

Forward of order k, with the coefficients c of `polynomial.coefficients`: a Horner scheme in
``P = Q²``, the sums fused into the products' epilogues. For k = 3, three launches::

    1:  Q                                   unpacked
    2:  P = −Q Qᵀ,  H = 2Q + P              mirrored
    3:  G = H Pᵀ + I + 2Q + 2P

Backward of order 3 (`polynomial.polynomial_backward`; S and A twice the symmetric and skew part of
the incoming gradient), four launches of four products::

    1:  Q unpacked,  S,  A
    2:  Y = S Qᵀ − Q Sᵀ + 2A                mirrored
    3:  M = Y Qᵀ + Q Aᵀ + 2S
    4:  result = M Qᵀ − Q Mᵀ + 2A           above the diagonal, written packed

In memory beside the result: Q, P and H (forward); Q, S, A, Y and M (backward). They are padded with
zeros to N×N, whole tiles, so that rows are aligned and no product needs a mask.

With `narrow`, order 3 and blocks that fit, the kernels of `cayley_low_precision` run instead.
``G − I`` of larger blocks in bf16 (`delta`) is the forward with bf16 in memory, where the term of
first order keeps what rounding Q took off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels import cayley_low_precision
from poetx_compile.ops.kernels.common import input_precision, launch, power_of_two
from poetx_compile.ops.kernels.low_precision import low_precision_applies
from poetx_compile.ops.kernels.tiles import (
    above_diagonal,
    add_product,
    identity,
    packed_index,
    position,
    store_tile,
    tile_of,
)
from poetx_compile.ops.kernels.unpack import unpack_and_split_kernel, unpack_kernel
from poetx_compile.ops.polynomial import coefficients


@triton.jit
def square_kernel(
    q,  # f32[blocks, N, N]
    p_out,  # f32[blocks, N, N]
    h_out,  # f32[blocks, WIDTH, WIDTH]
    N: tl.constexpr,
    WIDTH: tl.constexpr,  # N, or the block size where H is the result
    OUT_I: tl.constexpr,
    OUT_Q: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P = Q Q and H = OUT_I I + OUT_Q Q + P."""
    block, row_tile, column_tile = position(N, TILE)
    if row_tile > column_tile:
        return
    q += block * (N * N)
    p_out += block * (N * N)
    h_out += block * (WIDTH * WIDTH)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    p = tl.zeros((TILE, TILE), tl.float32)
    p = -add_product(p, q, q, rows, columns, N, TILE_K, PRECISION)
    odd = OUT_Q * tile_of(q, rows, columns, N)
    even = p + OUT_I * identity(rows, columns)
    store_tile(p_out, rows, columns, p, N)
    store_tile(h_out, rows, columns, even + odd, WIDTH)
    if row_tile != column_tile:
        store_tile(p_out, columns, rows, tl.trans(p), N)
        store_tile(h_out, columns, rows, tl.trans(even - odd), WIDTH)


@triton.jit
def horner_step_kernel(
    q,  # f32[blocks, N, N]
    p,  # f32[blocks, N, N]
    h,  # f32[blocks, N, N]: a polynomial of Q
    rest,  # f32[blocks, N, N]: what is missing in q; HAS_REST = False: not read
    out,  # f32[blocks, WIDTH, WIDTH]
    N: tl.constexpr,
    WIDTH: tl.constexpr,  # N, or the block size where this step is the last
    OUT_I: tl.constexpr,
    OUT_Q: tl.constexpr,
    OUT_P: tl.constexpr,
    HAS_REST: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = H P + OUT_I I + OUT_Q Q + OUT_P P."""
    block, row_tile, column_tile = position(N, TILE)
    q += block * (N * N)
    p += block * (N * N)
    h += block * (N * N)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    result = tl.zeros((TILE, TILE), tl.float32)
    result = add_product(result, h, p, rows, columns, N, TILE_K, PRECISION)
    result += OUT_I * identity(rows, columns)
    result += OUT_Q * tile_of(q, rows, columns, N)
    if HAS_REST:
        result += OUT_Q * tile_of(rest + block * (N * N), rows, columns, N)
    if OUT_P != 0:
        result += OUT_P * tile_of(p, rows, columns, N)
    store_tile(out + block * (WIDTH * WIDTH), rows, columns, result, WIDTH)


@triton.jit
def backward_product_kernel(
    x,  # f32[blocks, N, N]
    y,  # f32[blocks, N, N], not read where SKEW
    q,  # f32[blocks, N, N]
    addend,  # f32[blocks, N, N]
    out,  # f32[blocks, N, N], or f32[blocks, B(B-1)/2] where PACKED
    B: tl.constexpr,
    N: tl.constexpr,
    SKEW: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = X Q^T + Q Y^T + 2 addend; where SKEW, X Q^T - Q X^T + 2 addend, which is skew."""
    block, row_tile, column_tile = position(N, TILE)
    if SKEW and row_tile > column_tile:
        return
    x += block * (N * N)
    y += block * (N * N)
    q += block * (N * N)
    addend += block * (N * N)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    result = tl.zeros((TILE, TILE), tl.float32)
    result = add_product(result, x, q, rows, columns, N, TILE_K, PRECISION)
    if SKEW:
        if row_tile == column_tile:
            result -= tl.trans(result)
        else:
            result = -add_product(-result, q, x, rows, columns, N, TILE_K, PRECISION)
    else:
        result = add_product(result, q, y, rows, columns, N, TILE_K, PRECISION)
    result += 2 * tile_of(addend, rows, columns, N)
    if PACKED:
        out += block * (B * (B - 1) // 2)
        stored = above_diagonal(rows, columns, B)
        tl.store(out + packed_index(rows, columns, B), result, mask=stored)
    else:
        out += block * (N * N)
        store_tile(out, rows, columns, result, N)
        if SKEW and row_tile != column_tile:
            store_tile(out, columns, rows, -tl.trans(result), N)


@dataclass(frozen=True)
class _Tiling:
    """Tiles of a block, and the constants of the launches.

    64×64 tiles give 16 programs a block at b = 256 (10 where the result is mirrored): a batch of 16
    blocks fills a large GPU. At 256 blocks, 128×64 and 128×128 tiles measured within 5 % of them.
    """

    block_size: int
    largest: int = 64

    @property
    def tile(self) -> int:
        return power_of_two(self.block_size, 16, self.largest)

    @property
    def padded(self) -> int:
        """N: whole tiles."""
        return -(-self.block_size // self.tile) * self.tile

    def programs(self, blocks: Any) -> Any:
        return blocks * (self.padded // self.tile) ** 2

    def unpackers(self, blocks: Any) -> Any:
        return blocks * (self.padded // min(self.tile, 64)) ** 2

    def unpacking(self) -> dict[str, Any]:
        return {
            "B": self.block_size,
            "N": self.padded,
            "TILE": min(self.tile, 64),
            "num_warps": 4,
            "num_stages": 1,
        }

    def product(self) -> dict[str, Any]:
        return {
            "N": self.padded,
            "TILE": self.tile,
            "TILE_K": 64 if self.tile == 128 else min(self.tile, 32),
            "PRECISION": input_precision(),
            "num_warps": {16: 1, 128: 8}.get(self.tile, 4),
            "num_stages": 3,
        }


def cayley_neumann(skew: Tensor, block_size: int, order: int, narrow: bool = False) -> Tensor:
    """`ops.cayley_neumann` of fp32 blocks: 1 + ⌈(k+1)/2⌉ launches, at least two."""
    skew = skew.contiguous()
    if narrow and low_precision_applies(block_size, order):
        return cayley_low_precision.cayley_neumann(skew, block_size)
    blocks = skew.shape[0]
    tiling = _Tiling(block_size)
    programs, padded, constants = tiling.programs(blocks), tiling.padded, tiling.product()
    c = coefficients(order)
    degree = order + 1
    only_square = degree == 2
    width = block_size if only_square else padded
    q, p = (skew.new_empty(blocks, padded, padded) for _ in range(2))
    h = skew.new_empty(blocks, width, width)
    launch(unpack_kernel, programs, skew, q, q, blocks, HAS_REST=False, **tiling.unpacking())
    # For k = 1 this is the result; for other odd k it is the innermost c_k Q + P.
    weights = {"OUT_I": c[0] if only_square else 0.0, "OUT_Q": c[order], "WIDTH": width}
    launch(square_kernel, programs, q, p, h, **weights, **constants)
    if only_square:
        return h
    # The innermost factor of even k is Q alone. Its identity part goes into the epilogue as c₂ₜ P,
    # so that no product with I is rounded.
    inner = h if degree % 2 == 0 else q
    top = -(-degree // 2) - 1
    out_p = c[2 * top]
    for j in reversed(range(top)):
        width = padded if j > 0 else block_size
        out = skew.new_empty(blocks, width, width)
        weights = {"OUT_I": c[2 * j], "OUT_Q": c[2 * j + 1], "OUT_P": out_p, "WIDTH": width}
        weights["HAS_REST"] = False
        launch(horner_step_kernel, programs, q, p, inner, q, out, **weights, **constants)
        inner, out_p = out, 0.0
    return inner


def delta(skew: Tensor, block_size: int, dtype: torch.dtype, flipped: int) -> Tensor:
    """``G − I`` of order 3 of contiguous fp32 blocks, the last `flipped` ones transposed.

    Args:
        skew: f32[blocks, b(b−1)/2], at least one block, b ≥ 2.
        block_size: b.
        dtype: of the result. bf16: three launches with bf16 operands, two where a block fits into
            shared memory; fp32: as exact as `cayley_neumann`.
        flipped: as for `ops.rotation_delta`.
    """
    first_negated = skew.shape[0] - flipped
    if dtype == torch.float32:
        turned = torch.cat([skew[:first_negated], -skew[first_negated:]])
        rotation = cayley_neumann(turned, block_size, 3)
        rotation.diagonal(dim1=1, dim2=2).sub_(1)
        return rotation
    if low_precision_applies(block_size, 3):
        return cayley_low_precision.rotation_delta(skew, block_size, 3, dtype, flipped)
    blocks, tiling = skew.shape[0], _Tiling(block_size, 128)
    programs, padded, constants = tiling.programs(blocks), tiling.padded, tiling.product()
    q, rest, p, h = (skew.new_empty(blocks, padded, padded, dtype=dtype) for _ in range(4))
    out = skew.new_empty(blocks, block_size, block_size, dtype=dtype)
    unpacking = {"HAS_REST": True, **tiling.unpacking()}
    launch(unpack_kernel, tiling.unpackers(blocks), skew, q, rest, first_negated, **unpacking)
    weights = {"OUT_I": 0.0, "OUT_Q": 2.0}
    launch(square_kernel, programs, q, p, h, WIDTH=padded, **weights, **constants)
    weights |= {"OUT_P": 2.0, "WIDTH": block_size, "HAS_REST": True}
    launch(horner_step_kernel, programs, q, p, h, rest, out, **weights, **constants)
    return out


def cayley_neumann_backward(
    grad: Tensor, skew: Tensor, block_size: int, order: int, narrow: bool = False
) -> Tensor:
    """`ops.cayley_neumann_backward` of fp32 blocks of order 3: four launches."""
    assert order == 3, order
    grad, skew = grad.contiguous(), skew.contiguous()
    if narrow and low_precision_applies(block_size, order):
        return cayley_low_precision.cayley_neumann_backward(grad, skew, block_size)
    blocks = skew.shape[0]
    tiling = _Tiling(block_size)
    programs, padded = tiling.programs(blocks), tiling.padded
    q, s, a, y, m = (skew.new_empty(blocks, padded, padded) for _ in range(5))
    out = torch.empty_like(skew)
    launch(unpack_and_split_kernel, programs, skew, grad, q, s, a, blocks, **tiling.unpacking())

    def product(x: Tensor, other: Tensor, addend: Tensor, result: Tensor, **form: bool) -> None:
        constants = {"B": block_size, **form, **tiling.product()}
        launch(backward_product_kernel, programs, x, other, q, addend, result, **constants)

    product(s, s, a, y, SKEW=True, PACKED=False)
    product(y, a, s, m, SKEW=False, PACKED=False)
    product(m, m, a, out, SKEW=True, PACKED=True)
    return out
