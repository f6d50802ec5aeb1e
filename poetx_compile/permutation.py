"""Seeded permutations, drawn alike by every process, and the modules that hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

CHUNK = 16
"""Columns in a chunk of ``permutation="chunked"``: 32 bytes of bf16, one memory sector."""


def draw_permutation(size: int, *, seed: int, draw: int, group: int, kind: str) -> Tensor:
    """The permutation pair of a group: int64 [2, size], row 0 the permutation, row 1 its inverse.

    Args:
        size: number of coordinates.
        seed: `POETXConfig.seed`.
        draw: 0 is the identity; every merge takes the next number.
        group: id of the sides that share this permutation.
        kind: ``"random"``, or ``"chunked"`` for random chunks of 16 coordinates. A shorter last
            chunk takes part, and a size below two chunks is ``"random"``, so that no coordinate
            keeps its place for ever.

    A function of its arguments alone, on the CPU: no global generator is read or advanced, no
    default device is followed.
    """
    permutation = torch.arange(size, device="cpu")
    if draw > 0:
        key = hashlib.sha256(f"{seed}/{draw}/{group}/{size}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "little") >> 1)
        if kind == "chunked" and size >= 2 * CHUNK:
            chunks = permutation.split(CHUNK)
            order = torch.randperm(len(chunks), generator=generator, device="cpu")
            permutation = torch.cat([chunks[i] for i in order])
        else:
            permutation = torch.randperm(size, generator=generator, device="cpu")
    return torch.stack([permutation, permutation.argsort()])


class Permutation(nn.Module):
    """The permutation of a group of sides: one module, shared by every layer of the group.

    Being a module keeps the sharing through ``model.to(...)`` and `copy.deepcopy`. The pair is not
    saved: it follows from (seed, draw, group).
    """

    pair: Tensor

    def __init__(
        self,
        size: int,
        group: int,
        *,
        seed: int,
        draw: int,
        kind: str,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.size, self.group, self.seed, self.draw, self.kind = size, group, seed, draw, kind
        self.register_buffer("pair", self.peek(seed, draw).to(device), persistent=False)

    def peek(self, seed: int, draw: int) -> Tensor:
        """The pair that `redraw` would set, on the CPU."""
        return draw_permutation(self.size, seed=seed, draw=draw, group=self.group, kind=self.kind)

    @torch.no_grad()
    def redraw(self, seed: int, draw: int) -> None:
        """Set the pair of (seed, draw) in place; nothing happens where it is set already."""
        if (seed, draw) != (self.seed, self.draw):
            self.pair.copy_(self.peek(seed, draw))
            self.seed, self.draw = seed, draw

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Permutation:
        # Only a change of device is followed, by drawing the pair again: `to_empty` leaves no
        # garbage behind, and a cast of all buffers (`Module.type`) leaves indices.
        device = fn(self.pair).device
        if device != self.pair.device:
            self.pair = self.peek(self.seed, self.draw).to(device)
        return self

    def extra_repr(self) -> str:
        return f"size={self.size}, group={self.group}, draw={self.draw}"
