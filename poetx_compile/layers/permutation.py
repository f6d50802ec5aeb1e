"""Seeded permutations, drawn alike by every process, and the modules that hold them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from poetx_compile.layers.aside import Aside, set_aside

CHUNK = 64
"""Most columns in a chunk of ``permutation="chunked"``: 128 bytes of bf16, one line of a cache.
Gathering runs of 16 columns costs a kernel 1.4 times the plain one, of 64 nothing (measured)."""

_CHUNKS_A_BLOCK = 4
"""Chunks that a block of rotations holds at least: fewer would hardly mix."""


def chunk_size(size: int, kind: str, block: int = _CHUNKS_A_BLOCK * CHUNK) -> int:
    """c: how many neighbouring coordinates of `size` a permutation of `kind` keeps together.

    1 for ``"random"``. For ``"chunked"`` the largest power of two up to `CHUNK` and a quarter of
    `block` (the smallest block size of the sides) that divides `size` into at least two chunks; 1
    where there is none. It depends on nothing else, so that a pair keeps its shape from draw to
    draw, and compiled code its input.

    All chunks are alike and there are two at least, so a chunk can come to stand anywhere: no
    coordinate is left over by the blocks for ever.
    """
    chunk = CHUNK if kind == "chunked" else 1
    while chunk > 1 and chunk * _CHUNKS_A_BLOCK > block:
        chunk //= 2
    while chunk > 1 and (size % chunk != 0 or size == chunk):
        chunk //= 2
    return chunk


def draw_permutation(
    size: int,
    *,
    seed: int,
    draw: int,
    group: int,
    kind: str,
    block: int = _CHUNKS_A_BLOCK * CHUNK,
) -> Tensor:
    """The permutation pair of a group: int64 [2, size // c], of the chunks of c coordinates.

    Row 0 is the permutation, row 1 its inverse; c is `chunk_size` of size, kind and block.

    Args:
        size: number of coordinates.
        seed: `POETXConfig.seed`.
        draw: 0 is the identity; every redraw takes the next number.
        group: id of the sides that share this permutation.
        kind: ``"random"`` or ``"chunked"`` (`POETXConfig.permutation`).
        block: the smallest block size of the sides.

    A function of its arguments alone, on the CPU: no global generator is read or advanced, no
    default device is followed.
    """
    chunks = size // chunk_size(size, kind, block)
    identity = torch.arange(chunks, device="cpu")
    permutation = identity
    if draw > 0:
        key = hashlib.sha256(f"{seed}/{draw}/{group}/{size}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "little") >> 1)
        permutation = torch.randperm(chunks, generator=generator, device="cpu")
    inverse = torch.empty_like(permutation).scatter_(0, permutation, identity)
    return torch.stack([permutation, inverse])


@torch.no_grad()
def redraw_all(permutations: Iterable[Permutation]) -> dict[Permutation, Tensor]:
    """Set the next draw of every permutation, in place, in one transfer for all of one shape.

    Returns:
        For each permutation its new coordinates in terms of those it had before: int64 [size], so
        that ``x[..., index]`` is in the new order where x is in the old one.
    """
    alike: dict[tuple, list[Permutation]] = defaultdict(list)
    for permutation in dict.fromkeys(permutations):
        pair = permutation.pair
        alike[pair.device, permutation.size, pair.shape[1]].append(permutation)
    composed: dict[Permutation, Tensor] = {}
    for (device, size, chunks), members in alike.items():
        inverses = torch.stack([p.pair[1] for p in members])
        draws = torch.stack([p.peek(p.seed, p.draw + 1) for p in members]).to(device)
        torch._foreach_copy_([p.pair for p in members], list(draws.unbind()))
        for permutation in members:
            permutation.draw += 1
        # By chunks, which come from whole chunks, then by the coordinates in them.
        sources = inverses.gather(1, draws[:, 0])
        chunk = size // chunks
        within = torch.arange(chunk, device=device)
        indices = (sources.unsqueeze(-1) * chunk + within).flatten(1)
        composed |= zip(members, indices.unbind(), strict=True)
    return composed


class Permutation(nn.Module):
    """The permutation of a group of sides: one module, shared by every layer of the group.

    Being a module keeps the sharing through ``model.to(...)`` and `copy.deepcopy`. The pair is not
    saved: it follows from (seed, draw, group).
    """

    pair: Tensor

    seed = Aside()
    draw = Aside()

    def __init__(
        self,
        size: int,
        group: int,
        *,
        seed: int,
        draw: int,
        kind: str,
        block: int = _CHUNKS_A_BLOCK * CHUNK,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.size, self.group, self.seed, self.draw, self.kind = size, group, seed, draw, kind
        self.block = block
        self.register_buffer("pair", self.peek(seed, draw).to(device), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_aside": dict(vars(self)["_aside"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        set_aside(self)

    def peek(self, seed: int, draw: int) -> Tensor:
        """The pair that `redraw` would set, on the CPU."""
        return draw_permutation(
            self.size, seed=seed, draw=draw, group=self.group, kind=self.kind, block=self.block
        )

    @torch.no_grad()
    def redraw(self, seed: int, draw: int) -> None:
        """Set the pair of (seed, draw) in place; nothing happens where it is set already."""
        if (seed, draw) != (self.seed, self.draw):
            self.pair.copy_(self.peek(seed, draw))
            self.seed, self.draw = seed, draw

    @property
    def chunk(self) -> int:
        """c: how many neighbouring coordinates stay together."""
        return self.size // self.pair.shape[1]

    def move_to(self, device: torch.device) -> None:
        """Be on `device`: drawn there again, for the pair of a module on meta has no values."""
        if device != self.pair.device:
            self.pair = self.peek(self.seed, self.draw).to(device)

    def pair_on(self, device: torch.device) -> Tensor:
        """The pair on another device; drawn there where the module is on meta."""
        if self.pair.is_meta and device != self.pair.device:
            return self.peek(self.seed, self.draw).to(device)
        return self.pair.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Permutation:
        # Only a change of device is followed: `to_empty` leaves no garbage behind, and a cast of
        # all buffers (`Module.type`) leaves indices.
        self.move_to(fn(self.pair).device)
        return self

    def extra_repr(self) -> str:
        return f"size={self.size}, group={self.group}, draw={self.draw}"


Moves = Mapping[Permutation, Tensor]
"""What `redraw_all` returns: permutations, and where their new coordinates were before."""
