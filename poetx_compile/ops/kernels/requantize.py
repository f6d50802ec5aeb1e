"""Triton kernel of `requantize_`: one pass over the values, a group of columns a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.dequantize import GROUP, LARGEST
from poetx_compile.ops.kernels.common import launch
from poetx_compile.ops.kernels.rounding import matrix_bits, signed

_ROWS = 32
"""Of a tile, whose columns are a group."""


@triton.jit(do_not_specialize=["seed_low", "seed_high", "layer"])
def requantize_kernel(
    weight,  # int8 [rows, width]
    scale,  # [rows, groups]
    values,  # fp32 [rows, width]
    step,  # int64: a counter of the random bits
    rows,
    width,
    groups,
    seed_low,
    seed_high,
    layer,
    EXCESS: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """weight, scale = values, rounded stochastically; groups that did not change stay."""
    program = tl.program_id(0)
    group = program % groups
    row = (program // groups) * ROWS + tl.arange(0, ROWS)
    columns = group * GROUP + tl.arange(0, GROUP)
    there = row < rows
    inside = there[:, None] & (columns < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + columns[None, :]
    own = row.to(tl.int64) * groups + group
    x = tl.load(values + at, mask=inside, other=0.0)
    largest = tl.full([ROWS], LARGEST, tl.float32)
    steps = tl.div_rn(tl.max(tl.abs(x), axis=1), largest) * EXCESS
    steps = steps.to(scale.dtype.element_ty).to(tl.float32)
    steps = tl.where(steps > 0, steps, 1.0)
    bits = matrix_bits(row, columns, seed_low, seed_high, tl.load(step).to(tl.int32), layer, True)
    parts = tl.div_rn(x, tl.broadcast_to(steps[:, None], x.shape)) + bits.to(tl.float32) / 65536
    new = tl.minimum(tl.maximum(tl.floor(parts), -LARGEST), LARGEST)
    old = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    old_steps = tl.load(scale + own, mask=there, other=1.0).to(tl.float32)
    same = tl.min((old * old_steps[:, None] == x).to(tl.int32), axis=1) == 1
    steps = tl.where(same, old_steps, steps)
    new = tl.where(same[:, None], old, new)
    tl.store(weight + at, new.to(tl.int8), mask=inside)
    tl.store(scale + own, steps.to(scale.dtype.element_ty), mask=there)


def requantize_(
    weight: Tensor,
    scale: Tensor,
    values: Tensor,
    step: Tensor,
    seed: int,
    layer: int,
) -> None:
    """`ops.requantize_` of contiguous tensors, in fp32."""
    rows, width = weight.shape
    groups = scale.shape[1]
    launch(
        requantize_kernel,
        groups * -(-rows // _ROWS),
        weight,
        scale,
        values,
        step,
        rows,
        width,
        groups,
        signed(seed),
        signed(seed >> 32),
        signed(layer),
        EXCESS=1 + torch.finfo(scale.dtype).eps,
        LARGEST=LARGEST,
        GROUP=GROUP,
        ROWS=_ROWS,
        num_warps=4,
        num_stages=1,
    )
