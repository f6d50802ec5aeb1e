"""The momentum of `POETXMuon` in the state of its rotations: fp32, bf16, or 8 bits with scales.

========  ==========================================  =================  ===============
dtype     ``momentum_buffer`` [blocks, b(b−1)/2]      beside it          bytes a plane
========  ==========================================  =================  ===============
float32   fp32 (fp64 where rotations are)                                4
bfloat16  bf16                                                           2
int8      round(127 · m / scale)                      scales, fp32       1.016
========  ==========================================  =================  ===============

A scale is the largest magnitude of `GROUP` neighbouring values of a block (8-bit optimisers,
Dettmers et al., arXiv 2110.02861, whose codes are not linear). Both narrow forms are rounded
stochastically: what is added in a step may be less than half of what they resolve. The bits follow
from the seed of the configuration and the number of the step, and are those of every block of a
size; so they are alike in every process, however blocks are spread, and in a run that resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poetx_compile.distributed.shards import local, whole, write
from poetx_compile.errors import ConfigError
from poetx_compile.ops.random import hashed
from poetx_compile.optim.blocks import gather, scatter

BUFFER = "momentum_buffer"
SCALE = "momentum_scale"
GROUP = 256
"""Values that share a scale."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

State = dict[str, Any]
Batch = Sequence[tuple[int, slice]]
"""As `optim.blocks.chunks` makes them."""


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """One of `DTYPES`, by name or as it is.

    Raises:
        ConfigError: another one.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ConfigError(
            f"momentum_dtype = {dtype!r} is not allowed: use torch.float32, torch.bfloat16 or "
            "torch.int8, or their names"
        )
    return found


def bytes_of(skew: Tensor, dtype: torch.dtype) -> int:
    """What the momentum of a packed parameter takes."""
    if dtype == torch.float32:
        return skew.nbytes
    scales = 4 * skew.shape[0] * groups(skew.shape[1]) if dtype == torch.int8 else 0
    return skew.numel() * dtype.itemsize + scales


def groups(packed: int) -> int:
    """Scales of a block of `packed` values."""
    return -(-packed // GROUP)


def create(state: State, skew: Tensor, dtype: torch.dtype) -> None:
    """Zeros, spread over processes as the parameter is."""
    if dtype == torch.float32:
        state[BUFFER] = torch.zeros_like(skew)
        return
    state[BUFFER] = torch.zeros_like(skew, dtype=dtype)
    if dtype == torch.int8:
        state[SCALE] = torch.zeros_like(skew[:, : groups(skew.shape[1])], dtype=torch.float32)


def read(states: Sequence[State], batch: Batch, dtype: torch.dtype) -> Tensor:
    """The momentum of a batch of blocks of this process, in `dtype`: [blocks, b(b−1)/2]."""
    codes = gather([local(state[BUFFER]) for state in states], batch)
    if SCALE not in states[0]:
        return codes.to(dtype)
    return _decoded(codes, gather([local(state[SCALE]) for state in states], batch)).to(dtype)


def store(states: Sequence[State], batch: Batch, value: Tensor, noise: Tensor) -> None:
    """Write the momentum of a batch of blocks of this process, rounded stochastically.

    Args:
        value: [blocks, b(b−1)/2], of the batch.
        noise: `rounding_noise` of the step.
    """
    dtype = states[0][BUFFER].dtype
    if SCALE in states[0]:
        value, scale = _encoded(value, noise)
        scatter([local(state[SCALE]) for state in states], batch, scale)
    elif dtype == torch.bfloat16:
        value = _to_bf16(value, noise)
    scatter([local(state[BUFFER]) for state in states], batch, value)


def rounding_noise(packed: int, seed: int, step: int, device: torch.device) -> Tensor:
    """int32 [packed] in [0, 2¹⁶): what decides the rounding of one step, for a block."""
    return hashed(packed, seed, step, device) & 0xFFFF


def values(state: State, key: str) -> Tensor:
    """A tensor of a state, whole and in floating point, whatever form it is kept in. Collective."""
    if key == BUFFER and SCALE in state:
        return _decoded(whole(state[BUFFER]), whole(state[SCALE]))
    return whole(state[key])


def put(state: State, key: str, value: Tensor) -> None:
    """Write a whole tensor of a state, rounded to nearest."""
    if key == BUFFER and SCALE in state:
        value, scale = _encoded(value, _half(value))
        write(state[SCALE], scale)
    write(state[key], value)


def fit(state: State, skew: Tensor, dtype: torch.dtype) -> None:
    """Bring a state that torch has loaded into its form: it casts all to the parameter's dtype."""
    codes, scale = state[BUFFER], state.pop(SCALE, None)
    if scale is not None and dtype == torch.int8:
        state[BUFFER], state[SCALE] = codes.to(torch.int8), scale.float()
        return
    loaded = local(codes)
    if scale is not None:
        loaded = _decoded(loaded, local(scale))
    create(state, skew, dtype)
    if dtype == torch.int8:
        loaded, scale = _encoded(loaded, _half(loaded))
        local(state[SCALE]).copy_(scale)
    local(state[BUFFER]).copy_(loaded)


def _half(value: Tensor) -> Tensor:
    """Noise that rounds to nearest."""
    return torch.full_like(value[:1], 2**15, dtype=torch.int32)


def _grouped(value: Tensor) -> Tensor:
    """[blocks, n] → [blocks, groups, GROUP], with zeros at the end of each block."""
    n = value.shape[1]
    padded = torch.nn.functional.pad(value, (0, groups(n) * GROUP - n))
    return padded.view(len(value), groups(n), GROUP)


def _decoded(codes: Tensor, scale: Tensor) -> Tensor:
    wide = _grouped(codes.float()) * (scale / 127).unsqueeze(-1)
    return wide.flatten(1)[:, : codes.shape[1]]


def _encoded(value: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8, scales fp32) of fp32 values; what is not finite stays so in its scale."""
    grouped = _grouped(value.float())
    scale = grouped.abs().amax(-1)
    inverse = torch.where(scale > 0, 127 / scale, 0)
    scaled = (grouped * inverse.unsqueeze(-1)).flatten(1)[:, : value.shape[1]]
    # Of the magnitude, so that −m is rounded as m is.
    magnitude = (scaled.abs() + noise.to(scaled.dtype) * 2.0**-16).floor().clamp_(max=127)
    return magnitude.copysign_(scaled).nan_to_num_(0).to(torch.int8), scale


def _to_bf16(value: Tensor, noise: Tensor) -> Tensor:
    value = value.float()
    bits = (value.view(torch.int32) + noise) & ~0xFFFF
    return torch.where(value.isfinite(), bits.view(torch.float32), value).to(torch.bfloat16)
