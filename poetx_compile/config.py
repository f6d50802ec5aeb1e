"""`POETXConfig`: what is trained and how, as one JSON-able dataclass."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from poetx_compile.errors import ConfigError

_CHOICES: dict[str, tuple[str, ...]] = {
    "cayley": ("neumann", "exact"),
    "merge_rotation": ("polar", "plain"),
    "moments": ("keep", "reset"),
    "permutation": ("random", "chunked"),
    "variant": ("fast", "mem"),
    "formulation": ("auto", "input_centric", "folded"),
    "base": ("dense",),
}

FOLD_ANGLE = 0.25
"""Radians up to which rotations may be folded: the series of their inverse (docs/numerics.md)."""


@dataclasses.dataclass(frozen=True)
class POETXConfig:
    """Configuration of POET-X (arXiv 2603.05500).

    Args:
        block_size: b, the size of the rotation blocks; an int, or ``(in, out)`` for the two sides
            of a weight. A side shorter than b uses one block of its own size.
        neumann_order: k ≥ 1 of the Cayley-Neumann expansion ``G = (I+Q)(I+Q+…+Q^k)``.
        cayley: ``"neumann"``, or ``"exact"`` for ``G = (I+Q)(I−Q)⁻¹`` by a batched solve.
        merge_interval: optimiser steps between two merge-then-reinitialise.
        max_angle: the angle guard, in radians: merge early rather than let the spectral norm of
            any Q exceed it; ``None`` turns the guard off.
        merge_rotation: ``"polar"`` merges the polar factor of G (exactly orthogonal), ``"plain"``
            merges G itself.
        moments: ``"keep"`` or ``"reset"`` the optimiser's moments of the skew parameters at a
            merge.
        permutation: ``"random"``, or ``"chunked"`` for random chunks of up to 64 neighbouring
            coordinates, which kernels gather at no extra cost.
        variant: what the backward keeps: ``"fast"`` keeps what costs time to recompute, ``"mem"``
            recomputes what costs memory to keep (docs/passes/recompute.md).
        formulation: ``"input_centric"`` rotates activations, ``"folded"`` builds the effective
            weight once a call; ``"auto"`` takes the cheaper one for each side of each layer.
        keep_in_eval: keep the effective weights while an eager model is evaluated (`model.eval()`,
            no gradients) instead of computing them at every call: a second copy of the prepared
            weights, freed by `model.train()` or the next optimiser step.
        memory_budget: ``None``, or how much may be kept between forward and backward at most: a
            fraction in (0, 1] of the bytes that variant ``"fast"`` keeps. What is cheapest to
            recompute goes first: norms and activations, then folded weights, then products.
            ``"mem"`` keeps the least there is, and takes no budget.
        seed: seed of the permutations; never touches the global generators.
        target_modules: which `nn.Linear` to convert: ``None`` or ``"all-linear"`` for all eligible
            ones, a regular expression that must match the whole name, or a list of names or name
            endings (``"q_proj"`` matches ``layers.0.q_proj``).
        exclude_modules: names or name endings that are left as they are.
        normalize_rows: divide each row of the weight by its norm at `prepare` (training from
            scratch only: the model's outputs change).
        base: ``"dense"``: the frozen weight keeps its dtype.

    Raises:
        ConfigError: (a `ValueError`) names the field, its value and the allowed range.
    """

    block_size: int | tuple[int, int] = 256
    neumann_order: int = 3
    cayley: str = "neumann"
    merge_interval: int = 200
    max_angle: float | None = 0.25
    merge_rotation: str = "polar"
    moments: str = "keep"
    permutation: str = "random"
    variant: str = "fast"
    formulation: str = "auto"
    keep_in_eval: bool = True
    memory_budget: float | None = None
    seed: int = 0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: Sequence[str] = ("lm_head",)
    normalize_rows: bool = False
    base: str = "dense"

    def __post_init__(self) -> None:
        block = self.block_size
        if isinstance(block, list):  # JSON has no tuples
            object.__setattr__(self, "block_size", tuple(block))
            block = self.block_size
        sides = block if isinstance(block, tuple) else (block, block)
        if len(sides) != 2 or not all(_is_int(b) and b >= 2 for b in sides):
            raise _bad("block_size", block, "an int ≥ 2, or a pair (in, out) of them")
        for name in ("neumann_order", "merge_interval"):
            if not (_is_int(getattr(self, name)) and getattr(self, name) >= 1):
                raise _bad(name, getattr(self, name), "an int ≥ 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _bad(name, getattr(self, name), "one of " + ", ".join(map(repr, choices)))
        angle = self.max_angle
        if angle is not None and not (_is_number(angle) and 0 < angle < 1):
            raise _bad("max_angle", angle, "None, or radians in (0, 1)")
        if self.formulation == "folded" and not self.may_fold:
            allowed = f"at most {FOLD_ANGLE} with formulation='folded' (or cayley='exact')"
            raise _bad("max_angle", angle, allowed)
        budget = self.memory_budget
        if budget is not None and not (_is_number(budget) and 0 < budget <= 1):
            raise _bad("memory_budget", budget, "None, or a fraction in (0, 1]")
        if budget is not None and self.variant == "mem":
            allowed = "None with variant='mem', which keeps the least there is, or variant='fast'"
            raise _bad("memory_budget", budget, allowed)
        if not (_is_int(self.seed) and 0 <= self.seed < 2**63):
            raise _bad("seed", self.seed, "an int in [0, 2⁶³)")
        for name in ("normalize_rows", "keep_in_eval"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "a bool")
        target = self.target_modules
        if not (target is None or isinstance(target, str) or _is_names(target)):
            raise _bad("target_modules", target, "None, a regular expression or a list of names")
        if isinstance(target, str):
            try:
                re.compile(target)
            except re.error as error:
                allowed = f"a valid regular expression ({error})"
                raise _bad("target_modules", target, allowed) from error
        if isinstance(target, list):
            object.__setattr__(self, "target_modules", tuple(target))
        if not _is_names(self.exclude_modules):
            raise _bad("exclude_modules", self.exclude_modules, "a list of names")
        object.__setattr__(self, "exclude_modules", tuple(self.exclude_modules))

    @property
    def block_in(self) -> int:
        """b of the input side."""
        return self.block_size[0] if isinstance(self.block_size, tuple) else self.block_size

    @property
    def block_out(self) -> int:
        """b of the output side."""
        return self.block_size[1] if isinstance(self.block_size, tuple) else self.block_size

    @property
    def smallest_block(self) -> int:
        """b of the side with the smaller blocks."""
        return min(self.block_in, self.block_out)

    @property
    def order(self) -> int | None:
        """The order given to the ops: k, or ``None`` for the exact Cayley transform."""
        return None if self.cayley == "exact" else self.neumann_order

    @property
    def may_fold(self) -> bool:
        """Whether the angles stay where the folded formulation may invert rotations by a series."""
        within = self.max_angle is not None and self.max_angle <= FOLD_ANGLE
        return within or self.cayley == "exact"

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values; `from_dict` gives the same configuration back."""
        out = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> POETXConfig:
        """The inverse of `to_dict`; an unknown field raises `ConfigError`."""
        if not isinstance(values, dict):
            raise ConfigError(
                f"{values!r} is no dict of the fields of POETXConfig: give what to_dict makes"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown POETXConfig field(s) {', '.join(unknown)}; "
                f"known: {', '.join(sorted(known))}"
            )
        return cls(**values)


def differences(one: POETXConfig, other: POETXConfig) -> list[str]:
    """The names of the fields in which two configurations differ."""
    return [
        f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)
    ]


COMPILE_TIME = ("variant", "formulation", "memory_budget")
"""Fields that a compiled graph may choose apart from what `prepare` was given."""


def differing(before: POETXConfig, asked: POETXConfig) -> list[str]:
    """The fields in which two configurations differ, other than the compile-time choices."""
    return [name for name in differences(before, asked) if name not in COMPILE_TIME]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) and v for v in value)


def _bad(field: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"POETXConfig.{field} = {value!r} is not allowed: use {allowed}")
