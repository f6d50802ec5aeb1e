"""The cost of rotating an activation or folding the rotation into the weight, side by side.

Both formulations pay the same products with the (frozen or folded) weight, the same block products
and the same Cayley-Neumann expansions. What differs, for one side of width d of a weight [n, m],
with T tokens, blocks of b and elements of e bytes:

- *rotate*: the activation is rotated in the forward, its gradient in the backward:
  ``2 · max(2·T·b·d / flops, 2·T·d·e / bytes) + 2 · launch``
- *fold*: the weight is rotated, once or (where it is not kept for the backward) twice:
  ``folds · (max(2·b·m·n / flops, 2·m·n·e / bytes) + launch)``

The first grows with the tokens, the second does not. Sizes may be symbolic: the costs are sympy
expressions, so that the choice can be printed as a formula and holds under dynamic shapes.
"""

from __future__ import annotations

import dataclasses

import sympy
import torch


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates that the kernels of this package reach; the defaults were measured on an H200.

    Args:
        flops: floating point operations a second of bf16 block rotations.
        bytes: bytes a second read and written by bandwidth-bound kernels.
        launch: seconds of a kernel that has nothing to do.
    """

    flops: float = 4.5e14
    bytes: float = 2.7e12
    launch: float = 3e-6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"machine constant {field.name} = {value!r}: use a number > 0")


TOKENS = sympy.Symbol("T", positive=True, integer=True)
"""The number of rows of a layer's input, in the printed formulas."""


def rotate_seconds(width: int, block: int, element_bytes: int, machine: Machine) -> sympy.Expr:
    """Seconds of rotating one side's activation and its gradient, a function of `TOKENS`."""
    a_token = max(2 * block * width / machine.flops, 2 * width * element_bytes / machine.bytes)
    return 2 * a_token * TOKENS + 2 * machine.launch


def fold_seconds(
    shape: tuple[int, int], block: int, element_bytes: int, machine: Machine, folds: int
) -> sympy.Expr:
    """Seconds of folding one side into a weight of `shape` `folds` times; a constant."""
    n, m = shape
    flops = 2 * block * m * n / machine.flops
    moved = 2 * m * n * element_bytes / machine.bytes
    return sympy.Float(folds * (max(flops, moved) + machine.launch))


def break_even(rotate: sympy.Expr, fold: sympy.Expr) -> int:
    """The number of tokens up to which rotating, linear in `TOKENS`, costs no more than folding."""
    return max(0, int((fold - rotate.subs(TOKENS, 0)) / rotate.coeff(TOKENS)))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the model says of one side of one layer.

    Args:
        side: ``"in"`` or ``"out"``.
        rotate: seconds a step of rotating, a function of `TOKENS`.
        fold: seconds a step of folding, a constant.
        tokens: rows of the layer's input, as seen while tracing, over all its calls.
    """

    side: str
    rotate: sympy.Expr
    fold: sympy.Expr
    tokens: int

    @property
    def folding_is_cheaper(self) -> bool:
        """Whether it is, at `tokens`."""
        return bool(self.fold < self.rotate.subs(TOKENS, self.tokens))

    @property
    def break_even(self) -> int:
        """The number of tokens up to which rotating costs no more than folding."""
        return break_even(self.rotate, self.fold)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one side of one layer runs, and why.

    Args:
        side: ``"in"`` or ``"out"``.
        folded: whether its rotation goes into the weight; otherwise it rotates the activation.
        reason: why, in words.
        cost: of both, where the model was asked.
    """

    side: str
    folded: bool
    reason: str
    cost: Cost | None = None

    def __str__(self) -> str:
        return f"{'folded' if self.folded else 'rotated'} {self.side} ({self.reason})"


def hint_of(shape: torch.Size) -> int:
    """The rows of an activation as seen when the graph was traced; adds no guard."""
    rows = 1
    for size in shape[:-1]:
        if isinstance(size, torch.SymInt):
            hint = size.node.hint
            rows *= 1 if hint is None else int(hint)
        else:
            rows *= int(size)
    return rows
