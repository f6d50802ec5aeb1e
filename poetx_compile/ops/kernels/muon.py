"""Kernel of a step of `POETXMuon`: momenta and directions of all rotations of a size at once.

What belongs to parameters is read and written where it is: a table says where. `orthogonalize`
makes the steps of the directions. Bandwidth-bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels import orthogonalize
from poetx_compile.ops.kernels.common import launch, power_of_two
from poetx_compile.ops.kernels.layers import apart, on_device
from poetx_compile.ops.kernels.rounding import hashed_bits, signed, stochastic_bf16
from poetx_compile.ops.muon_step import Part
from poetx_compile.ops.random import hash_key

GROUP = 256
"""Values that share a scale (`optim.momentum`)."""

CHUNK = 2048
"""Values of a program, at most."""

ALIGNED = 16
"""Elements by whose multiples the tensors of a launch lie apart where loads are whole vectors."""


@triton.jit(do_not_specialize=["parts", "turning", "key_low", "key_high"])
def momentum_kernel(
    gradient,  # [blocks, P]; of one of the parts
    momentum,  # [blocks, P]; of the first part
    scale,  # f32[blocks, groups]; of the first part; HAS_SCALE = False: not read
    table,  # int64[3, parts]: how far behind those the others' are
    places,  # int32[blocks, 2]: the part of a block, and which of its blocks it is
    direction,  # [turning, P]
    norms,  # f32[turning, chunks]: of the directions
    parts,
    turning,  # blocks, from the first on, whose directions are wanted
    mu,
    fresh,  # 1 − mu
    key_low,
    key_high,
    P: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NARROW: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,  # elements, of the table
):
    """m = m + (1 − mu)(g − m), rounded stochastically where NARROW; direction = g + mu (m − g)."""
    chunks: tl.constexpr = (P + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    block = program // chunks
    chunk = program % chunks
    part = tl.load(places + 2 * block)
    row = tl.load(places + 2 * block + 1).to(tl.int64)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    there = at < P
    gradient += tl.load(table + part) * UNIT + row * P
    momentum += tl.load(table + parts + part) * UNIT + row * P
    g = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
    stored = tl.load(momentum + at, mask=there, other=0).to(tl.float32)
    rows: tl.constexpr = CHUNK // GROUP
    groups: tl.constexpr = (P + GROUP - 1) // GROUP
    of_group = chunk * rows + tl.arange(0, rows)
    group_there = of_group < groups
    if HAS_SCALE:
        scale += tl.load(table + 2 * parts + part) + row * groups
        unit = tl.math.div_rn(tl.load(scale + of_group, mask=group_there, other=0.0), 127.0)
        stored = tl.reshape(tl.reshape(stored, (rows, GROUP)) * unit[:, None], (CHUNK,))
    m = stored + fresh * (g - stored)
    if block < turning:
        n = g + mu * (m - g)
        tl.store(direction + block.to(tl.int64) * P + at, n, mask=there)
        n = n.to(direction.dtype.element_ty).to(tl.float32)
        n = tl.where(there, n, 0.0)
        tl.store(norms + program, tl.sqrt(tl.sum(n * n)))
    if NARROW:
        noise = hashed_bits(at, key_low, key_high) & 0xFFFF
        if HAS_SCALE:
            size = tl.reshape(tl.abs(tl.where(there, m, 0.0)), (rows, GROUP))
            # The largest by its bits: NaN is not lost.
            largest = tl.max(size.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
            tl.store(scale + of_group, largest, mask=group_there)
            inverse = tl.where(largest > 0, tl.math.div_rn(127.0, largest), 0.0)
            scaled = tl.reshape(tl.reshape(m, (rows, GROUP)) * inverse[:, None], (CHUNK,))
            size = tl.floor(tl.abs(scaled) + noise.to(tl.float32) * 0.0000152587890625)
            size = tl.where(size == size, tl.minimum(size, 127.0), 0.0)
            m = tl.where(scaled < 0, -size, size)
        else:
            m = stochastic_bf16(m, noise)
    tl.store(momentum + at, m.to(momentum.dtype.element_ty), mask=there)


def muon_steps(
    parts: Sequence[Part],
    turning: int,
    block_size: int,
    mu: float,
    rate: float,
    seed: int,
    step: int,
    *,
    tiling: orthogonalize.Tiling | None = None,
    operands: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`ops.muon_step.muon_steps`.

    Args:
        parts, turning, block_size, mu, rate, seed, step: those of it.
        tiling, operands: of `orthogonalize.orthogonalize_skew`.
    """
    packed = block_size * (block_size - 1) // 2
    blocks = sum(part.gradient.shape[0] for part in parts[:turning])
    direction = parts[0].gradient.new_empty(blocks, packed, dtype=operands)
    norm = _update_momenta(parts, direction, mu, hash_key(seed, step))
    if not blocks:
        return direction.float()
    if tiling is None and block_size <= orthogonalize.WHOLE:
        return orthogonalize.whole_blocks(direction, norm, block_size, operands, factor=-rate)
    return orthogonalize.by_tiles(
        direction, norm, block_size, operands, factor=-rate, tiling=tiling
    )


def _update_momenta(parts: Sequence[Part], direction: Tensor, mu: float, key: int) -> Tensor:
    """Bring momenta up to date; directions of the first blocks, as there is room; their norms."""
    gradients, momenta, scales = zip(*parts, strict=True)
    turning, packed = direction.shape
    chunk = power_of_two(packed, GROUP, CHUNK)
    chunks = -(-packed // chunk)
    has_scale = scales[0] is not None
    # Which part is the first differs from step to step, but not whether one is aligned.
    gradient = next((g for g in gradients if g.data_ptr() % 16 == 0), gradients[0])
    offsets = apart(gradients, gradient), apart(momenta), apart(scales) if has_scale else ()
    unit = ALIGNED if math.gcd(ALIGNED, *offsets[0], *offsets[1]) == ALIGNED else 1
    table = *[o // unit for row in offsets[:2] for o in row], *offsets[2]
    counts = tuple([gradient.shape[0] for gradient in gradients])
    device = direction.device
    norms = direction.new_empty(turning, chunks, dtype=torch.float32)
    launch(
        momentum_kernel,
        sum(counts) * chunks,
        *(gradient, momenta[0], scales[0] if has_scale else momenta[0]),
        *(on_device(table, device), _places(counts, device)),
        *(direction, norms, len(parts), turning),
        *(float(mu), float(1 - mu), signed(key), signed(key >> 32)),
        P=packed,
        HAS_SCALE=has_scale,
        NARROW=momenta[0].dtype != torch.float32,
        CHUNK=chunk,
        GROUP=GROUP,
        UNIT=unit,
        num_warps=max(1, chunk // 512),
        num_stages=1,
    )
    return torch.linalg.vector_norm(norms, dim=1)


@functools.lru_cache(maxsize=256)
def _places(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [blocks, 2]: the part of each block, and which of its blocks it is."""
    places = [(part, row) for part, count in enumerate(counts) for row in range(count)]
    return torch.tensor(places, dtype=torch.int32, device=device)
