"""`POETXConfig`: what is trained and how, as one JSON-able dataclass."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

from poetx_compile.errors import ConfigError

_CHOICES: dict[str, tuple[str, ...]] = {
    "cayley": ("neumann", "exact"),
    "merge_rotation": ("polar", "plain"),
    "moments": ("transport", "keep", "reset"),
    "permutation": ("random", "chunked"),
    "variant": ("fast", "mem"),
    "formulation": ("auto", "input_centric", "folded"),
    "gains": ("none", "rows", "both"),
    "init": ("keep", "rows", "spectrum"),
    "base": ("dense", "int8"),
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
        merge_interval: optimiser steps between two merges at most: the rotations go into the
            weights and start again at zero. The permutations stay. 1 is the *merged form*: the
            weights stay plain and in their order, and each step turns them in place; there is no
            angle to guard, no fold, and what concerns those has no effect.
        redraw_interval: optimiser steps after which the permutations are drawn again, together with
            a merge; ``None`` for never. A side of one block is never redrawn: it turns in all
            planes there are.
        max_angle: the angle guard, in radians: merge early rather than let the spectral norm of
            any Q exceed it; ``None`` turns the guard off.
        merge_rotation: ``"polar"`` merges the polar factor of G (exactly orthogonal), ``"plain"``
            merges G itself.
        moments: what becomes of the optimiser's moments of the skew parameters at a redraw:
            ``"transport"`` them with the pairs of coordinates that share a block before and after,
            ``"keep"`` them where they are, whatever planes they then stand for, or ``"reset"`` them
            to those of a fresh optimiser. A merge by itself touches none.
        permutation: ``"chunked"`` for random chunks of neighbouring coordinates, up to 64 and a
            quarter of a block, which kernels gather at no extra cost, or ``"random"`` for random
            coordinates, of the same loss.
        variant: what the backward keeps: ``"fast"`` keeps what costs time to recompute, ``"mem"``
            recomputes what costs memory to keep (docs/passes/recompute.md).
        formulation: ``"input_centric"`` rotates activations, ``"folded"`` builds the effective
            weight once a call; ``"auto"`` takes the cheaper one for each side of each layer.
        keep_in_eval: keep the effective weights while an eager model is evaluated (`model.eval()`,
            no gradients) instead of computing them at every call: a second copy of the prepared
            weights, freed by `model.train()` or the next optimiser step.
        memory_budget: ``None``, or how much may be kept between forward and backward at most: a
            fraction in (0, 1] of the bytes that variant ``"fast"`` keeps. What is cheapest to
            recompute goes first: norms and activations, then folded weights, then products; below
            what ``"mem"`` keeps, which takes no budget, other outputs and attention.
        seed: seed of the permutations; never touches the global generators.
        target_modules: which `nn.Linear` to convert: ``None`` or ``"all-linear"`` for all eligible
            ones, a regular expression that must match the whole name, or a list of names or name
            endings (``"q_proj"`` matches ``layers.0.q_proj``).
        exclude_modules: names or name endings that are left as they are.
        init: what `prepare` does to the weights, whose singular values stay for the whole run:
            ``"keep"`` leaves them, and the outputs, bitwise as they are. For training from scratch,
            ``"rows"`` divides each row by its norm; ``"spectrum"`` keeps the singular vectors and
            puts a geometric series in place of the singular values, with the Frobenius norm of n
            rows of norm one.
        init_range: smallest singular value over the largest of ``init="spectrum"``, in (0, 1].
        init_scale: what the weights are multiplied by after that, whatever `init` is.
        gains: ``"rows"`` trains one more factor for each output of a layer, ``"both"`` one for each
            input as well. They multiply what the rotations make, so that the singular values of
            the weight are not kept any more (docs/concepts.md).
        base: what the frozen weight is stored as: ``"dense"`` keeps its dtype, ``"int8"`` takes 8
            bits and a scale for each 64 columns of a row (POET-XQ), rounded to the nearest by
            `prepare` and stochastically at each merge (docs/numerics.md).
        normalize_rows: deprecated; True is ``init="rows"``.

    Raises:
        ConfigError: (a `ValueError`) names the field, its value and the allowed range.
    """

    block_size: int | tuple[int, int] = 256
    neumann_order: int = 3
    cayley: str = "neumann"
    merge_interval: int = 200
    redraw_interval: int | None = 200
    max_angle: float | None = 0.25
    merge_rotation: str = "polar"
    moments: str = "transport"
    permutation: str = "chunked"
    variant: str = "fast"
    formulation: str = "auto"
    keep_in_eval: bool = True
    memory_budget: float | None = None
    seed: int = 0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: Sequence[str] = ("lm_head",)
    init: str = "keep"
    init_range: float = 0.1
    init_scale: float = 1.0
    gains: str = "none"
    base: str = "dense"
    normalize_rows: dataclasses.InitVar[bool | None] = None

    def __post_init__(self, normalize_rows: bool | None) -> None:
        if normalize_rows is not None:
            self._take_normalize_rows(normalize_rows)
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
        redraw = self.redraw_interval
        if redraw is not None and not (_is_int(redraw) and redraw >= 1):
            raise _bad("redraw_interval", redraw, "None, or an int ≥ 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _bad(name, getattr(self, name), "one of " + ", ".join(map(repr, choices)))
        angle = self.max_angle
        if angle is not None and not (_is_number(angle) and 0 < angle < 1):
            raise _bad("max_angle", angle, "None, or radians in (0, 1)")
        if self.formulation == "folded" and not self.may_fold:
            allowed = f"at most {FOLD_ANGLE} with formulation='folded' (or cayley='exact')"
            raise _bad("max_angle", angle, allowed)
        if self.merged and self.order == 1:
            allowed = "at least 2 with merge_interval=1: each step's rotation is applied as it is"
            raise _bad("neumann_order", self.neumann_order, allowed)
        if self.merged and self.base == "int8":
            allowed = (
                "'dense' with merge_interval=1, where every step would round the weight to int8 "
                "once more, or a larger merge_interval"
            )
            raise _bad("base", self.base, allowed)
        budget = self.memory_budget
        if budget is not None and not (_is_number(budget) and 0 < budget <= 1):
            raise _bad("memory_budget", budget, "None, or a fraction in (0, 1]")
        if budget is not None and self.variant == "mem":
            allowed = "None with variant='mem', which keeps the least there is, or variant='fast'"
            raise _bad("memory_budget", budget, allowed)
        if not (_is_int(self.seed) and 0 <= self.seed < 2**63):
            raise _bad("seed", self.seed, "an int in [0, 2⁶³)")
        if not isinstance(self.keep_in_eval, bool):
            raise _bad("keep_in_eval", self.keep_in_eval, "a bool")
        if not (_is_number(self.init_range) and 0 < self.init_range <= 1):
            raise _bad("init_range", self.init_range, "a ratio in (0, 1]")
        if not (_is_number(self.init_scale) and self.init_scale > 0):
            raise _bad("init_scale", self.init_scale, "a number above 0")
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

    def _take_normalize_rows(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise _bad("normalize_rows", value, "init='rows' (True) or init='keep' (False)")
        warnings.warn(
            "POETXConfig.normalize_rows is deprecated: use init='rows' instead of True, and leave "
            "it out instead of False",
            DeprecationWarning,
            stacklevel=4,  # __post_init__, __init__, and who called it
        )
        if value and self.init == "spectrum":
            raise _bad("init", self.init, "'rows' with normalize_rows=True, or leave that out")
        if value:
            object.__setattr__(self, "init", "rows")

    @property
    def gained_sides(self) -> tuple[str, ...]:
        """The sides with gains, by name."""
        return {"none": (), "rows": ("out",), "both": ("in", "out")}[self.gains]

    @property
    def initialises(self) -> bool:
        """Whether `prepare` changes the weights."""
        return self.init != "keep" or self.init_scale != 1

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
    def merged(self) -> bool:
        """Whether every step is merged: the weights are plain whenever the model runs."""
        return self.merge_interval == 1

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
        """The inverse of `to_dict`, also of an earlier version's.

        Raises:
            ConfigError: an unknown field.
        """
        if not isinstance(values, dict):
            raise ConfigError(
                f"{values!r} is no dict of the fields of POETXConfig: give what to_dict makes"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        values = current_names(values)
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown POETXConfig field(s) {', '.join(unknown)}; "
                f"known: {', '.join(sorted(known))}"
            )
        return cls(**values)


def current_names(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, with ``normalize_rows`` of earlier versions as ``init``."""
    if "normalize_rows" not in values:
        return values
    rest = {k: v for k, v in values.items() if k != "normalize_rows"}
    if values["normalize_rows"] is False:  # as every saved configuration says
        return rest
    given = {"init": values["init"]} if "init" in values else {}
    return rest | {"init": POETXConfig(normalize_rows=values["normalize_rows"], **given).init}


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
