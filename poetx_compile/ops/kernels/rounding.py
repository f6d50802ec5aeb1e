"""Stochastic rounding in Triton kernels, by the bits of `ops.random`."""

from __future__ import annotations

import triton
import triton.language as tl

COUNTERS = ("seed_low", "seed_high", "step")
"""Arguments of kernels that no kernel is to be compiled for again."""


@triton.jit
def matrix_bits(rows, columns, seed_low, seed_high, step, layer, GROUPED: tl.constexpr):
    """`ops.random.matrix_bits` of a tile: 16 bits for each element, in int32.

    GROUPED: the columns begin at a multiple of 8; otherwise each element computes its own words.
    """
    if GROUPED:
        groups: tl.constexpr = columns.shape[0] // 8
        first = tl.min(columns, axis=0) // 8 + tl.arange(0, groups)
        bits = group_bits(rows, first, seed_low, seed_high, step, layer)
    else:
        c = (columns // 8)[None, :] + tl.zeros_like(rows)[:, None]
        r = rows[:, None] + tl.zeros_like(columns)[None, :]
        w0, w1, w2, w3 = tl.philox(_seed(seed_low, seed_high), c, r, step, layer)
        word = (columns % 8 // 2)[None, :]
        chosen = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        bits = tl.where((columns % 2)[None, :] == 0, chosen & 0xFFFF, chosen >> 16)
        bits = bits.to(tl.uint16).to(tl.int32)
    return bits


@triton.jit
def group_bits(rows, groups, seed_low, seed_high, step, layer):
    """`matrix_bits` of columns that come in groups of eight, by the numbers of the groups."""
    c = groups[None, :] + tl.zeros_like(rows)[:, None]
    r = rows[:, None] + tl.zeros_like(groups)[None, :]
    w0, w1, w2, w3 = tl.philox(_seed(seed_low, seed_high), c, r, step, layer)
    # 16-bit numbers from here on: they change threads through shared memory.
    low02 = tl.interleave(w0.to(tl.uint16), w2.to(tl.uint16))
    low13 = tl.interleave(w1.to(tl.uint16), w3.to(tl.uint16))
    high02 = tl.interleave((w0 >> 16).to(tl.uint16), (w2 >> 16).to(tl.uint16))
    high13 = tl.interleave((w1 >> 16).to(tl.uint16), (w3 >> 16).to(tl.uint16))
    bits = tl.interleave(tl.interleave(low02, low13), tl.interleave(high02, high13))
    return bits.to(tl.int32)


@triton.jit
def _seed(low, high):
    low = low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = high.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32) | low


@triton.jit
def stochastic_bf16(x, bits):
    """fp32 rounded to bf16 by 16 random bits; infinities and NaN stay."""
    pattern = x.to(tl.int32, bitcast=True)
    finite = (pattern & 0x7F800000) != 0x7F800000
    pattern = tl.where(finite, (pattern + bits) & -65536, pattern)
    return pattern.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def hashed_bits(numbers, key_low, key_high):
    """`ops.random.hashed` at these places: 31 bits for each, in int32."""
    low = key_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    key = (key_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low
    z = (numbers + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z >> 33).to(tl.int32)


def signed(word: int) -> int:
    """The lower 32 bits as a signed number, so that all of them reach a kernel as int32."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
