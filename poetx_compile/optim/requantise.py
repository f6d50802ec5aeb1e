"""A merge of an int8 weight (``base="int8"``): dequantised, rotated, put in order, rounded again.

Rounding is stochastic, by Philox under (seed; column/8, row, merges, layer): unbiased, and alike in
every process and in a run that resumes. Each group of columns of a row gets a new scale. One that
did not change keeps its bits: of blocks without rotation, and where a redraw moves whole groups
(chunks of 64 columns). Other redraws make up the groups anew, and all of them are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from poetx_compile import ops
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.permutation import Moves
from poetx_compile.ops.dequantize import GROUP
from poetx_compile.ops.precision import ieee_fp32
from poetx_compile.ops.turn_weight import rotate_in_place


@torch.no_grad()
def merge_int8(
    stored: Tensor, e: OrthogonalEquivalence, deltas: Sequence[Tensor], moves: Moves, number: int
) -> None:
    """``S ← R_outᵀ S R_inᵀ`` of an int8 weight, in place, in the order after the redraw.

    Args:
        stored: int8 [n, m]; its scales are those of `e`.
        deltas: ``R − I`` of the input and the output side, [blocks, b, b]; none for no rotation.
        moves: what was redrawn.
        number: of the layer in its model, a counter of the random bits.
    """
    assert e.scale is not None
    assert e.merges is not None
    values = e.dequantised(stored, e.skew_in.dtype)
    if deltas:
        with ieee_fp32():
            values = rotate_in_place(values, *deltas)
    weight, scale = stored, e.scale
    for dim, permutation in enumerate((e.perm_out, e.perm_in)):
        if permutation not in moves:
            continue
        index = moves[permutation]
        values, weight = values.index_select(dim, index), weight.index_select(dim, index)
        if dim == 0:
            scale = scale.index_select(0, index)
        elif permutation.chunk % GROUP == 0:
            scale = scale.index_select(1, index[::GROUP] // GROUP)
        else:  # no scale is that of a group any more
            scale = torch.full_like(scale, math.nan)
    # What was gathered is a copy; what was not is written itself.
    counters = e.merges, e.config.seed, number
    ops.requantize_(weight, scale, values.contiguous(), *counters)
    if weight is not stored:
        stored.copy_(weight)
        e.scale.copy_(scale)
    e.merges += 1
    e.seal(stored)
