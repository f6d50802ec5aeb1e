"""The seal of a stored weight: a few of its entries, to notice that something else has written it.

A stored weight is frozen, and its coordinates are those of its permutations. An average of
parameters (SWA, a Polyak target, an EMA that is copied back) that spans a merge mixes two orders of
coordinates: garbage of the right shape. Most write through ``parameter.data``, which no version
counts, so the values themselves are looked at, a few dozen of them. Who looks: merges, exports, and
the forward where nothing trains, which is how averages are used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from poetx_compile.distributed.shards import local

ENTRIES = 8
"""Of each side, about: 64 entries and more."""

TOLERANCE = 0.01
"""Relative change of the entries that is nobody's business: casts, and the rounding of an average
of equal values. An average across a merge changes them by its rate times 1.4, at each update."""


class Seal(NamedTuple):
    """Some entries of a stored weight as it was left, and its shape in this process."""

    entries: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, stored: Tensor) -> Seal | None:
        """The seal of a weight as it is now; a weight without values has none."""
        weight = local(stored)
        if not _has_values(weight):
            return None
        with torch.inference_mode(False):  # it outlives an evaluation
            return cls(_entries(weight).clone(), weight.shape)

    def broken(self, stored: Tensor) -> Tensor | None:
        """Whether a weight has changed, on its device; ``None`` where it is not comparable."""
        weight = local(stored)
        if not _has_values(weight) or weight.shape != self.shape:  # sharded since
            return None
        entries = self.entries.to(weight.device, torch.float32)
        moved = _entries(weight).float() - entries
        return ~(moved.norm() <= TOLERANCE * entries.norm())


def _has_values(weight: Tensor) -> bool:
    """Whether there is something to compare: not on meta, in fake modes, in an empty shard."""
    return type(weight) is Tensor and not weight.is_meta and weight.numel() > 0


def _entries(weight: Tensor) -> Tensor:
    n, m = weight.shape
    return weight[:: max(1, n // ENTRIES), :: max(1, m // ENTRIES)]
