"""Triton kernels of the gradient of `rotation_tangent` for order 3, with 2-byte operands.

Given ``P = ∂L/∂E`` of an infinitesimal rotation ``G(Q') = (I + E) G(Q)``, the gradient of the skew
entries of Q. Write x and y for the products by −Q from the left and right, S and A for ``P + Pᵀ``
and ``P − Pᵀ``, ``F = (I − Q)⁻¹`` and ``R = (I + Q)(I − Q)⁻¹``. Then ``∂L/∂G = P G⁻ᵀ`` and the
derivative of the polynomial (`polynomial.polynomial_backward`) combine to ::

    result = 2 Fᵀ A F − Rᵀ [(x + y)(x² + y²) S] R

up to θ⁴ of the second term, where θ is the largest spectral norm of Q. The first term is the
gradient of the exactly orthogonal Cayley transform. The second, of order θ³, is what G is short of
orthogonal by. So the symmetric part of P, which may be far the larger, enters at third order alone
and is not rounded into the result.

With ``J = (x + y) S = Tᵀ − T``, ``T = S Q``, and all series in Q, this is ``2A + K − Kᵀ`` with::

    1:  Q unpacked, S, A                    rounded
    2:  F₁ = F − I,  H = Q² R,  T           by row panels, Q in shared memory; five products
    3:  D = A F₁ − J H,  V = A + A F₁ − 2 J H
    4:  K = D + F₁ᵀ V,  result              above the diagonal, written packed

``F₁ = Q + Q² + Q³ + Q⁴``, short of the series by θ⁵: 0.1 % at the angle guard's 0.25. The leading
2A is added in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.cayley_low_precision import (
    packed_gradient,
    panel_position,
    split,
)
from poetx_compile.ops.kernels.common import launch
from poetx_compile.ops.kernels.low_precision import LowPrecisionTiling
from poetx_compile.ops.kernels.tiles import position, store_tile, tile_of


@triton.jit
def series_kernel(
    q,  # [blocks, N, N], 2-byte elements, like all the others
    s,  # [blocks, N, N]
    f_out,  # [blocks, N, N]
    h_out,  # [blocks, N, N]
    t_out,  # [blocks, N, N]
    N: tl.constexpr,
    PANEL: tl.constexpr,
):
    """F1 = Q + Q^2 + Q^3 + Q^4, H = (2 F1 - Q) Q and T = S Q on a panel of rows."""
    block, rows = panel_position(N, PANEL)
    base = block * (N * N)
    q += base
    columns = tl.arange(0, N)
    # The panels before the matrix, so that none of them is waited for alone.
    symmetric = tile_of(s + base, rows, columns, N)
    panel = tile_of(q, rows, columns, N).to(tl.float32)
    resident = tile_of(q, columns, columns, N)
    store_tile(t_out + base, rows, columns, tl.dot(symmetric, resident), N)
    total = tl.zeros((PANEL, N), tl.float32)
    for _ in range(3):  # not unrolled: see `cayley_low_precision.rotation_kernel`
        total = tl.dot((panel + total).to(q.dtype.element_ty), resident)
    store_tile(f_out + base, rows, columns, panel + total, N)
    product = tl.dot((panel + 2 * total).to(q.dtype.element_ty), resident)
    store_tile(h_out + base, rows, columns, product, N)


@triton.jit
def conjugate_right_kernel(
    a,  # [blocks, N, N], 2-byte elements, like all the others
    t,  # [blocks, N, N]
    f,  # [blocks, N, N]
    h,  # [blocks, N, N]
    d_out,  # [blocks, N, N]
    v_out,  # [blocks, N, N]
    N: tl.constexpr,
    HIGH: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """D = A F1 - J H and V = A + A F1 - 2 J H with J = T^T - T.

    J is not formed: its two products read T from shared memory, as it lies there and transposed,
    which costs a product more and spares the threads a pass over T between loads and products.
    """
    block, row_tile, column_tile = position(N, TILE, HIGH)
    base = block * (N * N)
    a += base
    t += base
    f += base
    h += base
    rows = row_tile * (HIGH * TILE) + tl.arange(0, HIGH * TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    leading = tile_of(a, rows, columns, N)
    a_f = tl.zeros((HIGH * TILE, TILE), tl.float32)
    tt_h = tl.zeros((HIGH * TILE, TILE), tl.float32)
    t_h = tl.zeros((HIGH * TILE, TILE), tl.float32)
    for start in range(0, N, TILE_K):
        ks = start + tl.arange(0, TILE_K)
        a_f = tl.dot(tile_of(a, rows, ks, N), tile_of(f, ks, columns, N), a_f)
        right = tile_of(h, ks, columns, N)
        tt_h = tl.dot(tl.trans(tile_of(t, ks, rows, N)), right, tt_h)
        t_h = tl.dot(tile_of(t, rows, ks, N), right, t_h)
    j_h = tt_h - t_h
    store_tile(d_out + base, rows, columns, a_f - j_h, N)
    store_tile(v_out + base, rows, columns, leading.to(tl.float32) + a_f - 2 * j_h, N)


def rotation_tangent_backward(
    grad: Tensor,
    skew: Tensor,
    block_size: int,
    order: int | None,
    narrow: bool,
    flipped: int,
    *,
    tiling: LowPrecisionTiling | None = None,
    operands: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`ops.rotation_tangent_backward` of fp32 blocks, order 3 and `narrow`; four launches.

    Args:
        grad, skew, block_size, order, narrow, flipped: those of the op.
        tiling: default that of the block size.
        operands: what products take. bf16 keeps the range of fp32.
    """
    assert order == 3, order
    assert narrow
    grad, skew = grad.contiguous(), skew.contiguous()
    tiling = tiling or LowPrecisionTiling(block_size)
    blocks = skew.shape[0]
    first_negated = blocks - flipped
    q, s, a = split(grad, skew, first_negated, tiling, operands)
    f, h, t, d, v = (torch.empty_like(q) for _ in range(5))
    launch(series_kernel, tiling.panels(blocks), q, s, f, h, t, **tiling.chain())
    programs, constants = tiling.tiles(blocks, tiling.high), tiling.product()
    launch(conjugate_right_kernel, programs, a, t, f, h, d, v, HIGH=tiling.high, **constants)
    return packed_gradient(f, v, d, grad, first_negated, tiling)
