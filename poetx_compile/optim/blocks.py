"""The skew blocks of a model in batches: blocks of one size together, in bounded bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from poetx_compile.layers.prepared import Layer

ROTATIONS_BYTES = 128 * 2**20
"""Bytes of rotations that are built at once, from as many layers as fit: a launch for each layer
leaves a GPU idle most of the time, and each check of a polar factor waits for it."""

CHUNK_BYTES = 64 * 2**20
"""Bytes of unpacked fp32 blocks in one batch: 256 blocks of 256×256, enough to fill a GPU."""


Item = TypeVar("Item")


def layer_batches(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """The layers in order, in batches whose rotations take `ROTATIONS_BYTES`, or of one layer."""

    def size(layer: Layer) -> int:
        return 4 * sum(side.elements for side in layer[1].sides)

    return bounded(layers, size, ROTATIONS_BYTES)


def bounded(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """The items in order, in batches whose sizes sum up to `limit` at most, or of one item."""
    batch: list[Item] = []
    held = 0
    for item in items:
        more = size(item)
        if batch and held + more > limit:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += more
    if batch:
        yield batch


class BlockKind(NamedTuple):
    """What blocks must share to be in one batch."""

    size: int
    device: torch.device
    dtype: torch.dtype


def by_kind(pairs: Sequence[tuple[Tensor, int]]) -> dict[BlockKind, list[Tensor]]:
    """The packed tensors [blocks, b(b−1)/2] of each kind, in their order."""
    kinds: dict[Any, list[Tensor]] = {}
    for skew, b in pairs:
        kinds.setdefault((b, skew.device, skew.dtype), []).append(skew)
    return {BlockKind(*kind): tensors for kind, tensors in kinds.items()}


def chunks(
    tensors: Sequence[Tensor], block_size: int, limit: int = CHUNK_BYTES
) -> Iterator[list[tuple[int, slice]]]:
    """Split the blocks of several packed tensors into batches of at most `limit` unpacked bytes.

    Yields:
        Lists of (index of the tensor, slice of its blocks): concatenated, a batch. Every block is
        in exactly one; a block larger than `limit` is a batch of its own.
    """
    capacity = max(1, limit // (4 * block_size * block_size))
    batch: list[tuple[int, slice]] = []
    room = capacity
    for index, tensor in enumerate(tensors):
        start, blocks = 0, tensor.shape[0]
        while start < blocks:
            take = min(room, blocks - start)
            batch.append((index, slice(start, start + take)))
            start, room = start + take, room - take
            if room == 0:
                yield batch
                batch, room = [], capacity
    if batch:
        yield batch


def gather(tensors: Sequence[Tensor], batch: Sequence[tuple[int, slice]]) -> Tensor:
    """The blocks of one batch of `chunks`: packed [blocks, b(b−1)/2]."""
    parts = [tensors[index][rows] for index, rows in batch]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scatter(tensors: Sequence[Tensor], batch: Sequence[tuple[int, slice]], value: Tensor) -> None:
    """Write the blocks of one batch of `chunks`: the inverse of `gather`."""
    counts = [rows.stop - rows.start for _, rows in batch]
    torch._foreach_copy_([tensors[i][rows] for i, rows in batch], list(value.split(counts)))
