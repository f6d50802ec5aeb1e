"""Kernels of a step of `POETXMuon`: momentum and direction in one pass, rotations in another.

Between them `orthogonalize` makes msign of the directions. What belongs to parameters is read and
written where it is: a launch takes up to `PARTS` runs of blocks, each of a parameter, and one
program after another finds its run among them. Bandwidth-bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels import orthogonalize
from poetx_compile.ops.kernels.common import launch, power_of_two
from poetx_compile.ops.kernels.rounding import hashed_bits, signed, stochastic_bf16
from poetx_compile.ops.kernels.tiles import above_diagonal, packed_index, position, tile_of
from poetx_compile.ops.muon_step import Part
from poetx_compile.ops.random import hash_key

PARTS = 8
"""Runs of blocks in a launch."""

GROUP = 256
"""Values that share a scale (`optim.momentum`)."""

CHUNK = 2048
"""Values of a program, at most."""


@triton.jit
def part_of(block, one, two, three, four, five, six, seven, eight, e1, e2, e3, e4, e5, e6, e7):
    """(tensor, its row) of a block: e1 is the first block of the second tensor, and so on."""
    tensor = one
    first = 0
    if block >= e1:
        tensor = two
        first = e1
    if block >= e2:
        tensor = three
        first = e2
    if block >= e3:
        tensor = four
        first = e3
    if block >= e4:
        tensor = five
        first = e4
    if block >= e5:
        tensor = six
        first = e5
    if block >= e6:
        tensor = seven
        first = e6
    if block >= e7:
        tensor = eight
        first = e7
    return tensor, (block - first).to(tl.int64)


_ENDS = "e1", "e2", "e3", "e4", "e5", "e6", "e7"


@triton.jit(do_not_specialize=["mu", "fresh", "key_low", "key_high", *_ENDS])
def momentum_kernel(
    g1, g2, g3, g4, g5, g6, g7, g8,  # gradients: [blocks, P]
    m1, m2, m3, m4, m5, m6, m7, m8,  # momenta: [blocks, P]
    s1, s2, s3, s4, s5, s6, s7, s8,  # f32[blocks, groups]; HAS_SCALE = False: not read
    e1, e2, e3, e4, e5, e6, e7,
    direction,  # [blocks, P]; WANTED = False: not written
    norms,  # f32[blocks, chunks]: of the directions
    mu,
    fresh,  # 1 − mu
    key_low,
    key_high,
    P: tl.constexpr,
    WANTED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NARROW: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """m = m + (1 − mu)(g − m), rounded stochastically where NARROW; direction = g + mu (m − g)."""
    chunks: tl.constexpr = (P + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    block = program // chunks
    chunk = program % chunks
    gradient, row = part_of(block, g1, g2, g3, g4, g5, g6, g7, g8, e1, e2, e3, e4, e5, e6, e7)
    momentum, row = part_of(block, m1, m2, m3, m4, m5, m6, m7, m8, e1, e2, e3, e4, e5, e6, e7)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    there = at < P
    g = tl.load(gradient + row * P + at, mask=there, other=0.0).to(tl.float32)
    stored = tl.load(momentum + row * P + at, mask=there, other=0).to(tl.float32)
    rows: tl.constexpr = CHUNK // GROUP
    groups: tl.constexpr = (P + GROUP - 1) // GROUP
    of_group = chunk * rows + tl.arange(0, rows)
    group_there = of_group < groups
    scale, row = part_of(block, s1, s2, s3, s4, s5, s6, s7, s8, e1, e2, e3, e4, e5, e6, e7)
    scale += row * groups + of_group
    if HAS_SCALE:
        unit = tl.math.div_rn(tl.load(scale, mask=group_there, other=0.0), 127.0)
        stored = tl.reshape(tl.reshape(stored, (rows, GROUP)) * unit[:, None], (CHUNK,))
    m = stored + fresh * (g - stored)
    if WANTED:
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
            tl.store(scale, largest, mask=group_there)
            inverse = tl.where(largest > 0, tl.math.div_rn(127.0, largest), 0.0)
            scaled = tl.reshape(tl.reshape(m, (rows, GROUP)) * inverse[:, None], (CHUNK,))
            size = tl.floor(tl.abs(scaled) + noise.to(tl.float32) * 0.0000152587890625)
            size = tl.where(size == size, tl.minimum(size, 127.0), 0.0)
            m = tl.where(scaled < 0, -size, size)
        else:
            m = stochastic_bf16(m, noise)
    tl.store(momentum + row * P + at, m.to(momentum.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["keep", "rate", *_ENDS])
def turn_kernel(
    matrix,  # [blocks, N, N]
    q1, q2, q3, q4, q5, q6, q7, q8,  # f32[blocks, B(B-1)/2]
    e1, e2, e3, e4, e5, e6, e7,
    keep,
    rate,
    B: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Q = keep Q − rate matrix, of what is above the diagonal."""
    block, row_tile, column_tile = position(N, TILE)
    if row_tile > column_tile:
        return
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    value = tile_of(matrix + block * (N * N), rows, columns, N).to(tl.float32)
    skew, row = part_of(block, q1, q2, q3, q4, q5, q6, q7, q8, e1, e2, e3, e4, e5, e6, e7)
    at = skew + row * (B * (B - 1) // 2) + packed_index(rows, columns, B)
    stored = above_diagonal(rows, columns, B)
    before = tl.load(at, mask=stored, other=0.0)
    tl.store(at, keep * before - rate * value, mask=stored)


def muon_step(
    parts: Sequence[Part],
    block_size: int,
    mu: float,
    rate: float,
    keep: float,
    seed: int,
    step: int,
    wanted: bool,
    *,
    tiling: orthogonalize.Tiling | None = None,
    operands: torch.dtype = torch.bfloat16,
) -> None:
    """`ops.muon_step.muon_step`.

    Args:
        parts, block_size, mu, rate, keep, seed, step, wanted: those of the op.
        tiling, operands: of `orthogonalize.orthogonalize_skew`.
    """
    packed = block_size * (block_size - 1) // 2
    blocks = sum(part.skew.shape[0] for part in parts) if wanted else 0
    direction = parts[0].skew.new_empty(blocks, packed, dtype=operands)
    norm = _update_momenta(parts, direction, mu, hash_key(seed, step))
    if not wanted:
        return
    if tiling is None and block_size <= orthogonalize.WHOLE:
        update = orthogonalize.whole_blocks(direction, norm, block_size, operands)
        skews = [part.skew for part in parts]
        if keep != 1:
            torch._foreach_mul_(skews, keep)
        updates = list(update.split([skew.shape[0] for skew in skews]))
        torch._foreach_sub_(skews, updates, alpha=rate)
        return
    tiling = tiling or orthogonalize.tiling_of(block_size)
    matrices = orthogonalize.unpacked(direction, block_size, tiling, operands)
    result = orthogonalize.by_tiles(matrices, norm, tiling)
    moved = orthogonalize.constants_of_tiles(result, block_size)
    per_block = (result.shape[1] // moved["TILE"]) ** 2
    for run, some, ends in _launches(parts):
        skews = [part.skew for part in some]
        given = result[run], *skews, *ends, keep, rate
        launch(turn_kernel, (run.stop - run.start) * per_block, *given, **moved)


def _update_momenta(parts: Sequence[Part], direction: Tensor, mu: float, key: int) -> Tensor:
    """Bring momenta up to date, write directions where there is room; their norms [blocks]."""
    packed = direction.shape[1]
    chunk = power_of_two(packed, GROUP, CHUNK)
    chunks = -(-packed // chunk)
    first, wanted = parts[0], direction.shape[0] > 0
    norms = first.skew.new_empty(direction.shape[0], chunks)
    for run, some, ends in _launches(parts):
        launch(
            momentum_kernel,
            (run.stop - run.start) * chunks,
            *(part.gradient for part in some),
            *(part.momentum for part in some),
            *(part.momentum if part.scale is None else part.scale for part in some),
            *ends,
            *(direction[run] if wanted else first.skew, norms[run] if wanted else first.skew),
            *(float(mu), float(1 - mu), signed(key), signed(key >> 32)),
            P=packed,
            WANTED=wanted,
            HAS_SCALE=first.scale is not None,
            NARROW=first.momentum.dtype != torch.float32,
            CHUNK=chunk,
            GROUP=GROUP,
            num_warps=max(1, chunk // 512),
            num_stages=1,
        )
    return torch.linalg.vector_norm(norms, dim=1)


def _launches(parts: Sequence[Part]) -> Iterator[tuple[slice, list[Part], list[int]]]:
    """For each launch: its blocks, `PARTS` parts, and where the second to the last begin."""
    start = 0
    for at in range(0, len(parts), PARTS):
        some = list(parts[at : at + PARTS])
        begin = list(itertools.accumulate(part.skew.shape[0] for part in some))
        run = slice(start, start + begin[-1])
        missing = PARTS - len(some)  # no block reaches these
        yield run, some + some[-1:] * missing, begin[:-1] + begin[-1:] * missing
        start = run.stop
