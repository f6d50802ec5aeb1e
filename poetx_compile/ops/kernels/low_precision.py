"""When and in which sizes the kernels with 2-byte operands run; imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from poetx_compile.ops.kernels.common import operands_in_registers, power_of_two, shared_memory

MAX_BLOCK = 256
"""The largest block whose Q, in 2 bytes, leaves room for anything else in shared memory."""


def _panel() -> int:
    return 32 if operands_in_registers() else 64


@dataclass(frozen=True)
class LowPrecisionTiling:
    """Sizes of these kernels for one block size, and the constants of their launches.

    Args:
        block_size: b, 2 ≤ b ≤ 256.
        panel: rows that go through a chain of products together.
        panel_warps: warps of a chain.
        tile: side of the tiles of a single product. Small ones in short steps let several programs
            share a multiprocessor, and 16 blocks occupy all of them.
        tile_k: columns of an operand in flight.
        stages: of the loads in flight.
    """

    block_size: int
    panel: int = field(default_factory=_panel)
    panel_warps: int = 8
    tile: int = 64
    tile_k: int = 32
    stages: int = 3

    @property
    def padded(self) -> int:
        """N: a power of two."""
        return power_of_two(self.block_size, 16, 256)

    @property
    def panel_rows(self) -> int:
        return min(self.panel, self.padded)

    @property
    def side(self) -> int:
        return min(self.tile, self.padded)

    @property
    def high(self) -> int:
        """How many tiles the programs with the most operands have on top of each other.

        They read fewer bytes for each of their products, if they have registers left.
        """
        return 1 if operands_in_registers() else min(2, self.padded // self.side)

    def panels(self, blocks: Any) -> Any:
        return blocks * (self.padded // self.panel_rows)

    def tiles(self, blocks: Any, high: int = 1) -> Any:
        """Programs of single products whose tiles are `high` times as high as wide."""
        return blocks * ((self.padded // self.side) ** 2 // high)

    def unpacking(self) -> dict[str, Any]:
        """Constants of the kernels of `unpack`, tiles of at most 64×64."""
        tile = min(self.padded, 64)
        return {
            "B": self.block_size,
            "N": self.padded,
            "TILE": tile,
            "num_warps": 4,
            "num_stages": 1,
        }

    def unpacking_programs(self, blocks: Any) -> Any:
        return blocks * (self.padded // min(self.padded, 64)) ** 2

    def chain(self) -> dict[str, Any]:
        """Constants of a kernel that keeps a matrix in shared memory."""
        return {
            "N": self.padded,
            "PANEL": self.panel_rows,
            "num_warps": self.panel_warps if self.padded > 64 else 4,
            "num_stages": 1,
        }

    def product(self) -> dict[str, Any]:
        """Constants of a kernel of single products."""
        return {
            "N": self.padded,
            "TILE": self.side,
            "TILE_K": min(self.tile_k, self.padded),
            "num_warps": 8 if self.side == 128 else 4,
            "num_stages": self._in_flight,
        }

    @property
    def _in_flight(self) -> int:
        return min(self.stages, max(1, self.padded // self.tile_k))

    def shared_bytes(self) -> int:
        """Shared memory of the largest program, at most."""
        chain = self.padded * (self.padded + self.panel_rows)
        # The five operands of a tangent's product, three of them high, and half a stage more.
        step = (3 * self.high + 2) * self.side * min(self.tile_k, self.padded)
        product = step * (2 * self._in_flight + 1) // 2
        return 2 * max(chain, product)


def low_precision_applies(block_size: int, order: int | None) -> bool:
    """Whether the kernels with 2-byte operands take blocks of this size and order here."""
    if order != 3 or not 2 <= block_size <= MAX_BLOCK:
        return False
    return LowPrecisionTiling(block_size).shared_bytes() <= shared_memory()
