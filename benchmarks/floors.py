"""Floors: the least time an operation can take, from its FLOPs and bytes and measured ceilings.

A schedule is a list of operations. Each reads its operands once and writes its result once, and
takes at least ``max(FLOPs / FLOP rate, bytes / bandwidth)``; a schedule takes at least the sum.
T tokens, weight [n, m], blocks of b; s bytes an element.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from poetx_compile.layers.sides import side_blocks
from poetx_compile.ops.newton_schulz import COEFFICIENTS

_SKEW_BYTES = 4
"""Skew parameters and rotations are fp32."""

_FORWARD_PRODUCTS = {1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 6: 4}
_BACKWARD_PRODUCTS = {1: 1, 2: 2, 3: 4, 4: 6, 5: 8, 6: 10}
"""Products of b×b matrices for an expansion of order k (`docs/numerics.md`)."""

_ORTHOGONALISING = 3 * len(COEFFICIENTS)
"""Products of b×b matrices in the Newton-Schulz steps."""

_POLAR_PRODUCTS = 4
"""Two Newton-Schulz steps: enough below an angle of 0.25."""


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a machine reaches, measured in the run.

    Attributes:
        bytes_per_s: read and written together, by a large copy.
        flops_per_s: by a large product in the activations' dtype.
        fp32_flops_per_s: by products that are as precise as fp32.
    """

    bytes_per_s: float
    flops_per_s: float
    fp32_flops_per_s: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """One operation: FLOPs and bytes; `precise` where its products have to be fp32."""

    name: str
    flops: int
    bytes: int
    precise: bool = False

    def ms(self, ceilings: Ceilings) -> float:
        """The least time in milliseconds."""
        rate = ceilings.fp32_flops_per_s if self.precise else ceilings.flops_per_s
        return 1e3 * max(self.flops / rate, self.bytes / ceilings.bytes_per_s)


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a weight: its width, and blocks of b where b fits in."""

    width: int
    block_size: int

    @property
    def b(self) -> int:
        """Size of the blocks: a side shorter than the block size is one block."""
        return side_blocks(self.width, self.block_size)[1]

    @property
    def blocks(self) -> int:
        """Number of blocks; what they do not cover is not rotated."""
        return side_blocks(self.width, self.block_size)[0]

    @property
    def rotated(self) -> int:
        """Coordinates that are rotated."""
        return self.b * self.blocks


@dataclasses.dataclass(frozen=True)
class Layer:
    """The sizes a layer's floors depend on."""

    tokens: int
    side_in: Side
    side_out: Side
    element_size: int
    order: int | None = 3

    @classmethod
    def of(
        cls, tokens: int, in_features: int, out_features: int, block_size: int, element_size: int
    ) -> Layer:
        """The same block size on both sides, order 3."""
        sides = Side(in_features, block_size), Side(out_features, block_size)
        return cls(tokens, *sides, element_size)

    @property
    def precise(self) -> bool:
        """Whether products of rotations have to be fp32: not beside half precision."""
        return self.element_size > 2

    @property
    def sides(self) -> tuple[Side, Side]:
        """Input and output side."""
        return self.side_in, self.side_out


def total_ms(costs: Iterable[Cost], ceilings: Ceilings) -> float:
    """The floor of a schedule in milliseconds."""
    return sum(cost.ms(ceilings) for cost in costs)


def total_flops(costs: Iterable[Cost]) -> int:
    """FLOPs of a schedule."""
    return sum(cost.flops for cost in costs)


def linear(layer: Layer, *, trained: bool = True) -> list[Cost]:
    """Forward and backward of an `nn.Linear`, without its weight's gradient if not `trained`."""
    gemms = ["forward", "dx", "dw"] if trained else ["forward", "dx"]
    return [_gemm(layer, name) for name in gemms]


def poetx(layer: Layer, variant: str, *, fold_in: bool, fold_out: bool) -> list[Cost]:
    """Forward and backward of a POET-X layer, each side folded into the weight or rotating.

    Input-centric (no side folded): ``4·T·m·n + 6·T·b·(m+n)`` FLOPs; folded (both):
    ``4·T·m·n + 2·T·b·(m+n) + 4·b·m·n``; and the Cayley-Neumann expansions.

    Args:
        variant: ``"fast"``, or ``"mem"``, which does again in the backward what it has not kept:
            the fold, the rotated input, and U (one more product with the weight) where the output
            side rotates. A folded output side needs the layer's own output, which is kept.
    """
    costs = [_gemm(layer, "forward"), _gemm(layer, "dx")]
    folds = (fold_in, fold_out)
    again = 2 if variant == "mem" else 1
    for side, fold in zip(layer.sides, folds, strict=True):
        forward, backward = cayley(side, layer.order, precise=layer.precise)
        costs += [forward, _on_blocks(layer, side, "block product")]
        if fold:
            costs.append(tangent(side, layer.order, precise=layer.precise))
        else:
            costs.append(backward)
            costs += [_on_blocks(layer, side, "rotation")] * 2
    if any(folds):
        costs += [_fold(layer, *folds)] * again
    if variant == "mem":
        if not fold_in:
            costs.append(_on_blocks(layer, layer.side_in, "rotated input again"))
        if not fold_out:
            costs.append(_gemm(layer, "U again"))
    return costs


def poetx_of(layer: Layer, variant: str, formulation: str, ceilings: Ceilings) -> list[Cost]:
    """The schedule of a formulation; for ``"auto"`` the cheapest choice of folded sides."""
    choices: dict[str, list[tuple[bool, bool]]] = {
        "input_centric": [(False, False)],
        "folded": [(True, True)],
        "auto": [(i, o) for i in (False, True) for o in (False, True)],
    }
    schedules = (
        poetx(layer, variant, fold_in=fold_in, fold_out=fold_out)
        for fold_in, fold_out in choices[formulation]
    )
    return min(schedules, key=lambda costs: total_ms(costs, ceilings))


def merged(layer: Layer, turn_every: int = 1) -> list[Cost]:
    """Forward, backward and a step of `POETXMuon` of a layer that is merged every step.

    ``4·T·m·n + 2·T·b·(m+n)`` FLOPs; once a step, the turn of the weight: ``4·b·m·n``, every element
    read and written once.

    Args:
        turn_every: of the steps in which each side turns once, the mean. One side at a time takes a
            pass over the weight of its own.
    """
    turns = turn_every
    fold = _fold(layer, True, True)
    passes = min(2, turns)
    fold = dataclasses.replace(fold, flops=fold.flops // turns, bytes=fold.bytes * passes // turns)
    costs = [_gemm(layer, "forward"), _gemm(layer, "dx"), fold]
    for side in layer.sides:
        cube, packed = side.blocks * side.b**3, _packed_bytes(side)
        costs.append(_on_blocks(layer, side, "block product", result=packed))
        costs.append(Cost("momentum", 0, 4 * packed))
        # Each product has a symmetric or a skew result: half of 2·b³.
        costs.append(Cost("orthogonalise", _ORTHOGONALISING * cube // turns, 2 * packed // turns))
        expansion = cayley(side, layer.order, precise=layer.precise)[0]
        moved = packed + layer.element_size * side.blocks * side.b**2
        made = dataclasses.replace(expansion, flops=expansion.flops // turns, bytes=moved // turns)
        costs.append(made)
    return costs


def adamw(layer: Layer) -> Cost:
    """A step of fused AdamW for a dense weight: seven passes in the weight's dtype."""
    elements = layer.side_in.width * layer.side_out.width
    return Cost("adamw", 0, 7 * layer.element_size * elements)


def cayley(side: Side, order: int | None, *, precise: bool = True) -> tuple[Cost, Cost]:
    """(forward, backward) of the rotations of one side, from packed parameters and back.

    An exact transform (order ``None``) counts as a solve (8/3·b³) and as an inverse with two
    products (2·b³ + 4·b³).

    Args:
        precise: products of fp32; else with operands of the activations' dtype, which is enough
            where the rotations are going to be rounded to it.
    """
    cube = side.blocks * side.b**3
    if order is None:
        forward, backward = 8 * cube // 3, 6 * cube
    else:
        forward, backward = (2 * cube * products for products in _products(order))
    full, packed = _rotation_bytes(side), _packed_bytes(side)
    return (
        Cost("cayley forward", forward, packed + full, precise),
        Cost("cayley backward", backward, full + 2 * packed, precise),
    )


def tangent(side: Side, order: int | None, *, precise: bool = True) -> Cost:
    """The gradient of rotations that were folded: dG from P by the inverse of G, then `cayley`'s.

    An exact transform needs an inverse and two products, as its backward; an expansion needs G
    again, one product with its inverse, and the backward.
    """
    backward = cayley(side, order, precise=precise)[1]
    if order is None:
        return dataclasses.replace(backward, name="tangent backward")
    flops = 2 * side.blocks * side.b**3 * (sum(_products(order)) + 1)
    return dataclasses.replace(backward, name="tangent backward", flops=flops)


def permute(tokens: int, width: int, element_size: int) -> Cost:
    """A permutation of columns: every element read and written once."""
    return Cost("permute", 0, 2 * tokens * width * element_size)


def merge(layer: Layer, merge_rotation: str = "polar") -> list[Cost]:
    """Merge one layer: rotations and their polar factors, and one pass over the weight in fp32."""
    costs = []
    for side in layer.sides:
        costs.append(cayley(side, layer.order)[0])
        if merge_rotation == "polar":
            polar = 2 * _POLAR_PRODUCTS * side.blocks * side.b**3
            costs.append(Cost("polar", polar, 2 * _rotation_bytes(side), precise=True))
    return [*costs, dataclasses.replace(_fold(layer, True, True), precise=True)]


def _products(order: int) -> tuple[int, int]:
    """Products of b×b matrices, (forward, backward)."""
    if order not in _FORWARD_PRODUCTS:
        raise ValueError(f"no floor is known for order {order}: use 1 to {max(_FORWARD_PRODUCTS)}")
    return _FORWARD_PRODUCTS[order], _BACKWARD_PRODUCTS[order]


def _rotation_bytes(side: Side) -> int:
    return _SKEW_BYTES * side.blocks * side.b**2


def _packed_bytes(side: Side) -> int:
    return _SKEW_BYTES * side.blocks * side.b * (side.b - 1) // 2


def _gemm(layer: Layer, name: str) -> Cost:
    t, m, n = layer.tokens, layer.side_in.width, layer.side_out.width
    return Cost(name, 2 * t * m * n, layer.element_size * (t * m + t * n + m * n))


def _on_blocks(layer: Layer, side: Side, name: str, result: int | None = None) -> Cost:
    """A rotation of an activation, or the block product of two: one b×b block for each column."""
    moved = 2 * layer.tokens * side.width * layer.element_size
    moved += _rotation_bytes(side) if result is None else result
    return Cost(name, 2 * layer.tokens * side.b * side.rotated, moved)


def _fold(layer: Layer, fold_in: bool, fold_out: bool) -> Cost:
    m, n, flops = layer.side_in.width, layer.side_out.width, 0
    if fold_in:
        flops += 2 * n * layer.side_in.b * layer.side_in.rotated
    if fold_out:
        flops += 2 * m * layer.side_out.b * layer.side_out.rotated
    return Cost("fold", flops, 2 * layer.element_size * m * n)
