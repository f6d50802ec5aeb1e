"""One layer, forward + backward, against a trained `nn.Linear` in the same process.

The time of a POET-X layer holds all that a training step pays for it: Cayley-Neumann forward and
backward, folds, permutations, the gradients of the rotations, and dX. Both sides are compiled in
the same mode and timed in turn.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

import poetx_compile as poetx
from benchmarks import contenders, floors, gate, options, peer
from benchmarks.options import Session
from benchmarks.rows import Row
from benchmarks.saved import MIB, saved_bytes
from benchmarks.timing import training_step

COLUMNS = (
    "tokens", "in_features", "out_features", "block_size", "variant", "formulation", "permutation",
    "ms", "linear_ms", "frozen_ms", "ratio", "floor_ratio", "saved_mib", "saved_output_mib",
    "linear_saved_mib", "gradient_error",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """What a row is about; the fields are the row's."""

    tokens: int
    in_features: int
    out_features: int
    block_size: int
    variant: str
    formulation: str
    permutation: str

    def config(self) -> poetx.POETXConfig:
        """The configuration of the layer."""
        return poetx.POETXConfig(
            block_size=self.block_size,
            variant=self.variant,
            formulation=self.formulation,
            permutation=self.permutation,
        )


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; returns its rows."""
    parser = options.parser("layers", __doc__)
    options.add_timing(parser)
    options.add_shapes(parser)
    options.add_poetx(parser)
    peer.add_option(parser)
    args = parser.parse_args(arguments)
    other = peer.load(args.peer) if args.peer else None
    session = Session.start(args, COLUMNS)
    layers = itertools.product(args.shapes, args.tokens, args.block_sizes, args.variants)
    for (m, n), tokens, block_size, variant in layers:
        for formulation, permutation in itertools.product(args.formulations, args.permutations):
            case = Case(tokens, m, n, block_size, variant, formulation, permutation)
            measure(session, case, args.stage)
        if other is not None:
            case = Case(tokens, m, n, block_size, variant, other.name, "own")
            measure_peer(session, case, other, args.stage)
    return session.finish()


def measure(session: Session, case: Case, stage: str) -> Row:
    """The row of a POET-X layer: gate, times, saved bytes, floors."""
    contenders.drop_compiled()
    layer = contenders.poetx_linear(session, case.in_features, case.out_features, case.config())
    fast = contenders.compiled(layer, stage)
    x, dy = _data(session, case)
    errors = gate.check_layer(fast, layer, x, dy)
    measured = _against_linear(session, fast, layer, x, dy, stage)
    return session.add(**dataclasses.asdict(case), **measured, **errors, **_floors(session, case))


def measure_peer(session: Session, case: Case, other: peer.Peer, stage: str) -> Row:
    """The row of a peer's layer, gated by output and dX: its parameters have their own layout."""
    contenders.drop_compiled()
    layer = other.layer(session, case.in_features, case.out_features, case.block_size, case.variant)
    fast = contenders.compiled(layer, stage)
    x, dy = _data(session, case)
    errors = gate.check_weight(fast, other.effective_weight(layer), x, dy)
    measured = _against_linear(session, fast, layer, x, dy, stage)
    return session.add(**dataclasses.asdict(case), **measured, **errors)


def _data(session: Session, case: Case) -> tuple[Tensor, Tensor]:
    x = session.normal(case.tokens, case.in_features).requires_grad_()
    return x, session.normal(case.tokens, case.out_features)


def _floors(session: Session, case: Case) -> Row:
    sizes = floors.Layer.of(
        case.tokens,
        case.in_features,
        case.out_features,
        case.block_size,
        session.dtype.itemsize,
    )
    plain = floors.linear(sizes)
    costs = floors.poetx_of(sizes, case.variant, case.formulation, session.ceilings)
    floor_ms = floors.total_ms(costs, session.ceilings)
    linear_floor_ms = floors.total_ms(plain, session.ceilings)
    return {
        "floor_ms": floor_ms,
        "linear_floor_ms": linear_floor_ms,
        "floor_ratio": floor_ms / linear_floor_ms,
        "flop_ratio": floors.total_flops(costs) / floors.total_flops(plain),
    }


def _against_linear(
    session: Session,
    fast: Callable[[Tensor], Tensor],
    layer: nn.Module,
    x: Tensor,
    dy: Tensor,
    stage: str,
) -> Row:
    """Times and saved bytes of a layer and of `nn.Linear`, trained and frozen."""
    (_, m), (_, n) = x.shape, dy.shape
    trained, frozen = (contenders.linear(session, m, n, trained=t) for t in (True, False))
    plain, plain_frozen = (contenders.compiled(module, stage) for module in (trained, frozen))
    saved, linear_saved = saved_bytes(fast, layer, x), saved_bytes(plain, trained, x)
    times = session.timer.compare(
        {
            "linear": training_step(plain, trained, x, dy),
            "frozen": training_step(plain_frozen, frozen, x, dy),
            "layer": training_step(fast, layer, x, dy),
        }
    )
    time, linear_time = times["layer"], times["linear"]
    return {
        "ms": time.ms,
        "ms_p20": time.low,
        "ms_p80": time.high,
        "linear_ms": linear_time.ms,
        "linear_ms_p20": linear_time.low,
        "linear_ms_p80": linear_time.high,
        "frozen_ms": times["frozen"].ms,
        "ratio": time.ms / linear_time.ms,
        "saved_mib": saved.total / MIB,
        "saved_output_mib": saved.output / MIB,
        "linear_saved_mib": linear_saved.total / MIB,
    }


if __name__ == "__main__":
    main()
