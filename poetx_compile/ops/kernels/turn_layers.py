"""`turn_weights_` by Triton kernels: the weights of several layers in few launches.

The packed steps of one block size become ``R_in − I`` and ``R_outᵀ − I`` in the same launches. Then
weights of one shape are turned together: from one side by `turn_side`, from both by `turn_panels`,
up to b = 256. Beyond, each weight takes two launches of `turn_weight`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poetx_compile.ops.kernels import turn_panels, turn_weight
from poetx_compile.ops.kernels.cayley import delta
from poetx_compile.ops.kernels.common import (
    MULTIPROCESSORS,
    ceil_div,
    chunk_length,
    input_precision,
    is_fused,
    launch,
    operands_in_registers,
    power_of_two,
    run_length,
    shared_memory,
)
from poetx_compile.ops.kernels.layers import table_of, together
from poetx_compile.ops.kernels.permute import permute_columns
from poetx_compile.ops.kernels.rotate import resident_bytes, resident_stages
from poetx_compile.ops.kernels.rounding import signed
from poetx_compile.ops.kernels.turn_side import (
    turn_columns_resident_kernel,
    turn_columns_tiled_kernel,
    turn_rows_resident_kernel,
    turn_rows_tiled_kernel,
)
from poetx_compile.ops.turn_weight import Turn, scale_rotation_

RESIDENT_TILE = 64
"""Rows (columns) of a step of the resident kernels, as in `rotate` and `fold`."""


class Tiles(NamedTuple):
    """Of the tiled kernels."""

    along: int
    """A tile along the side that stays."""
    across: int
    """Along the blocks, at most."""
    tile_k: int
    """A step of a sum, at most."""
    warps: int
    stages: int = 2
    """Steps in flight, beside the one that waits for what a gather finds, where one does."""
    programs: int = 2
    """Of a multiprocessor: one computes while the other loads, draws bits or writes."""


NARROW = Tiles(64, 256, 64, 4), Tiles(128, 128, 64, 4)
"""On bf16. The first read fewer bytes, the others pad blocks less."""
LARGE = Tiles(128, 256, 64, 8, stages=4, programs=1)
"""On bf16, of blocks above 512 whose steps lie in chunks: three fifths of what `NARROW` reads."""
UNALIGNED = Tiles(64, 128, 64, 8)
"""On bf16 whose blocks begin anywhere: addresses and bits of single elements take registers."""
WIDE = Tiles(64, 64, 32, 4)
"""On fp32."""


class Side(NamedTuple):
    """The deltas of one side of a layer: `blocks` of `stack`, from `first` on."""

    stack: Tensor  # [all blocks, b, b]
    first: int
    blocks: int

    @property
    def deltas(self) -> Tensor:
        return self.stack[self.first : self.first + self.blocks]


class Layer(NamedTuple):
    """A weight and what it is turned by; ``None`` is a side that stays."""

    turn: Turn
    side_in: Side | None
    side_out: Side | None


def turn_weight_(
    weight: Tensor,
    skew_in: Tensor,
    skew_out: Tensor,
    perm_in: Tensor,
    perm_out: Tensor,
    block_in: int,
    block_out: int,
    order: int | None,
    seed: int,
    step: int,
    layer: int,
    apply: Tensor | None,
    scale: Tensor | None,
) -> None:
    """`ops.turn_weight_` of one weight; the arguments are those of the op."""
    given = weight, skew_in, skew_out, perm_in, perm_out, block_in, block_out, order, layer, scale
    turn = Turn(*given)
    turn_layers([(turn, turn.kind)], seed, step, apply)


def turn_layers(
    turns: Sequence[tuple[Turn, Hashable]], seed: int, step: int, apply: Tensor | None
) -> None:
    """`turn_weights_` of bf16 and fp32 weights, order 3, contiguous.

    Args:
        turns: with their kinds, or what stands for these.
        seed, step, apply: those of `turn_weights_`.
    """
    groups: dict[Any, list[list[Layer]]] = defaultdict(list)
    for layer, (_, kind) in zip(with_deltas([turn for turn, _ in turns]), turns, strict=True):
        alike = groups[kind]
        for group in alike:
            if together(group[0].turn.weight, layer.turn.weight):
                group.append(layer)
                break
        else:
            alike.append([layer])
    for alike in groups.values():
        for group in alike:
            _turn_alike(group, seed, step, apply)


def with_deltas(turns: Sequence[Turn]) -> list[Layer]:
    """The layers with their R − I, made of all steps of one block size and dtype at once."""
    stacks: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for turn in turns:
        dtype, ((skew_in, b_in), (skew_out, b_out)) = turn.weight.dtype, turn.steps
        if skew_in is not None:
            stacks[b_in, dtype][0].append(skew_in)
        if skew_out is not None:
            stacks[b_out, dtype][1].append(skew_out)
    sides: dict[Any, tuple[Iterator[Side], Iterator[Side]]] = {}
    for (b, dtype), (plain, transposed) in stacks.items():
        packed = _joined([*plain, *transposed])
        last = sum([skew.shape[0] for skew in transposed])
        made = delta(packed, b, dtype, last)
        first = packed.shape[0] - last
        sides[b, dtype] = _sides(made, 0, plain), _sides(made, first, transposed)
    layers = []
    for turn in turns:
        dtype, ((skew_in, b_in), (skew_out, b_out)) = turn.weight.dtype, turn.steps
        side_in = None if skew_in is None else next(sides[b_in, dtype][0])
        side_out = None if skew_out is None else next(sides[b_out, dtype][1])
        scaled = side_in or side_out
        if turn.scale is not None and scaled is not None:
            scale_rotation_(scaled.deltas, turn.scale)
        layers.append(Layer(turn, side_in, side_out))
    return layers


def _sides(stack: Tensor, first: int, skews: Sequence[Tensor]) -> Iterator[Side]:
    """The sides whose deltas are in the stack, one after another."""
    for skew in skews:
        blocks = skew.shape[0]
        yield Side(stack, first, blocks)
        first += blocks


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after another along the first dimension: the same memory where they lie in it so."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or not tensor.is_contiguous():
            return torch.cat(list(tensors))
        end += tensor.nbytes
    if end > first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
        return torch.cat(list(tensors))  # neighbours by chance
    blocks = sum([tensor.shape[0] for tensor in tensors])
    return first.as_strided((blocks, *first.shape[1:]), first.stride())


def _turn_alike(group: Sequence[Layer], seed: int, step: int, apply: Tensor | None) -> None:
    """Turn weights of one kind from the sides that have steps."""
    turn, side_in, side_out = group[0]
    if side_in is not None and side_out is not None:
        stacks = side_in.stack, side_out.stack
        if turn_panels.fits(turn.weight, *stacks, turn.perm_in):
            of_kind = turn.weight, *stacks, turn.perm_in, turn.perm_out
            blocks = side_in.blocks, side_out.blocks
            turn_panels.turn_panels(*of_kind, _table(group), blocks, seed, step, apply)
            return
        for turn, one, other in group:
            assert one is not None
            assert other is not None
            perms, counters = (turn.perm_in, turn.perm_out), (seed, step, turn.layer)
            turn_weight.turn_by_deltas(
                turn.weight, one.deltas, other.deltas, *perms, *counters, apply
            )
    elif side_out is not None:
        _turn_side(group, side_out, seed, step, apply, columns=False)
    elif side_in is not None:
        b, width = side_in.stack.shape[1], turn.weight.shape[1]
        if is_fused(turn.perm_in, width, b):
            _turn_side(group, side_in, seed, step, apply, columns=True)
            return
        whole = turn.perm_in.new_zeros(2, 1)  # the order that a weight is in already
        for turn, *sides in group:  # single columns: a pass of their own, there and back
            matrix = permute_columns(turn.weight, turn.perm_in, False)
            there = Layer(turn._replace(weight=matrix, perm_in=whole), *sides)
            _turn_side([there], side_in, seed, step, apply, columns=True)
            turn.weight.copy_(permute_columns(matrix, turn.perm_in, True))


def _turn_side(
    group: Sequence[Layer], side: Side, seed: int, step: int, apply: Tensor | None, *, columns: bool
) -> None:
    """Turn weights from one side in one launch: their columns, or their rows.

    Args:
        group: the layers.
        side: the first one's.
        seed, step, apply: those of the op.
        columns: whether columns turn.
    """
    turn = group[0].turn
    weight = turn.weight
    table = _table(group)
    (rows, width), b = weight.shape, side.stack.shape[1]
    length = rows if columns else width
    narrow = weight.element_size() == 2
    fixed = {
        "B": b,
        "ROW_CHUNK": chunk_length(turn.perm_out, rows),
        "CHUNK": chunk_length(turn.perm_in, width),
        "RUN": run_length(width, b, turn.perm_in) if columns else 1,
        "HAS_APPLY": apply is not None,
        "STOCHASTIC": weight.dtype == torch.bfloat16,
    }
    pointers = weight, side.stack, turn.perm_out, turn.perm_in, table
    apply = table if apply is None else apply.to(torch.int32)
    sizes = rows, width, side.blocks, len(group)
    counters = signed(seed), signed(seed >> 32), signed(step)
    if narrow and _resident(b, width):
        padded = power_of_two(b, 128, 256)
        units = side.blocks * len(group)
        # One wave of programs; of many blocks, pieces that are long enough for theirs to be read.
        wave = MULTIPROCESSORS * (256 // padded) // units
        splits = max(1, wave, min(4, length // 512))
        launch(
            turn_columns_resident_kernel if columns else turn_rows_resident_kernel,
            units * splits,
            *(*pointers, apply, *sizes, splits),
            ceil_div(length, splits * RESIDENT_TILE) * RESIDENT_TILE,
            *counters,
            **fixed,
            PADDED=padded,
            TILE=RESIDENT_TILE,
            num_warps=8 if padded == 256 else 4,
            num_stages=resident_stages(),
        )
        return
    chunk = fixed["CHUNK" if columns else "ROW_CHUNK"]
    chosen = _tiles(b, width, chunk) if narrow else WIDE
    tile, tile_k = power_of_two(b, 16, chosen.across), power_of_two(b, 16, chosen.tile_k)
    tiles = -(-b // tile)
    items = -(-length // chosen.along) * side.blocks * len(group)
    programs = items if tiles == 1 else min(items, chosen.programs * MULTIPROCESSORS)
    in_chunks = chunk % tile_k == b % tile_k == 0
    saved = weight.new_empty(programs, tiles, chosen.along, tile) if tiles > 1 else weight
    launch(
        turn_columns_tiled_kernel if columns else turn_rows_tiled_kernel,
        programs,
        *(*pointers, apply, saved, *sizes, programs, *counters),
        **fixed,
        TILES=tiles,
        TILE_M=chosen.along if columns else tile,
        TILE_N=tile if columns else chosen.along,
        TILE_K=tile_k,
        STAGES=chosen.stages + (not in_chunks),
        STEPS=power_of_two(-(-b // tile_k), 1, 1 << 20),
        IN_CHUNKS=in_chunks,
        PRECISION=input_precision(),
        num_warps=8 if operands_in_registers() else chosen.warps,
        num_stages=3,
    )


def _tiles(b: int, width: int, chunk: int) -> Tiles:
    """Those for bf16 that suit blocks of b of rows of `width`, gathered by chunks."""
    if not _aligned(b, width):
        return UNALIGNED
    streaming = 2 * LARGE.stages * (LARGE.along + LARGE.across) * LARGE.tile_k
    fits = streaming <= shared_memory() and not operands_in_registers()
    if fits and b > 512 and chunk % LARGE.tile_k == b % LARGE.tile_k == 0:
        return LARGE
    large, small = (-(-b // tiles.across) * tiles.across for tiles in NARROW)
    return NARROW[0] if 4 * large <= 5 * small else NARROW[1]


def _resident(b: int, width: int) -> bool:
    """Whether blocks of b stay in shared memory while the weight streams by."""
    return 64 < b <= 256 and _aligned(b, width) and resident_bytes(b) <= shared_memory()


def _aligned(b: int, width: int) -> bool:
    return b % 8 == 0 and width % 16 == 0


def _table(group: Sequence[Layer]) -> Tensor:
    turns, sides_in, sides_out = zip(*group, strict=True)
    return table_of(
        [turn.weight for turn in turns],
        [turn.perm_out for turn in turns],
        [turn.perm_in for turn in turns],
        [turn.layer for turn in turns],
        [0 if side is None else side.first for side in sides_in],
        [0 if side is None else side.first for side in sides_out],
    )
