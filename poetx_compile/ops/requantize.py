"""``poetx::requantize_``: an int8 weight after its values have changed, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.dequantize import (
    GROUP,
    check_stored,
    dequantize_reference,
    grouped,
    quantize,
    slabs,
)
from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.random import matrix_bits
from poetx_compile.ops.registry import define_in_place


def requantize_reference(
    weight: Tensor,
    scale: Tensor,
    values: Tensor,
    step: Tensor,
    seed: int,
    layer: int,
) -> None:
    """``q, s ← quantize(values)``, rounded stochastically, where they are not ``q · s``.

    Groups whose values are those of q and s keep their bits; scales of NaN match no values.

    The bits are those of `matrix_bits` for the element at (row, column): the same on every device,
    in every process and in a run that resumes.

    Args:
        weight: q, int8 [n, m]; written.
        scale: s, [n, ⌈m/64⌉]; written.
        values: [n, m], fp32 or fp64.
        step: a counter of the bits, int64, a scalar on the device.
        seed: 64 bits, the key of the bits.
        layer: 32 bits, a counter.
    """
    m = weight.shape[1]
    for rows in slabs(weight):
        part, q, s = values[rows], weight[rows], scale[rows]
        bits = matrix_bits(len(part), m, seed, step, layer, part.device, first_row=rows.start)
        new, new_scale = quantize(part, scale.dtype, bits)
        same = (grouped(part) == grouped(dequantize_reference(q, s, part.dtype))).all(-1)
        q.copy_(torch.where(same.repeat_interleave(GROUP, 1)[:, :m], q, new))
        s.copy_(torch.where(same, s, new_scale))


def _check(weight, scale, values, step, seed, layer) -> None:
    check_stored(weight, scale)
    torch._check(
        values.shape == weight.shape and values.dtype in (torch.float32, torch.float64),
        lambda: (
            f"poetx: values must be fp32 or fp64 {list(weight.shape)}, "
            f"got {values.dtype} {list(values.shape)}"
        ),
    )
    torch._check(
        step.dim() == 0 and step.dtype == torch.int64,
        lambda: f"poetx: step must be an int64 scalar, got {step.dtype} {list(step.shape)}",
    )


def _kernel_takes(weight, scale, values, step, seed, layer) -> bool:
    return values.dtype == torch.float32 and all(t.is_contiguous() for t in (weight, scale, values))


requantize_ = define_in_place(
    "requantize_",
    requantize_reference,
    check=_check,
    written=("weight", "scale"),
    kernel=Kernel("requantize.requantize_", _kernel_takes),
)
