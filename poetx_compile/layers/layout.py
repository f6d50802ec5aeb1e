"""`Layout`: what the saved tensors of a prepared weight mean, as the buffer ``layout`` holds it."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from poetx_compile import ops
from poetx_compile.errors import IncompatibleStateError
from poetx_compile.layers.permutation import draw_permutation
from poetx_compile.ops.gains import scaled

FORMAT = 3
SIZE = 11
"""Entries of the buffer."""

_KINDS = ("random", "chunked")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Everything about a prepared weight that its tensors do not show.

    Attributes:
        seed, draw_in, draw_out, group_in, group_out, kind: of the permutations
            (`draw_permutation`). A side of one block keeps its draw while others are redrawn.
        order: k of the Cayley-Neumann expansion, ``None`` for the exact transform.
        block_in, block_out: b of the configuration; a shorter side has one block of its own size.
        natural: the weight is stored in its natural order, and its rotations are zero: the merged
            form. Permutations say which coordinates form the blocks all the same.
    """

    seed: int
    draw_in: int
    draw_out: int
    group_in: int
    group_out: int
    kind: str
    order: int | None
    block_in: int
    block_out: int
    natural: bool = False

    def values(self) -> list[int]:
        """Format, seed, draws, groups, kind, order (0: exact), block sizes, checksum of these.

        The kind is that of the permutations, and one of `_KINDS` further on for the natural order.
        """
        draws, groups = (self.draw_in, self.draw_out), (self.group_in, self.group_out)
        blocks = self.block_in, self.block_out
        kind, order = _KINDS.index(self.kind) + len(_KINDS) * self.natural, self.order or 0
        values = [FORMAT, self.seed, *draws, *groups, kind, order, *blocks]
        return [*values, _checksum(values)]

    def tensor(self) -> Tensor:
        """The buffer: `values`, int64 [11], on the CPU."""
        return torch.tensor(self.values(), dtype=torch.int64, device="cpu")

    @classmethod
    def of(cls, saved: Tensor, name: str) -> Layout:
        """The layout in a saved buffer; `name` is for the message.

        Raises:
            IncompatibleStateError: another version of this package saved it, or it was changed.
        """
        version, *values = saved.tolist()
        if version != FORMAT:
            raise IncompatibleStateError(
                f"{name} has format {version}, this version of poetx_compile reads {FORMAT}: load "
                "it with the version that saved it, merge and export"
            )
        *values, checksum = values
        if checksum != _checksum([version, *values]):
            raise IncompatibleStateError(
                f"{name} is not as it was saved: if this state is an average, average "
                "poetx.plain_state_dict(model) instead"
            )
        seed, draw_in, draw_out, group_in, group_out, kind, order, block_in, block_out = values
        draws, groups, blocks = (draw_in, draw_out), (group_in, group_out), (block_in, block_out)
        natural, kind = divmod(kind, len(_KINDS))
        return cls(seed, *draws, *groups, _KINDS[kind], order or None, *blocks, bool(natural))

    def draw(self, side: str) -> int:
        """The draw of side ``"in"`` or ``"out"``."""
        return self.draw_in if side == "in" else self.draw_out

    def pair(self, side: str, size: int, device: torch.device) -> Tensor:
        """The permutation pair of side ``"in"`` or ``"out"``, of `size` coordinates."""
        return draw_permutation(
            size,
            seed=self.seed,
            draw=self.draw(side),
            group=self.group_in if side == "in" else self.group_out,
            kind=self.kind,
            block=min(self.block_in, self.block_out),
        ).to(device)

    def effective(
        self,
        stored: Tensor,
        *skews: Tensor,
        gains: tuple[Tensor | None, Tensor | None] = (None, None),
        scale: Tensor | None = None,
    ) -> Tensor:
        """The effective weight of saved tensors; in its natural order, the stored weight itself,
        but for gains. An int8 weight comes with its scales."""
        if self.natural:
            return scaled(stored, *gains).to(stored.dtype)
        (n, m), device = stored.shape, stored.device
        skew_in, skew_out = skews
        return ops.orthogonal_equivalence(
            stored,
            skew_in,
            skew_out,
            self.pair("in", m, device),
            self.pair("out", n, device),
            min(m, self.block_in),
            min(n, self.block_out),
            self.order,
            *gains,
            scale,
        )

    def differences(self, other: Layout) -> list[str]:
        """What a model of layout `self` cannot take over from a checkpoint of layout `other`.

        Seed and draws are no difference: the model takes those of the checkpoint. Nor is the form,
        which is converted.
        """
        mine, theirs = self._shared(), other._shared()
        return [
            f"{key} {theirs[key]} was saved, the model has {mine[key]}"
            for key in mine
            if mine[key] != theirs[key]
        ]

    def _shared(self) -> dict[str, Any]:
        return {
            "block_size": (self.block_in, self.block_out),
            "neumann_order": self.order or "none (cayley='exact')",
            "permutation": self.kind,
            "permutation groups": (self.group_in, self.group_out),
        }


def _checksum(values: list[int]) -> int:
    """48 bits: more than an average in floating point, however little it moves, leaves alone."""
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:6], "little")
