"""`transport`: the moments of rotations follow their planes when permutations are drawn again.

The plane of a packed value is a pair (i, j) of coordinates. Where a redraw leaves both in one block
the moment of the pair goes to its new place, and it changes its sign where the two come to stand in
the other order (the skew matrix is stored by its upper triangle). The pairs that a redraw brings
together start anew: a first moment at zero, a second moment at the mean of its side. At zero it
would have them take steps that are too large by the bias of young moments, which a step counter
that goes on does not correct any more: up to 6 times at β₂ = 0.999.

Which of an optimiser's tensors are which, `optim.probe` has tried: those that turn with the
gradient are first moments, those that do not are second ones. State of another shape than the
parameter's (Adafactor's rows and columns) stays as it is.

Every process does the same with whole tensors and keeps its part of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poetx_compile.layers.permutation import Moves
from poetx_compile.layers.sides import Side
from poetx_compile.ops.packing import packed_size
from poetx_compile.optim.momentum import State, put, values

BATCH = 2**22
"""Planes whose sources are found at once: 16 MB an index, of which about eight are alive."""


class _Kind(NamedTuple):
    """What sides must share to be moved in one batch."""

    device: torch.device
    blocks: int
    block: int
    keys: tuple[str, ...]


class Planes(NamedTuple):
    """Where packed values come from.

    Attributes:
        source: int32, the place among the old values; 0 where there is none.
        sign: int8: 1, −1 where the pair has changed its order, 0 for a new pair.
    """

    source: Tensor
    sign: Tensor


@torch.no_grad()
def transport(
    sides: Iterable[Side], moves: Moves, state: Mapping[Any, Any], signed: Mapping[str, bool]
) -> None:
    """Move the moments of `sides` to the planes that they belong to, in place.

    Args:
        sides: with the skew parameters whose state is moved.
        moves: what was redrawn; other sides stay as they are.
        state: of the optimiser, by parameter; moments have the shape of the skew parameter.
        signed: key of a moment → whether it turns with the gradient (`Probed.signed`).

    Collective where moments are sharded: every process has to call it.
    """
    kinds: dict[_Kind, list[tuple[Side, Tensor]]] = defaultdict(list)
    for side in sides:
        own = state.get(side.skew, {})
        keys = tuple(key for key in signed if isinstance(own.get(key), Tensor))
        if side.permutation in moves and side.blocks and keys:
            kind = _Kind(side.skew.device, side.blocks, side.block, keys)
            kinds[kind].append((side, moves[side.permutation][: side.blocks * side.block]))
    for kind, members in kinds.items():
        size = max(1, BATCH // max(1, kind.blocks * packed_size(kind.block)))
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            index = torch.stack([index for _, index in batch])
            _move(kind, index, [state[side.skew] for side, _ in batch], signed)


def _move(kind: _Kind, index: Tensor, states: Sequence[State], signed: Mapping[str, bool]) -> None:
    """Move the moments of sides of one kind, from where `index` [sides, blocks · b] says."""
    sides, packed = len(index), packed_size(kind.block)
    old = {key: torch.cat([values(state, key) for state in states]) for key in kind.keys}
    new = {key: torch.empty_like(before) for key, before in old.items()}
    means = {
        key: before.view(sides, -1).mean(1, dtype=torch.float32).to(before.dtype)
        for key, before in old.items()
        if not signed[key]
    }
    for rows, found in _planes(index, kind.blocks, kind.block):
        same = found.sign != 0
        side = torch.arange(rows.start, rows.stop, device=index.device) // kind.blocks
        for key, before in old.items():
            moved = before.view(-1).index_select(0, found.source.flatten()).view(-1, packed)
            if signed[key]:
                torch.mul(moved, found.sign, out=new[key][rows])
            else:
                new[key][rows] = moved.where(same, means[key][side, None])
    for key, after in new.items():
        for state, part in zip(states, after.split(kind.blocks), strict=True):
            put(state, key, part)


def _planes(index: Tensor, blocks: int, b: int) -> Iterator[tuple[slice, Planes]]:
    """(rows of [sides · blocks], `Planes` of these) of a batch of sides, in bounded memory."""
    sides, packed = len(index), packed_size(b)
    old = index.to(torch.int32).view(sides * blocks, b)
    first = torch.arange(sides, device=index.device, dtype=torch.int32) * blocks
    first = first.repeat_interleave(blocks)[:, None]
    for rows in _slices(sides * blocks, max(1, BATCH // max(1, packed))):
        yield rows, planes(old[rows], first[rows], blocks, b)


def planes(old: Tensor, first: Tensor, blocks: int, b: int) -> Planes:
    """Where the packed values of new blocks come from.

    Args:
        old: int32 [n, b], the old place of each coordinate of n new blocks; places from
            ``blocks · b`` on were in no block.
        first: int32 [n, 1], the first old block of the side among all old blocks.
        blocks: number of blocks of a side.
        b: their size.

    Returns:
        `Planes` [n, b(b−1)/2].
    """
    row, column = torch.triu_indices(b, b, offset=1, device=old.device)
    block, within = old // b, old % b
    # A coordinate that was in no block shares one with none: not with another such one either.
    block = torch.where(
        block < blocks, block, -1 - torch.arange(b, device=old.device, dtype=torch.int32)
    )
    one, other = within[:, row], within[:, column]
    same = block[:, row] == block[:, column]
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    source = (
        (first + block)[:, row] * packed_size(b) + low * (2 * b - low - 1) // 2 + high - low - 1
    )
    return Planes(source.where(same, 0), (other - one).sign().where(same, 0).to(torch.int8))


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
