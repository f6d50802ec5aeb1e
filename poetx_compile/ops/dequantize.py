"""``poetx::dequantize``: a weight from int8 and its scales, and the way back.

A weight [n, m] is stored as int8 [n, m] with one scale for each `GROUP` neighbouring columns of a
row, symmetric around zero: ``W = q · s``. The scales have the dtype that the weight had; a product
of two such short numbers is exact in fp32 (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from poetx_compile._torch import FakeTensor
from poetx_compile.ops.precision import rotation_dtype
from poetx_compile.ops.registry import define

GROUP = 64
"""Columns that share a scale: as many as a chunk of ``permutation="chunked"`` has at most, so that
whole groups change places in a redraw."""

ELEMENTS = 2**22
"""Of the rows that are rounded at once, with a few copies in fp32."""

LARGEST = 127
"""Of the numbers stored: −128 has no counterpart."""

_PARTS = 2**16
"""Of a step that rounding distinguishes: those of 16 random bits."""

NEAREST = _PARTS // 2
"""Bits that round to the nearest."""


def dequantize_reference(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``W = q · s`` in `dtype`, computed in fp32 (fp64 for that dtype) and rounded once.

    A constant: takes no gradient. Compiled, it is one pointwise kernel that writes what the product
    behind it reads; the backward computes it again.

    Args:
        weight: q, int8 [n, m].
        scale: s, floating point [n, ⌈m/64⌉].
        dtype: of the result.

    Returns:
        [n, m] of `dtype`, contiguous, a new tensor.
    """
    wide = torch.promote_types(torch.promote_types(dtype, scale.dtype), torch.float32)
    n, m = weight.shape
    if m % GROUP == 0:
        groups = weight.reshape(n, m // GROUP, GROUP).to(wide)
        return (groups * scale.unsqueeze(-1).to(wide)).to(dtype).view(n, m)
    # By a shift: of a division, Inductor's loops for CPUs leave out the last, shorter group.
    group = torch.arange(m, device=weight.device) >> (GROUP.bit_length() - 1)
    return (weight.to(wide) * scale[:, group].to(wide)).to(dtype)


def groups_of(columns: int) -> int:
    """Number of scales of a row."""
    return -(-columns // GROUP)


def check_stored(weight: Tensor, scale: Tensor | None) -> None:
    """Raise unless this is a stored weight: floating point alone, or int8 with its scales."""
    if scale is None:
        torch._check(
            weight.dim() == 2 and weight.is_floating_point(),
            lambda: (
                "poetx: weight must be a floating point matrix, "
                f"got {weight.dtype} {list(weight.shape)}"
            ),
        )
        return
    torch._check(
        weight.dim() == 2 and weight.dtype == torch.int8 and scale.is_floating_point(),
        lambda: (
            "poetx: a weight with scales must be an int8 matrix and these floating point, "
            f"got {weight.dtype} {list(weight.shape)} and {scale.dtype}"
        ),
    )
    shape = weight.shape[0], groups_of(weight.shape[1])
    torch._check(
        tuple(scale.shape) == shape,
        lambda: (
            f"poetx: the scales of a weight of {list(weight.shape)} must be {list(shape)}, "
            f"got {list(scale.shape)}"
        ),
    )


def _check(weight, scale, dtype) -> None:
    check_stored(weight, scale)
    torch._check(
        dtype.is_floating_point, lambda: f"poetx: dtype must be floating point, got {dtype}"
    )


dequantize = define(
    "dequantize",
    dequantize_reference,
    check=_check,
    fake=lambda weight, scale, dtype: weight.new_empty(weight.shape, dtype=dtype),
    drawn="weight",
)


def quantize(
    values: Tensor, dtype: torch.dtype, bits: Tensor | int = NEAREST
) -> tuple[Tensor, Tensor]:
    """int8 and scales of a weight; its largest entry of each group is 126 to 127 steps.

    Args:
        values: [n, m], any floating dtype.
        dtype: of the scales.
        bits: `NEAREST`, or 16 random bits for each entry, int64 [n, m]: stochastic rounding.

    Returns:
        q, int8 [n, m]; s, [n, ⌈m/64⌉] of `dtype`.
    """
    n, m = values.shape
    weight = torch.empty((n, m), dtype=torch.int8, device=values.device)
    scale = torch.empty((n, groups_of(m)), dtype=dtype, device=values.device)
    for rows in slabs(values):
        entries = grouped(values[rows].to(rotation_dtype(values.dtype)))
        scale[rows] = steps = _scales(entries, dtype)
        weight[rows] = _rounded(entries, steps, bits if isinstance(bits, int) else bits[rows], m)
    return weight, scale


def norm(weight: Tensor, scale: Tensor) -> Tensor:
    """The Frobenius norm of a quantised weight, a scalar of its rotations' dtype."""
    dtype = rotation_dtype(scale.dtype)
    parts = [
        torch.linalg.vector_norm(dequantize_reference(weight[rows], scale[rows], dtype))
        for rows in slabs(weight)
    ]
    return torch.linalg.vector_norm(torch.stack(parts))


def slabs(matrix: Tensor) -> Iterator[slice]:
    """Rows of a matrix, `ELEMENTS` at once; all where there are no values."""
    rows, columns = matrix.shape
    empty = matrix.is_meta or isinstance(matrix, FakeTensor)
    step = rows if empty else max(1, ELEMENTS // columns)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def grouped(matrix: Tensor) -> Tensor:
    """[n, ⌈m/64⌉, 64], with zeros behind the last column."""
    n, m = matrix.shape
    groups = groups_of(m)
    return F.pad(matrix, (0, groups * GROUP - m)).view(n, groups, GROUP)


def _scales(entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded up, so that no entry has to be cut off."""
    steps = entries.abs().amax(-1) / LARGEST * (1 + torch.finfo(dtype).eps)
    scale = steps.to(dtype)
    return torch.where(scale > 0, scale, 1)  # a group of zeros


def _rounded(entries: Tensor, scale: Tensor, bits: Tensor | int, columns: int) -> Tensor:
    added = bits if isinstance(bits, int) else grouped(bits).to(entries.dtype)
    steps = entries / scale.to(entries.dtype).unsqueeze(-1) + added / _PARTS
    whole = steps.floor().clamp(-LARGEST, LARGEST)
    return whole.to(torch.int8).flatten(1)[:, :columns].contiguous()
