"""Does it fit: how the peak of a step grows with the batch, and what is needed for a given one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from poetx_compile.errors import ConfigError
from poetx_compile.inspect.memory.step import StepMemory

GIB = 2**30
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_CONTEXT = GIB // 2
"""What the CUDA context takes."""

_USABLE = 0.96
"""The part of the rest that an allocator fills before fragments stop it."""

_MOST = 2**20


def parse_memory(value: str | int) -> int:
    """Bytes of ``"80GB"``, ``"79.6GiB"`` or a number; a GB is 2³⁰, as cards are named.

    Raises:
        ConfigError: it is nothing of the kind.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])i?B?\s*", str(value), re.IGNORECASE)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"gpu_memory = {value!r} is not allowed: use a size such as '80GB'")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def usable(gpu_memory: int) -> int:
    """The bytes that tensors can have of a GPU."""
    return int(max(0, gpu_memory - _CONTEXT) * _USABLE)


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most that is alive in a step, and when; on top of weights, state and inputs.

    Attributes:
        constant: bytes of weights and of the optimiser's state.
        inputs: bytes of one batch.
        update: bytes that the optimiser's step takes for a while.
        step: the rest.
    """

    constant: int
    inputs: int
    update: int
    step: StepMemory

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by the part of a step."""
        return {
            "forward": self.step.forward,
            "backward": max(self.step.backward),
            "optimizer step": self.step.gradients + self.update,
        }

    @property
    def where(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def total(self) -> int:
        return self.constant + self.inputs + self.parts[self.where]


def with_budget(fast: Peak, mem: Peak, fraction: float) -> Peak:
    """At most `fraction` of what `fast` keeps: in between `fast` and `mem`, by what is kept."""
    kept = min(fast.step.kept, max(mem.step.kept, int(fraction * fast.step.kept)))
    span = fast.step.kept - mem.step.kept
    share = (kept - mem.step.kept) / span if span > 0 else 1.0

    def between(a: int, b: int) -> int:
        return int(b + share * (a - b))

    backward = max(fast.step.backward), max(mem.step.backward)
    step = StepMemory(
        kept,
        fast.step.gradients,
        between(fast.step.forward, mem.step.forward),
        (between(*backward),),
    )
    return dataclasses.replace(fast, step=step)


def budget_for(limit: int, fast: Peak, mem: Peak) -> float | None:
    """The largest `memory_budget`, in hundredths, whose peak is within `limit`."""
    hundredths = range(99, 0, -1)
    fitting = (f / 100 for f in hundredths if with_budget(fast, mem, f / 100).total <= limit)
    found = next(fitting, None)
    if found is None or found * fast.step.kept < mem.step.kept:
        return None
    return found


class Batches:
    """The peak at any batch size, from those at one or two."""

    def __init__(self, measured: dict[int, Peak]):
        self.measured = dict(sorted(measured.items()))

    def at(self, batch: int) -> int:
        """Linear in the batch, part by part; from one measurement what is no gradient scales."""
        (first, one), *_ = self.measured.items()
        (last, two) = list(self.measured.items())[-1]
        inputs = one.inputs * batch // first
        if first == last:
            ratio = batch / first
            gradients = one.step.gradients
            parts = [
                one.step.forward * ratio,
                *(min(x, gradients) + max(x - gradients, 0) * ratio for x in one.step.backward),
            ]
        else:
            share = (batch - first) / (last - first)
            pairs = [(one.step.forward, two.step.forward)]
            if len(one.step.backward) == len(two.step.backward):
                pairs += zip(one.step.backward, two.step.backward, strict=True)
            else:
                pairs.append((max(one.step.backward), max(two.step.backward)))
            parts = [a + share * (b - a) for a, b in pairs]
        constant = one.step.gradients + one.update
        return one.constant + inputs + int(max(*parts, constant))

    def largest(self, limit: int) -> int:
        """The largest batch whose peak is within `limit`; 0 where there is none."""
        low, high = 0, _MOST
        while low < high:
            middle = (low + high + 1) // 2
            if self.at(middle) <= limit:
                low = middle
            else:
                high = middle - 1
        return low


def in_units(sizes: Sequence[int]) -> tuple[str, list[str]]:
    """A unit for sizes in bytes, and their numbers in it: none that is not zero reads as zero."""
    largest = max(sizes, default=0)
    unit, size = next(
        ((u, s) for u, s in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)) if largest >= s),
        ("bytes", 1),
    )
    return unit, [number(n / size) for n in sizes]


def number(value: float) -> str:
    """Three digits and more: ``1,234``, ``12.3``, ``0.50``, ``0.0012``."""
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
