"""The kernels of the merged form, one op each: block products, orthogonalisation, the turn.

``--sweep`` times other tiles beside those that are chosen.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors, gate, options
from benchmarks.options import Session
from benchmarks.rows import Row
from poetx_compile import ops
from poetx_compile.layers.permutation import draw_permutation

COLUMNS = (
    "op", "tokens", "in_features", "out_features", "block_size", "permutation", "tiling", "ms",
    "floor_ms", "ratio", "error",
)  # fmt: skip

TILES = ((128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (64, 256, 64, 8, 3),
         (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4))  # fmt: skip
"""Of a sweep: two sides, a step of the sum, warps, steps in flight."""

Piece = tuple[str, str, Callable[[], Any], float, float]
"""Op, tiling, what is timed, floor in ms, error."""


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; returns its rows. ``ratio`` is the distance from the floor."""
    parser = options.parser("pieces", __doc__)
    options.add_timing(parser)
    options.add_shapes(parser)
    options.add_poetx(parser, (256, 512, 1024))
    parser.add_argument("--sweep", action="store_true")
    parser.set_defaults(permutations=("chunked",))
    args = parser.parse_args(arguments)
    session = Session.start(args, COLUMNS)
    for (m, n), block_size, permutation in itertools.product(
        args.shapes, args.block_sizes, args.permutations
    ):
        layer = functools.partial(floors.Layer.of, in_features=m, out_features=n)
        made = _Layer(session, m, n, block_size, permutation, args.sweep)
        for tokens in (*args.tokens, None):
            sizes = layer(tokens or 1, block_size=block_size, element_size=session.dtype.itemsize)
            pieces = made.of_a_step(sizes) if tokens is None else made.products(sizes)
            for op, tiling, run, floor_ms, error in pieces:
                time = session.timer.time(run)
                session.add(
                    op=op, tokens=tokens, in_features=m, out_features=n, block_size=block_size,
                    permutation=permutation, tiling=tiling, ms=time.ms, ms_p20=time.low,
                    ms_p80=time.high, floor_ms=floor_ms, ratio=time.ms / floor_ms, error=error,
                )  # fmt: skip
    return session.finish()


class _Layer:
    """The operands of one layer's kernels."""

    def __init__(self, session: Session, m: int, n: int, b: int, kind: str, sweep: bool):
        self.session, self.sweep, self.kind = session, sweep, kind
        self.m, self.n, self.b = m, n, b
        self.perm_in, self.perm_out = (
            draw_permutation(size, seed=0, draw=1, group=i, kind=kind, block=b).to(session.device)
            for i, size in enumerate((m, n))
        )

    def products(self, sizes: floors.Layer) -> Iterator[Piece]:
        """The gradients of both sides, as a backward asks for them."""
        x, dx = (self.session.normal(sizes.tokens, self.m) for _ in range(2))
        v, dv = (self.session.normal(sizes.tokens, self.n) for _ in range(2))
        blocks_in, blocks_out = sizes.side_in.blocks, sizes.side_out.blocks
        first = x, dx, blocks_in, self.b, self.perm_in
        second = v, dv, blocks_out, self.perm_out
        costs = [c for c in floors.merged(sizes) if c.name == "block product"]
        floor = floors.total_ms(costs, self.session.ceilings)
        expected = ops.skew_block_products(x.double(), dx.double(), *first[2:])
        made = ops.skew_block_products(*first)
        error = gate.check(made, expected, self.session.dtype, "skew_block_products")

        def both() -> Tensor:
            return ops.skew_block_products(*first, *second)

        def apart() -> list[Tensor]:
            alone = v, dv, blocks_out, self.b, self.perm_out
            return [ops.skew_block_products(*first), ops.skew_block_products(*alone)]

        yield "skew_block_products", "both", both, floor, error
        yield "skew_block_products", "apart", apart, floor, error
        for tiling, splits in itertools.product(TILES[:5] if self.sweep else (), (1, 2, 4)):
            if max(tiling[:2]) <= self.b:
                run = functools.partial(_products, first, second, tiling, splits)
                name = f"{_name(tiling)} splits {splits}"
                yield "skew_block_products", name, run, floor, error

    def of_a_step(self, sizes: floors.Layer) -> Iterator[Piece]:
        """What a step does, whatever the tokens."""
        floor: dict[str, float] = {}
        for cost in floors.merged(sizes):
            floor[cost.name] = floor.get(cost.name, 0.0) + cost.ms(self.session.ceilings)
        packed = [self._packed(side.blocks) for side in sizes.sides]
        both = torch.cat(packed)
        made, expected = (ops.orthogonalize_skew(t, self.b) for t in (both, both.double()))
        error = gate.relative_error(made, expected)
        for name, tiling in self._tilings("orthogonalize"):
            run: Callable[[], Any] = functools.partial(_orthogonalize, both, self.b, tiling)
            yield "orthogonalize_skew", name, run, floor["orthogonalise"], error
        weight = self.session.normal(self.n, self.m)
        steps = [0.01 / self.b**0.5 * t for t in packed]
        given = *steps, self.perm_in, self.perm_out, self.b, self.b, 3, 0, 1, 0
        wide, turned = weight.double(), weight.clone()
        ops.turn_weight_(wide, *(t.double() for t in steps), *given[2:])
        ops.turn_weight_(turned, *given)
        moved, wanted = turned.double() - weight.double(), wide - weight.double()
        error = abs(float((moved * wanted).sum() / wanted.square().sum()) - 1)
        if not error < 0.02:
            raise gate.GateError(f"turn_weight_ moves a weight by 1 + {error:.3g} of a step")
        turning = floor["fold"] + floor["cayley forward"]
        for name, tiling in self._tilings("turn"):
            run = functools.partial(_turn, weight, given, tiling)
            yield "turn_weight_", name, run, turning, error

    def _packed(self, blocks: int) -> Tensor:
        size = self.b * (self.b - 1) // 2
        generator, device = self.session.generator, self.session.device
        return torch.randn(blocks, size, generator=generator, device=device)

    def _tilings(self, op: str) -> Iterator[tuple[str, Any]]:
        yield "default", None
        if self.sweep and op == "turn" and self.b <= 256:
            for tile_k, stages in ((32, 3), (32, 5), (32, 6), (64, 3), (64, 4)):
                yield f"one launch {tile_k}x{stages}", ("one launch", tile_k, stages)
        for tiling in TILES if self.sweep else ():
            if op == "orthogonalize" and max(tiling[:2]) > self.b:
                continue
            yield _name(tiling), tiling
            if op == "turn":
                yield f"{_name(tiling)} columns", (None, tiling)


def _name(tiling: Sequence[int]) -> str:
    return "x".join(map(str, tiling))


def _products(first: Any, second: Any, tiling: Sequence[int], splits: int) -> Tensor:
    from poetx_compile.ops.kernels import block_product as kernels

    x, y, blocks, b, gather = first
    v, dv, blocks2, gather2 = second
    tile_m, tile_n, tile_t, warps, stages = tiling
    products = [
        kernels._operands(x, y, blocks, b, gather, gather),
        kernels._operands(v, dv, blocks2, b, gather2, gather2),
    ]
    plan = kernels.Plan(tile_m, tile_n, tile_t, warps, stages, splits)
    return kernels._skew_parts(kernels.planned_block_products(products, b, plan))


def _orthogonalize(packed: Tensor, b: int, tiling: Any) -> Tensor:
    if tiling is None:
        return ops.orthogonalize_skew(packed, b)
    from poetx_compile.ops.kernels import orthogonalize as kernels

    return kernels.orthogonalize_skew(packed, b, tiling=kernels.Tiling(*tiling))


def _turn(weight: Tensor, given: Sequence[Any], tiling: Any) -> None:
    if tiling is None:
        ops.turn_weight_(weight, *given)
        return
    from poetx_compile.ops.kernels import turn_weight as kernels

    if tiling[0] == "one launch":
        step_in, step_out, perm_in, perm_out, b, _, _, *counters = given
        deltas = kernels.deltas(step_in, step_out, b, b, weight.dtype)
        turn: Callable[..., None] = kernels.turn_in_one_launch
        sizes = {"tile_k": tiling[1], "stages": tiling[2]}
        turn(weight, *deltas, perm_in, perm_out, *counters, None, **sizes)
        return
    rows, columns = kernels.NARROW
    if tiling[0] is None:
        columns = kernels.Tiling(*tiling[1])
    else:
        rows = kernels.Tiling(*tiling)
    two: Callable[..., None] = kernels.turn_weight_
    two(weight, *given, None, tilings=(rows, columns))


if __name__ == "__main__":
    main()
