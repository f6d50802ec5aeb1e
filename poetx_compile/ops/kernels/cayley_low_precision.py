"""Triton kernels of the Cayley-Neumann expansion of order 3 with 2-byte operands.

For results that are rounded to bf16 or fp16 where they are used. Operands of products are rounded
to bf16, sums are fp32, and the term of first order keeps more: ``2Q`` of the rotation the 16 bits
of two bf16 numbers, ``2(∂L/∂G − ∂L/∂Gᵀ)`` of the gradient all of fp32. Rounding Q there as well
would turn every plane by a slightly other angle, an error as large as the rounding of the result;
in the products, which are of second order, it is smaller by the angle.

Forward, two launches. Q (128 KiB of bf16 at b = 256) stays in the shared memory of a program while
a panel of rows goes through the three products of Horner's rule::

    1:  Q                                   unpacked; rounded, and what that took off
    2:  G = I + 2Q + ((Q Q + 2Q) Q + 2Q) Q  by row panels, read from and written to memory once

`rotation_delta` is the same without the I, written in 2 bytes.

Backward, four launches of four products. With x and y the products by −Q from the left and right,
and S and A twice the symmetric and skew part of the incoming gradient, the gradient is
``2A + 2(x² + xy + y²) A + (x + y)(2 + x² + y²) S = 2A + K − Kᵀ`` with
``K = x [2S + x(A + B) + y B]``, ``B = A + x S``::

    1:  Q unpacked, S, A                    rounded
    2:  B = A − Q S
    3:  M = 2S − Q (A + B) − B Q
    4:  result = 2A + Qᵀ M − Mᵀ Q           above the diagonal, written packed

Matrices are padded with zeros to N×N, a power of two, so that rows are aligned, N can be the side
of a tile, and no product needs a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import launch
from poetx_compile.ops.kernels.low_precision import LowPrecisionTiling
from poetx_compile.ops.kernels.tiles import (
    above_diagonal,
    identity,
    masked_tile,
    packed_index,
    position,
    sign_of,
    store_tile,
    tile_of,
)
from poetx_compile.ops.kernels.unpack import unpack_and_split_kernel, unpack_kernel


@triton.jit
def panel_position(N: tl.constexpr, PANEL: tl.constexpr):
    """(block, rows) of this program; the panels of a block run side by side."""
    program = tl.program_id(0)
    rows = (program % (N // PANEL)) * PANEL + tl.arange(0, PANEL)
    return (program // (N // PANEL)).to(tl.int64), rows


@triton.jit
def rotation_kernel(
    q,  # [blocks, N, N], 2-byte elements
    rest,  # [blocks, N, N], 2-byte elements: what is missing in q
    out,  # f32[blocks, B, B]; 2-byte elements where DELTA
    B: tl.constexpr,
    N: tl.constexpr,
    PANEL: tl.constexpr,
    DELTA: tl.constexpr,
):
    """out = I + 2Q + 2Q^2 + 2Q^3 + Q^4 on a panel of rows, without the I where DELTA."""
    block, rows = panel_position(N, PANEL)
    base = block * (N * N)
    q += base
    columns = tl.arange(0, N)
    resident = tile_of(q, columns, columns, N)
    panel = tile_of(q, rows, columns, N).to(tl.float32)
    total = -panel
    # A loop, not unrolled: Triton splits the rows of a chain of products among all warps, which
    # leaves some of them idle where a panel is low; of one product it splits the columns too.
    for _ in range(3):
        total = tl.dot((total + 2 * panel).to(q.dtype.element_ty), resident)
    missing = tile_of(rest + base, rows, columns, N).to(tl.float32)
    result = total + 2 * (panel + missing)
    if not DELTA:
        result += identity(rows, columns)
    store_tile(out + block * (B * B), rows, columns, result, B)


@triton.jit
def backward_step_kernel(
    q,  # [blocks, N, N], 2-byte elements, like all the others
    right,  # [blocks, N, N]
    other,  # [blocks, N, N]
    addend,  # [blocks, N, N]
    out,  # [blocks, N, N]
    N: tl.constexpr,
    SECOND: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """out = addend - Q right; where SECOND, 2 addend - Q (right + other) - other Q."""
    block, row_tile, column_tile = position(N, TILE)
    base = block * (N * N)
    q += base
    right += base
    other += base
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, N, TILE_K):
        ks = start + tl.arange(0, TILE_K)
        factor = tile_of(right, ks, columns, N)
        if SECOND:
            factor = factor.to(tl.float32) + tile_of(other, ks, columns, N).to(tl.float32)
            factor = factor.to(q.dtype.element_ty)
            total = tl.dot(tile_of(other, rows, ks, N), tile_of(q, ks, columns, N), total)
        total = tl.dot(tile_of(q, rows, ks, N), factor, total)
    result = tile_of(addend + base, rows, columns, N).to(tl.float32)
    if SECOND:
        result = 2 * result
    store_tile(out + base, rows, columns, result - total, N)


@triton.jit(do_not_specialize=["first_negated"])
def packed_gradient_kernel(
    left,  # [blocks, N, N], 2-byte elements
    right,  # [blocks, N, N], 2-byte elements
    addend,  # [blocks, N, N], 2-byte elements; read where HAS_ADDEND
    grad,  # f32[blocks, B, B]
    out,  # f32[blocks, B(B-1)/2]
    first_negated,  # blocks from this number on are negated
    B: tl.constexpr,
    N: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """out = 2 (grad - grad^T) + K - K^T with K = addend + left^T right, packed."""
    block, row_tile, column_tile = position(N, TILE)
    if row_tile > column_tile:
        return
    base = block * (N * N)
    left += base
    right += base
    addend += base
    grad += block * (B * B)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    # What the end needs is on its way during the products.
    direct = masked_tile(grad, rows, columns, B)
    mirrored = masked_tile(grad, columns, rows, B)
    product = tl.zeros((TILE, TILE), tl.float32)
    transpose = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, N, TILE_K):
        ks = start + tl.arange(0, TILE_K)
        left_rows = tl.trans(tile_of(left, ks, rows, N))
        product = tl.dot(left_rows, tile_of(right, ks, columns, N), product)
        right_rows = tl.trans(tile_of(right, ks, rows, N))
        transpose = tl.dot(right_rows, tile_of(left, ks, columns, N), transpose)
    total = product - transpose
    if HAS_ADDEND:
        total += tile_of(addend, rows, columns, N).to(tl.float32)
        total -= tl.trans(tile_of(addend, columns, rows, N)).to(tl.float32)
    leading = direct - tl.trans(mirrored)
    out += block * (B * (B - 1) // 2)
    stored = above_diagonal(rows, columns, B)
    result = sign_of(block, first_negated) * (2 * leading + total)
    tl.store(out + packed_index(rows, columns, B), result, mask=stored)


def cayley_neumann(
    skew: Tensor,
    block_size: int,
    *,
    tiling: LowPrecisionTiling | None = None,
    operands: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Rotations of order 3 of contiguous fp32 `skew`; two launches.

    Args:
        skew: f32[blocks, b(b−1)/2], contiguous.
        block_size: b.
        tiling: default that of the block size.
        operands: what products take. bf16 keeps the range of fp32.

    Returns:
        f32[blocks, b, b].
    """
    out = skew.new_empty(skew.shape[0], block_size, block_size)
    _rotations(skew, out, skew.shape[0], False, tiling or LowPrecisionTiling(block_size), operands)
    return out


def rotation_delta(
    skew: Tensor,
    block_size: int,
    order: int | None,
    dtype: torch.dtype,
    flipped: int,
    *,
    tiling: LowPrecisionTiling | None = None,
    operands: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`ops.rotation_delta` of fp32 `skew`, order 3, to bf16 or fp16; two launches.

    Args:
        skew, block_size, order, dtype, flipped: those of the op.
        tiling: default that of the block size.
        operands: what products take. bf16 keeps the range of fp32.
    """
    assert order == 3, order
    skew = skew.contiguous()
    blocks = skew.shape[0]
    out = skew.new_empty(blocks, block_size, block_size, dtype=dtype)
    _rotations(
        skew, out, blocks - flipped, True, tiling or LowPrecisionTiling(block_size), operands
    )
    return out


def _rotations(
    skew: Tensor,
    out: Tensor,
    first_negated: int,
    delta: bool,
    tiling: LowPrecisionTiling,
    operands: torch.dtype,
) -> None:
    """Write the rotations of packed skew, or what they are without the identity, into `out`."""
    blocks, padded = skew.shape[0], tiling.padded
    q, rest = (skew.new_empty(blocks, padded, padded, dtype=operands) for _ in range(2))
    programs, b = tiling.unpacking_programs(blocks), tiling.block_size
    launch(
        unpack_kernel, programs, skew, q, rest, first_negated, HAS_REST=True, **tiling.unpacking()
    )
    constants = {"B": b, "DELTA": delta, **tiling.chain()}
    launch(rotation_kernel, tiling.panels(blocks), q, rest, out, **constants)


def cayley_neumann_backward(
    grad: Tensor,
    skew: Tensor,
    block_size: int,
    *,
    tiling: LowPrecisionTiling | None = None,
    operands: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Gradient of `cayley_neumann`: from f32[blocks, b, b] to f32[blocks, b(b−1)/2]; four launches.

    Arguments as for `cayley_neumann`; both tensors are contiguous.
    """
    tiling = tiling or LowPrecisionTiling(block_size)
    blocks = skew.shape[0]
    q, s, a = split(grad, skew, blocks, tiling, operands)
    b_out, m_out = torch.empty_like(q), torch.empty_like(q)
    programs, constants = tiling.tiles(blocks), tiling.product()
    launch(backward_step_kernel, programs, q, s, s, a, b_out, SECOND=False, **constants)
    launch(backward_step_kernel, programs, q, a, b_out, s, m_out, SECOND=True, **constants)
    return packed_gradient(q, m_out, None, grad, blocks, tiling)


def split(
    grad: Tensor,
    skew: Tensor,
    first_negated: int,
    tiling: LowPrecisionTiling,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, ``S = grad + gradᵀ`` and ``A = grad − gradᵀ``; padded, of `operands`.

    Blocks of Q from number `first_negated` on are negated.
    """
    blocks, padded = skew.shape[0], tiling.padded
    q, s, a = (skew.new_empty(blocks, padded, padded, dtype=operands) for _ in range(3))
    programs = tiling.unpacking_programs(blocks)
    launch(
        unpack_and_split_kernel, programs, skew, grad, q, s, a, first_negated, **tiling.unpacking()
    )
    return q, s, a


def packed_gradient(
    left: Tensor,
    right: Tensor,
    addend: Tensor | None,
    grad: Tensor,
    first_negated: int,
    tiling: LowPrecisionTiling,
) -> Tensor:
    """``2 (grad − gradᵀ) + K − Kᵀ``, ``K = addend + leftᵀ right``, above the diagonal.

    Blocks from number `first_negated` on are negated.
    """
    blocks, b = grad.shape[0], tiling.block_size
    out = grad.new_empty(blocks, b * (b - 1) // 2)
    launch(
        packed_gradient_kernel,
        tiling.tiles(blocks),
        left,
        right,
        left if addend is None else addend,
        grad,
        out,
        first_negated,
        B=b,
        HAS_ADDEND=addend is not None,
        **tiling.product(),
    )
    return out
