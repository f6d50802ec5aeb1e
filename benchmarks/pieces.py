"""The kernels of the merged form, one op each: block products, orthogonalisation, the turn.

``--sweep`` times other tiles of the block products, and ``--ops`` some of the ops alone.
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
from benchmarks.tolerances import ORTHOGONALIZED
from poetx_compile import ops
from poetx_compile.layers.permutation import draw_permutation
from poetx_compile.ops.muon_step import Part, fused, muon_steps
from poetx_compile.ops.newton_schulz import newton_schulz
from poetx_compile.ops.turn_weight import Turn, turn_weights_

COLUMNS = (
    "op", "tokens", "in_features", "out_features", "block_size", "permutation", "tiling", "ms",
    "floor_ms", "ratio", "error",
)  # fmt: skip

OPS = ("skew_block_products", "orthogonalize_skew", "muon_step", "turn_weights_")

TILES = ((128, 128, 64, 4, 4), (128, 256, 64, 8, 3), (64, 128, 64, 4, 4))
"""Of a sweep over block products: two sides, a step of the sum, warps, steps in flight."""

ORTHOGONALIZE_TILES = (
    (128, 64, 8, 3, 2, 128),
    (128, 64, 8, 4, 1, None),
    (128, 64, 8, 3, 1, None),
    (128, 32, 8, 5, 2, 128),
    (128, 128, 8, 2, 1, None),
    (128, 64, 4, 3, 2, None),
    (64, 64, 4, 4, 3, None),
    (64, 64, 4, 3, 4, 128),
    (64, 128, 4, 3, 2, None),
)
"""Of a sweep over orthogonalisation: `Tiling` of its kernels."""

Piece = tuple[str, Callable[[], Any], float, float]
"""Tiling, what is timed, floor in ms, error."""


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; returns its rows. ``ratio`` is the distance from the floor."""
    parser = options.parser("pieces", __doc__)
    options.add_timing(parser)
    options.add_shapes(parser)
    options.add_poetx(parser, (256, 512, 1024))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.set_defaults(permutations=("chunked",))
    args = parser.parse_args(arguments)
    session = Session.start(args, COLUMNS)
    for (m, n), block_size, permutation, op in itertools.product(
        args.shapes, args.block_sizes, args.permutations, args.ops
    ):
        made = _Layer(session, m, n, block_size, permutation, args.sweep)
        for tokens in args.tokens if op == OPS[0] else (None,):
            sizes = floors.Layer.of(tokens or 1, m, n, block_size, session.dtype.itemsize)
            for tiling, run, floor_ms, error in made.pieces(op, sizes):
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

    def pieces(self, op: str, sizes: floors.Layer) -> Iterator[Piece]:
        """What of an op is timed."""
        made = self._products, self._orthogonalize, self._step, self._turn
        return dict(zip(OPS, made, strict=True))[op](sizes)

    def _products(self, sizes: floors.Layer) -> Iterator[Piece]:
        """The gradients of both sides, as a backward asks for them."""
        x, dx = (self.session.normal(sizes.tokens, self.m) for _ in range(2))
        v, dv = (self.session.normal(sizes.tokens, self.n) for _ in range(2))
        blocks_in, blocks_out = sizes.side_in.blocks, sizes.side_out.blocks
        first = x, dx, blocks_in, self.b, self.perm_in
        second = v, dv, blocks_out, self.perm_out
        floor = self._floor(sizes, "block product")
        expected = ops.skew_block_products(x.double(), dx.double(), *first[2:])
        made = ops.skew_block_products(*first)
        error = gate.check(made, expected, self.session.dtype, "skew_block_products")

        def both() -> Tensor:
            return ops.skew_block_products(*first, *second)

        def apart() -> list[Tensor]:
            alone = v, dv, blocks_out, self.b, self.perm_out
            return [ops.skew_block_products(*first), ops.skew_block_products(*alone)]

        yield "both", both, floor, error
        yield "apart", apart, floor, error
        for tiling, splits in itertools.product(TILES if self.sweep else (), (1, 2, 4)):
            if max(tiling[:2]) <= self.b:
                run = functools.partial(_products, first, second, tiling, splits)
                yield f"{_name(tiling)} splits {splits}", run, floor, error

    def _orthogonalize(self, sizes: floors.Layer) -> Iterator[Piece]:
        packed = torch.cat([self._packed(side.blocks) for side in sizes.sides])
        expected = ops.orthogonalize_skew(packed.double(), self.b)
        run = functools.partial(ops.orthogonalize_skew, packed, self.b)
        error = gate.relative_error(run(), expected)
        if not error < ORTHOGONALIZED:
            raise gate.GateError(f"orthogonalize_skew is wrong: relative error {error:.3g}")
        floor = self._floor(sizes, "orthogonalise")
        yield "default", run, floor, error
        narrow = self.session.dtype == torch.bfloat16 and self.session.device.type == "cuda"
        for tiling in ORTHOGONALIZE_TILES if self.sweep and narrow else ():
            run = functools.partial(_orthogonalized, packed, self.b, tiling)
            yield _name(tiling), run, floor, gate.relative_error(run(), expected)
        square = self.session.normal(packed.shape[0], self.b, self.b)
        square = square - square.mT
        square /= torch.linalg.matrix_norm(square, keepdim=True)
        run = functools.partial(newton_schulz, square)
        yield "products of a library alone", run, floor, 0.0

    def _step(self, sizes: floors.Layer) -> Iterator[Piece]:
        """Momenta, directions and rotations of both sides, by torch's operations and by kernels."""
        sides = [[self._packed(side.blocks) for _ in range(3)] for side in sizes.sides]
        skews, gradients, momenta = (list(tensors) for tensors in zip(*sides, strict=True))
        parts = [Part(gradient, momentum, None) for _, gradient, momentum in sides]
        counts = [len(skew) for skew in skews]

        def by_torch() -> None:
            torch._foreach_lerp_(momenta, gradients, 0.05)
            directions = torch._foreach_lerp(gradients, momenta, 0.95)
            update = ops.orthogonalize_skew(torch.cat(directions), self.b).mul_(0.01)
            torch._foreach_sub_(skews, update.split(counts))

        def by_kernels() -> None:
            steps = muon_steps(parts, len(parts), self.b, 0.95, 0.01, 0, 1)
            torch._foreach_add_(skews, steps.split(counts))

        floor = self._floor(sizes, "orthogonalise", "momentum")
        yield "torch", by_torch, floor, 0.0
        if fused(parts, self.b):
            yield "kernels", by_kernels, floor, 0.0

    def _turn(self, sizes: floors.Layer) -> Iterator[Piece]:
        weight = self.session.normal(self.n, self.m)
        steps = [0.01 / self.b**0.5 * self._packed(side.blocks) for side in sizes.sides]
        floor = self._floor(sizes, "fold", "cayley forward")
        for name, turns in (("both", (1, 1)), ("inputs", (1, 0)), ("outputs", (0, 1))):
            q_in, q_out = (s[: len(s) * turn] for s, turn in zip(steps, turns, strict=True))
            given = self.perm_in, self.perm_out, self.b, self.b, 3, 0
            wide, turned = weight.double(), weight.clone()
            turn_weights_([Turn(wide, q_in.double(), q_out.double(), *given)], 0, 1)
            wanted = wide - weight.double()
            turn = Turn(turned, q_in, q_out, *given)
            run = functools.partial(turn_weights_, [turn], 0, 1)
            run()
            moved = turned.double() - weight.double()
            error = abs(float((moved * wanted).sum() / wanted.square().sum()) - 1)
            if not error < 0.02:
                raise gate.GateError(f"turn_weights_ moves a weight by 1 + {error:.3g} of a step")
            yield name, run, floor, error

    def _floor(self, sizes: floors.Layer, *names: str) -> float:
        costs = [cost for cost in floors.merged(sizes) if cost.name in names]
        return floors.total_ms(costs, self.session.ceilings)

    def _packed(self, blocks: int) -> Tensor:
        size = self.b * (self.b - 1) // 2
        generator, device = self.session.generator, self.session.device
        return torch.randn(blocks, size, generator=generator, device=device)


def _name(tiling: Sequence[int | None]) -> str:
    return "x".join(map(str, tiling))


def _products(first: Any, second: Any, tiling: Sequence[int], splits: int) -> list[Tensor]:
    from poetx_compile.ops.kernels import block_product as kernels

    x, y, blocks, b, gather = first
    v, dv, blocks2, gather2 = second
    plan = kernels.Plan._make((*tiling, splits))
    made = []
    for operands in ((x, y, blocks, b, gather, gather), (v, dv, blocks2, b, gather2, gather2)):
        product = kernels._operands(*operands)
        made.append(kernels._skew_parts(kernels.planned_block_products([product], b, plan)))
    return made


def _orthogonalized(packed: Tensor, block_size: int, tiling: Sequence[int | None]) -> Tensor:
    from poetx_compile.ops.kernels import orthogonalize as kernels

    return kernels.orthogonalize_skew(packed, block_size, tiling=kernels.Tiling._make(tiling))


if __name__ == "__main__":
    main()
