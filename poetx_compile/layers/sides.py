"""The sides of a prepared layer: how many blocks of rotations each has, and of what size."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from poetx_compile.layers.permutation import Permutation


def side_blocks(size: int, block_size: int) -> tuple[int, int]:
    """(number of blocks, b) of a side: a side shorter than b is one block; size 1 has no block."""
    b = min(size, block_size)
    return (0, 1) if size < 2 else (size // b, b)


class Side(NamedTuple):
    """One side of a layer: its packed skew parameter, its permutation, and its blocks of size b."""

    name: str
    skew: nn.Parameter
    permutation: Permutation
    blocks: int
    block: int

    @property
    def elements(self) -> int:
        """Of its rotations, unpacked."""
        return self.blocks * self.block**2
