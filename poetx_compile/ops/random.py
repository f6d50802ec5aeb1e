"""Random bits by counter, and stochastic rounding with them: the same on every device.

Philox-4x32-10 (Salmon et al., SC 2011), as Triton's ``tl.philox`` computes it. No generator is read
or advanced: the bits follow from a key and a counter alone, so every process, every device and
every run that resumes gets the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_GAMMA = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

ELEMENTS = 8
"""Elements that share one call of Philox: 16 bits each."""


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits for each counter.

    Args:
        seed: the key, 64 bits.
        counter: four int64 tensors that broadcast, each with values of 32 bits.

    Returns:
        Four int64 tensors with values in [0, 2³²): the results of ``tl.philox(seed, *counter)``.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    a, b = _MULTIPLIERS
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(_ROUNDS):
        # Products wrap in 64 bits; both halves of them are right all the same.
        low, high = a * c0, b * c2
        c0, c1 = high >> 32 & _MASK ^ c1 ^ k0, high & _MASK
        c2, c3 = low >> 32 & _MASK ^ c3 ^ k1, low & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def matrix_bits(
    rows: int,
    columns: int,
    seed: int,
    step: int | Tensor,
    layer: int,
    device: torch.device,
    first_row: int = 0,
) -> Tensor:
    """16 random bits for each element of a matrix: int64 [rows, columns], in [0, 2¹⁶).

    Element (r, c) has the counter ``(c // 8, r, step, layer)``, and of its four words the word
    ``c % 8 // 2``: the lower half where c is even, the upper half where it is odd. Row r is counted
    from `first_row` on; a `step` may be on the device.
    """

    def number(value: int | Tensor) -> Tensor:
        return torch.as_tensor(value & _MASK, dtype=torch.int64, device=device).reshape(1, 1)

    groups = -(-columns // ELEMENTS)
    c = torch.arange(groups, device=device)[None, :]
    r = torch.arange(first_row, first_row + rows, device=device)[:, None]
    words = torch.stack(philox(seed, (c, r, number(step), number(layer))), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return halves.reshape(rows, groups * ELEMENTS)[:, :columns]


def round_stochastically(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """fp32 values rounded to bf16 or fp16, up or down with the probabilities of their distances.

    What `dtype` represents stays as it is, and so do infinities and NaN.

    Args:
        x: fp32.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        bits: int64 of the shape of x, in [0, 2¹⁶).

    Returns:
        x's shape, of `dtype`.
    """
    finite = x.isfinite()
    pattern = x.view(torch.int32).long() & _MASK
    if dtype == torch.bfloat16:
        return torch.where(finite, _carried(pattern, bits, 16), x).to(dtype)
    # fp16 has 13 bits less, and multiples of 2⁻²⁴ below 2⁻¹⁴.
    scaled = x.abs() * 2.0**24
    whole = scaled.floor()
    up = ((scaled - whole) * 2.0**16 > bits).to(x.dtype)
    small = torch.copysign((whole + up) * 2.0**-24, x)
    rounded = torch.where(x.abs() < 2.0**-14, small, _carried(pattern, bits >> 3, 13))
    return torch.where(finite, rounded, x).to(dtype)


def _carried(pattern: Tensor, bits: Tensor, dropped: int) -> Tensor:
    """fp32 of 32-bit patterns after `bits` were added and the last `dropped` bits set to zero."""
    kept = (pattern + bits) & (_MASK >> dropped << dropped)
    signed = torch.where(kept >= 2**31, kept - 2**32, kept)
    return signed.to(torch.int32).view(torch.float32)


def hashed(count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """31 random bits for each of `count` numbers: int32 [count], alike on every device.

    SplitMix64 (Steele et al., OOPSLA 2014) of the number under a key of seed and step: a tenth of
    Philox's launches, for vectors that are too short to be worth a kernel.
    """
    key = hash_key(seed, step)
    z = torch.arange(1, count + 1, device=device) * _signed(_GAMMA) + _signed(key)
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(_MIX[0])
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(_MIX[1])
    return (z >> 33 & 0x7FFFFFFF).to(torch.int32)


def hash_key(seed: int, step: int) -> int:
    """The key of `hashed`: 64 bits."""
    return _mixed_number(_mixed_number(seed) + step)


def _mixed_number(value: int) -> int:
    """SplitMix64 of one number, on the host."""
    z = (value + _GAMMA) % 2**64
    z = (z ^ z >> 30) * _MIX[0] % 2**64
    z = (z ^ z >> 27) * _MIX[1] % 2**64
    return z ^ z >> 31


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value
