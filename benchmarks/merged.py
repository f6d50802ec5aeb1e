"""One layer in the merged form: forward, backward and its share of a step of `POETXMuon`.

The time of a POET-X layer holds all that a training step pays for it with ``merge_interval=1``:
forward, backward with dX and the packed gradients, momentum, orthogonalisation, the rotations of
the step, and the turn of the weight. It is compared with a trained `nn.Linear` and its share of
fused AdamW. Where sides take turns (``--sides one``) both steps are timed; a row has their mean.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import statistics
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
from poetx_compile.layers.prepared import equivalence_of, stored_weight
from poetx_compile.optim.adamw import adamw_step
from poetx_compile.optim.groups import BLOCK

COLUMNS = (
    "tokens", "in_features", "out_features", "block_size", "sides", "variant", "permutation", "ms",
    "step_ms", "linear_ms", "adamw_ms", "ratio", "floor_ratio", "layer_ratio", "saved_mib",
    "saved_output_mib", "linear_saved_mib", "gradient_error", "step_error",
)  # fmt: skip

STEP_TOLERANCE = 0.05
"""Of the component of a step along that in float64. Orthogonalisation in bf16 alone moves it by a
few thousandths; a wrong side, sign or factor by a quarter and more."""


SIDES = {"both": (None,), "one": (0, 1)}
"""Sides that turn in a step, and which of them rests: in a step, or in one after another."""

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
    sides: str = "both"

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
    parser.add_argument("--sides", type=options.list_of(str), default=("both",), help="both,one")
    parser.set_defaults(variants=("fast",), permutations=("chunked",))
    args = parser.parse_args(arguments)
    session = Session.start(args, COLUMNS)
    for (m, n), tokens in itertools.product(args.shapes, args.tokens):
        dense = measure_dense(session, tokens, m, n, args.stage)
        for block_size, variant, permutation, sides in itertools.product(
            args.block_sizes, args.variants, args.permutations, args.sides
        ):
            case = Case(tokens, m, n, block_size, variant, permutation, sides)
            measure(session, case, args.stage, dense)
    return session.finish()


@dataclasses.dataclass
class Dense:
    """A trained `nn.Linear`: what is run, and what it keeps."""

    alone: Callable[[], Any]
    trained: Callable[[], Any]
    saved: float


def measure_dense(session: Session, tokens: int, m: int, n: int, stage: str) -> Dense:
    """`nn.Linear` with fused AdamW; timed beside each layer."""
    contenders.drop_compiled()
    module = contenders.linear(session, m, n)
    fast = contenders.compiled(module, stage)
    x, dy = _data(session, tokens, m, n)
    alone = training_step(fast, module, x, dy)
    alone()
    on_gpu = session.device.type == "cuda"
    optimizer = torch.optim.AdamW(module.parameters(), 1e-4, fused=True, capturable=on_gpu)

    def trained() -> None:
        alone()
        with torch.no_grad():
            adamw_step(optimizer)

    return Dense(alone, trained, saved_bytes(fast, module, x).total / MIB)


def measure(session: Session, case: Case, stage: str, dense: Dense) -> Row:
    """The row of a layer: gate, times, saved bytes, floors."""
    contenders.drop_compiled()  # the dense layer is compiled again, from Inductor's cache
    layer = contenders.linear(session, case.in_features, case.out_features)
    poetx.prepare(layer, case.config())
    optimizer = poetx.POETXMuon(layer, lr=RATE, alternate=case.sides == "one")
    fast = contenders.compiled(layer, stage)
    x, dy = _data(session, case.tokens, case.in_features, case.out_features)
    errors = gate.check_layer(fast, layer, x, dy)
    alone = training_step(fast, layer, x, dy)
    alone()
    steps = []
    for rests in SIDES[case.sides]:
        steps.append(step_of(optimizer, rests))
        error = check_step(layer, steps[-1], rests)
        errors["step_error"] = max(error, errors.get("step_error", 0.0))

    def trained(step: Callable[[], None]) -> None:
        alone()
        step()

    saved = saved_bytes(fast, layer, x)
    times = session.timer.compare(
        {
            "linear alone": dense.alone,
            "linear": dense.trained,
            "layer alone": alone,
            **{f"layer {i}": functools.partial(trained, step) for i, step in enumerate(steps)},
        }
    )
    ms = {name: time.ms for name, time in times.items()}
    layer_times = [times[f"layer {i}"] for i in range(len(steps))]
    ms["layer"] = statistics.mean(time.ms for time in layer_times)
    return session.add(
        **dataclasses.asdict(case),
        ms=ms["layer"],
        ms_p20=min(time.low for time in layer_times),
        ms_p80=max(time.high for time in layer_times),
        step_ms=ms["layer"] - ms["layer alone"],
        linear_ms=ms["linear"],
        adamw_ms=ms["linear"] - ms["linear alone"],
        ratio=ms["layer"] / ms["linear"],
        layer_ratio=ms["layer alone"] / ms["linear alone"],
        saved_mib=saved.total / MIB,
        saved_output_mib=saved.output / MIB,
        linear_saved_mib=dense.saved,
        **errors,
        **_floors(session, case),
    )


def step_of(optimizer: Any, rests: int | None = None) -> Callable[[], None]:
    """What a step of `POETXMuon` does to the device.

    Without hooks, and without telling the host whether the step was finite: that waits for an event
    in the step after, which CUDA graphs cannot hold.

    Args:
        rests: the side whose turn it is not: 0, the inputs, or 1, the outputs.
    """
    schedule = optimizer.schedule
    turner, sides = schedule.turner, zip(*(e.skews for e in schedule.equivalences), strict=True)
    skews = [skew for side in sides for skew in side]  # those of the inputs first
    resting = set() if rests is None else {e.skews[rests] for e in schedule.equivalences}
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


def check_step(layer: nn.Module, step: Callable[[], None], rests: int | None = None) -> float:
    """One step beside the same in float64: how far its component along that is from 1.

    Rounding is as large as a step, at random, and averages out.
    """
    equivalence = equivalence_of(layer)
    assert equivalence is not None
    reference = copy.deepcopy(layer).double()
    wide = equivalence_of(reference)
    assert wide is not None
    for mine, theirs in zip(equivalence.skews, wide.skews, strict=True):
        assert mine.grad is not None
        theirs.grad = mine.grad.double()
    alternate = rests is not None
    wide_step = step_of(poetx.POETXMuon(reference, lr=RATE, alternate=alternate), rests)
    moved = []
    for module, take in ((layer, step), (reference, wide_step)):
        before = stored_weight(module).detach().double()
        before = before.clone()
        take()
        moved.append(stored_weight(module).detach().double() - before)
    actual, expected = moved
    error = float((actual * expected).sum() / expected.square().sum() - 1)
    if not abs(error) <= STEP_TOLERANCE:
        raise gate.GateError(f"a step moves the weight by 1 + {error:.3g} of what it should")
    return abs(error)


def _data(session: Session, tokens: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    return session.normal(tokens, m).requires_grad_(), session.normal(tokens, n)


def _floors(session: Session, case: Case) -> Row:
    sizes = floors.Layer.of(
        case.tokens, case.in_features, case.out_features, case.block_size, session.dtype.itemsize
    )
    layer = floors.total_ms(floors.merged(sizes, case.sides == "one"), session.ceilings)
    plain = floors.total_ms([*floors.linear(sizes), floors.adamw(sizes)], session.ceilings)
    return {"floor_ms": layer, "linear_floor_ms": plain, "floor_ratio": layer / plain}


if __name__ == "__main__":
    main()
