"""Turns of 2-byte weights by large blocks: products of a library between two Triton kernels.

A block of R − I that does not fit into shared memory is read again for each tile of a result, which
a library hides better than kernels that turn in place. With S some rows of a weight, in permuted
coordinates, and L and R as in `turn_weight`::

    S                    gathered
    D = L S              the change by the rows
    U = S + D            over S; of both sides alone, rounded as an operand
    D = D + U Rᵀ         the change by the columns
    W = W + D            in place, rounded once

A change is small: rounding D takes as little from a weight as rounding R − I does. S and D are of
as many layers as `SCRATCH_BYTES` hold, or of a part of one layer's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import ceil_div, chunk_length, launch, run_length
from poetx_compile.ops.kernels.layers import Layer, layer_of, table_of_layers
from poetx_compile.ops.kernels.permute import source_columns
from poetx_compile.ops.kernels.rounding import COUNTERS, signed, stochastic_bf16
from poetx_compile.ops.kernels.turn_panels import natural_rows
from poetx_compile.ops.kernels.turn_side import bits_of_natural_columns
from poetx_compile.ops.precision import without_autocast

SCRATCH_BYTES = 256 * 2**20
"""Bytes of S and D together: 4096×14336 in bf16 fits."""

TILE_ROWS, TILE_COLUMNS, WARPS = 16, 256, 4
"""Of both kernels: four loads of 16 bytes a thread are on their way."""

_COUNTS = "first", "height", "groups", "layers"


@triton.jit
def tile_of_layers(
    weight, row_pair, column_pair, table, height, width, layers,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a program: (weight, row pair, column pair, number) of its layer; the number of the layer
    among those of the launch, the rows of its tile, its first column."""
    # Neighbouring programs share rows: what they read of a row is one piece of memory.
    across = tl.cdiv(width, TILE_COLUMNS)
    down = tl.cdiv(height, TILE_ROWS)
    program = tl.program_id(0)
    index = program // (across * down)
    rows = program // across % down * TILE_ROWS + tl.arange(0, TILE_ROWS)
    found = layer_of(table, layers, index, weight, row_pair, column_pair)
    return found, index, rows, program % across * TILE_COLUMNS


@triton.jit(do_not_specialize=_COUNTS)
def gather_rows_kernel(
    weight,  # [rows, width], 2-byte elements; of the first layer
    row_pair,  # int64 [2, rows / ROW_CHUNK]
    column_pair,  # int64 [2, width / CHUNK]
    table,  # int64 [6, layers]: `layers.table_of`
    out,  # [layers, height, width], like weight
    width,
    first,  # of the permuted rows
    height,
    groups,  # of eight columns that turn, or go along with rows
    layers,
    ROW_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Some permuted rows of all layers; COLUMNS: permuted columns too, which come in runs."""
    found, index, local, start = tile_of_layers(
        weight, row_pair, column_pair, table, height, groups * 8, layers, TILE_ROWS, TILE_COLUMNS
    )
    weight, row_pair, column_pair, _number = found
    columns = start + tl.arange(0, TILE_COLUMNS)
    row_there, there = local < height, columns < groups * 8
    source = columns
    if COLUMNS:
        source = source_columns(column_pair, columns, there, CHUNK, RUN)
    at = (natural_rows(row_pair, first + local, row_there, ROW_CHUNK) * width)[:, None]
    place = ((index * height + local).to(tl.int64) * width)[:, None] + columns[None, :]
    inside = row_there[:, None] & there[None, :]
    tl.store(out + place, tl.load(weight + at + source[None, :], mask=inside), mask=inside)


@triton.jit(do_not_specialize=[*_COUNTS, *COUNTERS])
def add_change_kernel(
    weight,  # the first of these as in `gather_rows_kernel`; written
    row_pair,
    column_pair,
    table,
    change,  # [layers, height, width], like weight: D
    apply,  # int32: nothing is written where it is zero; HAS_APPLY = False: not read
    width,
    first,
    height,
    groups,
    layers,
    seed_low,  # all of these are 32 bits
    seed_high,
    step,
    ROW_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    HAS_APPLY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """W = W + D, the columns in their natural order: what is written in pieces takes longer."""
    found, index, local, start = tile_of_layers(
        weight, row_pair, column_pair, table, height, width, layers, TILE_ROWS, TILE_COLUMNS
    )
    weight, row_pair, column_pair, number = found
    inverse = column_pair + width // CHUNK
    columns = start + tl.arange(0, TILE_COLUMNS)
    row_there, there = local < height, columns < width
    source = columns
    if COLUMNS:
        source = source_columns(inverse, columns, there, CHUNK, RUN)
        there = there & (source < groups * 8)
    at = (natural_rows(row_pair, first + local, row_there, ROW_CHUNK) * width)[:, None]
    at = weight + at + columns[None, :]
    place = ((index * height + local).to(tl.int64) * width)[:, None] + source[None, :]
    inside = row_there[:, None] & there[None, :]
    total = tl.load(at, mask=inside).to(tl.float32)
    total += tl.load(change + place, mask=inside).to(tl.float32)
    if HAS_APPLY:
        inside = inside & (tl.load(apply) != 0)
    if STOCHASTIC:
        bits = bits_of_natural_columns(
            first + local, start, width, inverse, seed_low, seed_high, step, number, CHUNK,
            TILE_COLUMNS,
        )  # fmt: skip
        tl.store(at, stochastic_bf16(total, bits), mask=inside)
    else:
        tl.store(at, total.to(weight.dtype.element_ty), mask=inside)


def turn_products(group: Sequence[Layer], seed: int, step: int, apply: Tensor | None) -> None:
    """Turn weights of one kind from the sides that have deltas.

    Args:
        group: layers whose blocks begin at multiples of eight, and rows at multiples of sixteen;
            the columns that turn come in runs (`common.is_fused`).
        seed, step, apply: those of the op.
    """
    turn, side_in, side_out = group[0]
    weight = turn.weight
    rows, width = weight.shape
    unit = TILE_ROWS if side_out is None else side_out.block
    if side_out is not None and side_in is None:
        rows = side_out.blocks * unit
    fitting = SCRATCH_BYTES // (2 * width * weight.element_size())
    layers = min(len(group), max(1, fitting // rows))
    height = rows if rows <= fitting else max(1, fitting // unit) * unit
    scratch = weight.new_empty(2, layers, height, width)
    if apply is not None:
        apply = apply.to(torch.int32)
    for number in range(0, len(group), layers):
        some = group[number : number + layers]
        for first in range(0, rows, height):
            stored, change = scratch[:, : len(some), : min(height, rows - first)]
            _turn_rows(some, stored, change, first, seed, step, apply)


def _turn_rows(
    group: Sequence[Layer],
    stored: Tensor,
    change: Tensor,
    first: int,
    seed: int,
    step: int,
    apply: Tensor | None,
) -> None:
    """Turn permuted rows, from `first` on; `stored` and `change` are scratch for S and D."""
    turn, side_in, side_out = group[0]
    weight, table = turn.weight, table_of_layers(group)
    height, width = stored.shape[1:]
    turned = side_in.blocks * side_in.block if side_in is not None and side_out is None else width
    pointers = weight, turn.perm_out, turn.perm_in, table
    sizes = width, first, height, turned // 8, len(group)
    fixed = {
        "ROW_CHUNK": chunk_length(turn.perm_out, weight.shape[0]),
        "CHUNK": chunk_length(turn.perm_in, width),
        "RUN": 1 if side_in is None else run_length(width, side_in.block, turn.perm_in),
        "COLUMNS": side_in is not None,
        "TILE_ROWS": TILE_ROWS,
        "TILE_COLUMNS": TILE_COLUMNS,
        "num_warps": WARPS,
        "num_stages": 1,
    }
    down = len(group) * ceil_div(height, TILE_ROWS)
    across = ceil_div(turned, TILE_COLUMNS)
    launch(gather_rows_kernel, down * across, *pointers, stored, *sizes, **fixed)
    for place, layer in enumerate(group):
        make_change(stored[place], change[place], layer, first)
    launch(
        add_change_kernel,
        down * ceil_div(width, TILE_COLUMNS),
        *pointers,
        change,
        table if apply is None else apply,
        *sizes,
        *(signed(seed), signed(seed >> 32), signed(step)),
        **fixed,
        HAS_APPLY=apply is not None,
        STOCHASTIC=weight.dtype == torch.bfloat16,
    )


@without_autocast
def make_change(stored: Tensor, change: Tensor, layer: Layer, first: int) -> None:
    """D of some permuted rows of a layer, from `first` on, a multiple of the rows' block.

    Args:
        stored: S [height, width]; of both sides it is written.
        change: D, like it; written. Columns behind the last block are not, where rows stay.
        layer: with the deltas.
        first: the number of the first row.
    """
    _, side_in, side_out = layer
    height, width = stored.shape
    if side_out is not None:
        b = side_out.block
        begin = first // b
        deltas = side_out.deltas[begin : begin + height // b]
        end = len(deltas) * b
        blocks = len(deltas), b, width
        torch.bmm(deltas, stored[:end].view(blocks), out=change[:end].view(blocks))
        change[end:].zero_()
    if side_in is not None:
        if side_out is not None:
            stored += change
        shape = height, side_in.blocks, side_in.block
        columns, changed = (
            matrix[:, : shape[1] * shape[2]].view(shape).transpose(0, 1)
            for matrix in (stored, change)
        )
        if side_out is None:
            torch.bmm(columns, side_in.deltas.mT, out=changed)
        else:
            changed.baddbmm_(columns, side_in.deltas.mT)
