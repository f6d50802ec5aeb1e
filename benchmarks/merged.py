"""One layer in the merged form: forward, backward and its share of a step of `POETXMuon`.

The time of a POET-X layer holds all that a training step pays for it with ``merge_interval=1``:
forward, backward with dX and the packed gradients, momentum, orthogonalisation, the rotations of
the step, and the turn of the weight. It is compared with a trained `nn.Linear` and its share of
fused AdamW. A model takes one step for all of its layers, so both steps are those of ``--layers``
equal layers, divided by their number. Where a side turns in every k-th step (``--turn-every``), the
layers' turns are spread over the steps, as in a model.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from benchmarks import contenders, floors, gate, options
from benchmarks.options import Session
from benchmarks.rows import Row
from benchmarks.saved import MIB, saved_bytes
from benchmarks.timing import training_step
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.optim.adamw import adamw_step
from poetx_compile.optim.groups import BLOCK

COLUMNS = (
    "tokens", "in_features", "out_features", "block_size", "turn_every", "variant", "permutation",
    "ms",
    "step_ms", "linear_ms", "adamw_ms", "ratio", "floor_ratio", "layer_ratio", "saved_mib",
    "saved_output_mib", "linear_saved_mib", "gradient_error", "step_error", "step_layers",
)  # fmt: skip

STEP_TOLERANCE = 0.05
"""Of the component of a step along that in float64. Orthogonalisation in bf16 alone moves it by a
few thousandths; a wrong side, sign or factor by a quarter and more."""


RATE = 5e-3
"""A step of POETXMuon turns by about four times as much: many times what rounding moves."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What a row is about; the fields are the row's."""

    tokens: int
    in_features: int
    out_features: int
    block_size: int
    variant: str
    permutation: str
    turn_every: int = 1

    def config(self) -> poetx.POETXConfig:
        """The configuration of the layer."""
        return poetx.POETXConfig(
            block_size=self.block_size,
            variant=self.variant,
            permutation=self.permutation,
            merge_interval=1,
        )


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; returns its rows."""
    parser = options.parser("merged", __doc__)
    options.add_timing(parser)
    options.add_shapes(parser)
    options.add_poetx(parser, (256, 512, 1024))
    options.add_turn_every(parser)
    parser.add_argument("--layers", type=int, default=8, help="that share a step")
    parser.set_defaults(variants=("fast",), permutations=("chunked",))
    args = parser.parse_args(arguments)
    session = Session.start(args, COLUMNS)
    for (m, n), tokens in itertools.product(args.shapes, args.tokens):
        dense = measure_dense(session, tokens, m, n, args.stage, args.layers)
        for block_size, variant, permutation, turn_every in itertools.product(
            args.block_sizes, args.variants, args.permutations, args.turn_every
        ):
            case = Case(tokens, m, n, block_size, variant, permutation, turn_every)
            measure(session, case, args.stage, dense, args.layers)
    return session.finish()


@dataclasses.dataclass
class Dense:
    """A trained `nn.Linear`: what is run, and what it keeps."""

    alone: Callable[[], Any]
    step: Callable[[], Any]
    saved: float


def measure_dense(session: Session, tokens: int, m: int, n: int, stage: str, layers: int) -> Dense:
    """`nn.Linear`, and fused AdamW of `layers` of them; timed beside each layer."""
    contenders.drop_compiled()
    module = contenders.linear(session, m, n)
    fast = contenders.compiled(module, stage)
    x, dy = _data(session, tokens, m, n)
    alone = training_step(fast, module, x, dy)
    alone()
    on_gpu = session.device.type == "cuda"
    model = _several(session, m, n, layers)
    for parameter in model.parameters():
        parameter.grad = session.normal(*parameter.shape)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True, capturable=on_gpu)

    @torch.no_grad()
    def step() -> None:
        adamw_step(optimizer)

    return Dense(alone, step, saved_bytes(fast, module, x).total / MIB)


def measure(session: Session, case: Case, stage: str, dense: Dense, layers: int) -> Row:
    """The row of a layer: gate, times, saved bytes, floors."""
    contenders.drop_compiled()  # the dense layer is compiled again, from Inductor's cache
    layer = contenders.linear(session, case.in_features, case.out_features)
    poetx.prepare(layer, case.config())
    fast = contenders.compiled(layer, stage)
    x, dy = _data(session, case.tokens, case.in_features, case.out_features)
    errors = gate.check_layer(fast, layer, x, dy)
    alone = training_step(fast, layer, x, dy)
    alone()
    model = _several(session, case.in_features, case.out_features, layers)
    poetx.prepare(model, case.config())
    optimizer = poetx.POETXMuon(model, lr=RATE, turn_every=case.turn_every)
    for skew in (skew for e in optimizer.schedule.equivalences for skew in e.skews):
        skew.grad = session.normal(*skew.shape).to(skew.dtype)
    step = step_of(optimizer)
    errors["step_error"] = check_step(model, step, case.turn_every)
    saved = saved_bytes(fast, layer, x)
    times = session.timer.compare(
        {"linear": dense.alone, "layer": alone, "dense steps": dense.step, "steps": step}
    )
    ms = {name: time.ms for name, time in times.items()}
    step_ms, adamw_ms = ms["steps"] / layers, ms["dense steps"] / layers
    trained_ms, linear_ms = ms["layer"] + step_ms, ms["linear"] + adamw_ms
    return session.add(
        **dataclasses.asdict(case),
        ms=trained_ms,
        ms_p20=times["layer"].low + times["steps"].low / layers,
        ms_p80=times["layer"].high + times["steps"].high / layers,
        step_ms=step_ms,
        step_layers=layers,
        linear_ms=linear_ms,
        adamw_ms=adamw_ms,
        ratio=trained_ms / linear_ms,
        layer_ratio=ms["layer"] / ms["linear"],
        saved_mib=saved.total / MIB,
        saved_output_mib=saved.output / MIB,
        linear_saved_mib=dense.saved,
        **errors,
        **_floors(session, case),
    )


def _several(session: Session, m: int, n: int, layers: int) -> nn.Sequential:
    return nn.Sequential(*(contenders.linear(session, m, n) for _ in range(layers)))


def step_of(optimizer: Any) -> Callable[[], None]:
    """What a step of `POETXMuon` does to the device.

    Without hooks, and without telling the host whether the step was finite: that waits for an event
    in the step after, which CUDA graphs cannot hold.
    """
    schedule = optimizer.schedule
    turner, sides = schedule.turner, zip(*(e.skews for e in schedule.equivalences), strict=True)
    skews = [skew for side in sides for skew in side]  # those of the inputs first
    resting = schedule.resting(optimizer.turn_every)
    owners = {p: g for g in optimizer.param_groups if BLOCK in g for p in g["params"]}

    @torch.no_grad()
    def step() -> None:
        steps = optimizer._steps(owners, resting, skews)
        # The angle of steps 1, 2, 4 … is measured, of most it is not.
        turner._turn(turner._layers, 3, set(skews), steps)
        for equivalence in schedule.equivalences:
            equivalence.interrupted = False
        turner._finite = {}

    return step


def check_step(model: nn.Module, step: Callable[[], None], turn_every: int) -> float:
    """One step beside the same in float64: how far its component along that is from 1, at most.

    Rounding is as large as a step, at random, and averages out.
    """
    reference = copy.deepcopy(model).double()
    linears = [[m for _, m, _ in prepared_linears(it)] for it in (model, reference)]
    for layer, wide in zip(*linears, strict=True):
        mine, theirs = equivalence_of(layer), equivalence_of(wide)
        assert mine is not None
        assert theirs is not None
        for skew, other in zip(mine.skews, theirs.skews, strict=True):
            assert skew.grad is not None
            other.grad = skew.grad.double()
    steps = step, step_of(poetx.POETXMuon(reference, lr=RATE, turn_every=turn_every))
    moved = []
    for several, take in zip(linears, steps, strict=True):
        before = [stored_weight(linear).detach().double() for linear in several]
        before = [weight.clone() for weight in before]
        take()
        after = [stored_weight(linear).detach().double() for linear in several]
        moved.append([new - old for new, old in zip(after, before, strict=True)])
    errors = [
        abs(float((actual * expected).sum() / expected.square().sum() - 1))
        for actual, expected in zip(*moved, strict=True)
        if expected.any()  # the others' turn comes later
    ]
    if not max(errors) <= STEP_TOLERANCE:
        raise gate.GateError(f"a step moves a weight by 1 ± {max(errors):.3g} of what it should")
    return max(errors)


def _data(session: Session, tokens: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    return session.normal(tokens, m).requires_grad_(), session.normal(tokens, n)


def _floors(session: Session, case: Case) -> Row:
    sizes = floors.Layer.of(
        case.tokens, case.in_features, case.out_features, case.block_size, session.dtype.itemsize
    )
    layer = floors.total_ms(floors.merged(sizes, case.turn_every), session.ceilings)
    plain = floors.total_ms([*floors.linear(sizes), floors.adamw(sizes)], session.ceilings)
    return {"floor_ms": layer, "linear_floor_ms": plain, "floor_ratio": layer / plain}


if __name__ == "__main__":
    main()
