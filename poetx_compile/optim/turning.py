"""The step of the merged form (``merge_interval=1``): directions become rotations of the weights.

Between steps the skew parameters are zeros that take no bytes (`OrthogonalEquivalence.rest`). In a
step they are given memory, and the optimiser's update of a zero parameter *is* the step Q: it
becomes a rotation R, ``W ← R_outᵀ W R_inᵀ`` is written in place (`turn_weights_`), and the
parameters are at rest again. Any optimiser does so for all layers at once, between the hooks of
`attach`. `POETXAdamW` does it by batches of layers (`Turner.step`), so that no more than a batch of
steps is ever alive; so does `POETXMuon`, whose steps are made as such (`Turner.turn_by`): its
parameters stay at rest.

A step that is NaN or infinite is written into no weight: a flag on the device says so to
`turn_weights_`, and to the host before the next step, which has not to wait for it by then.

Rounding adds to a weight of 2 bytes what rotations would not. Every `NORM_EVERY` steps its norm is
put right again: the rotation of the step is scaled, and the weight rounded no more often.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poetx_compile.errors import AdoptionError, DivergedError
from poetx_compile.layers.integrity import INTERRUPTED
from poetx_compile.layers.parametrization import OrthogonalEquivalence, mark_interrupted
from poetx_compile.layers.prepared import Layer, stored_weight
from poetx_compile.ops.packing import packed_size
from poetx_compile.ops.turn_weight import Turn, turn_weights_
from poetx_compile.optim.blocks import bounded, layer_batches
from poetx_compile.optim.spectral_norm import largest_norms

DIVERGED = (
    "the step of the rotations was NaN or infinite, and no weight was turned by it: a loss or a "
    "gradient was so. Load the last checkpoint; a lower learning rate, "
    "poetx_compile.clip_grad_norm_ and, for float16, a GradScaler keep it from happening again"
)
_ONE_CLOSURE = (
    "an optimiser that evaluates its closure more than once in a step cannot train rotations with "
    "merge_interval=1, whose steps start from zero: use a larger merge_interval"
)

STEPS_BYTES = 256 * 2**20
"""Bytes of packed steps that are made at once: fewer launches, each of which keeps a GPU busy. What
they are made from takes four times as much."""

LARGE = 0.1
"""θ of a step that is warned of: with order 3 it shrinks planes by θ⁴, a ten thousandth."""

MEASURED_EVERY = 128

NORM_EVERY = 200
"""Steps in which rounding to bf16 moves a norm by less than a tenth of a per cent."""

ROUNDING = 0.01
"""Relative change of a norm that can come of rounding. One that is further off was changed by
something else, and stays as it is: `diagnostics` tells of it."""

log = logging.getLogger("poetx_compile")

Update = Callable[[set[Tensor]], None]
"""Lets an optimiser update the parameters of a set, and no others."""

Steps = Sequence[tuple[Tensor, int, Sequence[Tensor]]]
"""Packed steps [blocks, b(b−1)/2], b, and the rotations whose they are, one after another."""

Make = Callable[[Sequence[nn.Parameter]], Steps]
"""Makes the steps of rotations from zero; of those that stay, without a gradient, it makes none."""


def by_rotation(steps: Steps) -> dict[Tensor, Tensor]:
    """The step of each rotation."""
    made: dict[Tensor, Tensor] = {}
    for stack, _, skews in steps:
        several = stack.split([s.shape[0] for s in skews]) if len(skews) > 1 else [stack]
        made.update(zip(skews, several, strict=True))
    return made


def turn_of(
    weight: Tensor,
    e: OrthogonalEquivalence,
    step_in: Tensor | None,
    step_out: Tensor | None,
    number: int,
    scale: Tensor | None = None,
) -> Turn:
    """What turns a stored weight by its steps."""
    of_sides = *e.pairs, e.block_in, e.block_out
    return Turn(weight, step_in, step_out, *of_sides, e.order, number, scale)


class Turner:
    """Turns the weights of some layers, for one optimiser.

    Args:
        layers: of the merged form. Their numbers, by which stochastic rounding tells them apart,
            are their places here.

    Attributes:
        angle: the largest θ, the spectral norm of a step Q, of the step that was measured last.
    """

    def __init__(self, layers: Sequence[Layer]):
        self._numbers = {e: number for number, (_, e) in enumerate(layers)}
        self._layers = list(layers)
        self._skews = {e: e.skews for _, e in layers}  # the same as long as there is this object
        self._batches = list(layer_batches(layers))
        self._of_steps: dict[int, list[tuple[list[Layer], list[nn.Parameter]]]] = {}
        self._open: list[Layer] = []
        self._finite: dict[torch.device, Tensor] = {}
        self._angles: list[Tensor] = []
        self._told: list[_Told] = []
        self._warned = False
        self.angle: float | None = None

    # --- what an optimiser of this package does ---------------------------------------------------

    def step(self, number: int, moving: set[Tensor], update: Update) -> None:
        """Update and turn by batches.

        Args:
            number: of this step, a counter of stochastic rounding.
            moving: parameters whose rate is not zero; the others are updated as well, for the
                sake of the optimiser's state.
            update: called once for each batch.
        """
        for batch in self._batches:
            self.open(self._with_gradients(batch))
            if not self._open:
                continue
            try:
                update({skew for _, e in self._open for skew in self._skews[e]})
                self._turn_open(number, moving)
            finally:
                self.close()
        self._finish()

    def turn_by(self, number: int, moving: set[Tensor], make: Make, period: int) -> None:
        """Turn by batches of layers; no parameter is given memory.

        Args:
            number, moving: as for `step`.
            make: called once for each batch, for its rotations: those of the inputs first.
            period: it makes the steps of about one of so many.
        """
        if period not in self._of_steps:
            batches = bounded(self._layers, _bytes_of_steps, STEPS_BYTES * period)
            self._of_steps[period] = [(batch, self._by_sides(batch)) for batch in batches]
        for layers, skews in self._of_steps[period]:
            self._turn(layers, number, moving, make(skews), period)
        self._finish()

    def _by_sides(self, layers: Sequence[Layer]) -> list[nn.Parameter]:
        of_sides = zip(*(self._skews[e] for _, e in layers), strict=True)
        return [skew for side in of_sides for skew in side]

    # --- what is done around the step of any other ------------------------------------------------

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the parameters memory, or have the closure of a step do so after it has run.

        Returns:
            Other arguments for the step, or ``None``.
        """
        _, *given = args
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            self.open(self._with_gradients(self._layers))
            return None
        ran = False

        def then_open() -> Any:
            nonlocal ran
            if ran:
                raise AdoptionError(_ONE_CLOSURE)
            loss, ran = closure(), True
            self.open(self._with_gradients(self._layers))
            return loss

        return (args[0], then_open), {k: v for k, v in kwargs.items() if k != "closure"}

    def after_step(self, number: int, moving: set[Tensor]) -> None:
        """Turn the weights by what the parameters hold now; arguments as for `step`."""
        try:
            self._turn_open(number, moving)
        finally:
            self.close()
        self._finish()

    def _with_gradients(self, layers: Sequence[Layer]) -> list[Layer]:
        def has(skew_in: Tensor, skew_out: Tensor) -> bool:
            return skew_in.grad is not None or skew_out.grad is not None

        return [layer for layer in layers if has(*self._skews[layer[1]])]

    def open(self, layers: Sequence[Layer]) -> None:
        """Give the skew parameters of `layers` memory of their own, zeros."""
        self.close()
        self._open = list(layers)
        skews: list[Tensor] = [s for _, e in layers for s in self._skews[e]]
        with torch.no_grad():
            for skew in skews:
                skew.data = torch.empty_like(skew)
            if skews:
                torch._foreach_zero_(skews)

    def close(self) -> None:
        """Let all parameters be at rest."""
        for _, e in self._open:
            e.rest()
        self._open = []

    # --- the weights ------------------------------------------------------------------------------

    def _turn_open(self, number: int, moving: set[Tensor]) -> None:
        steps = []
        for _, e in self._open:
            for skew, b in zip(self._skews[e], (e.block_in, e.block_out), strict=True):
                if skew.shape[0]:
                    steps.append((skew.detach(), b, [skew]))
        self._turn(self._open, number, moving, steps)

    @torch.no_grad()
    def _turn(
        self,
        layers: Sequence[Layer],
        number: int,
        moving: set[Tensor],
        steps: Steps,
        period: int = 1,
    ) -> None:
        """Turn the layers that have steps that move: what has a rate of zero keeps its bits.

        They are marked as interrupted until `_finish`. A side without a step is none of a turn, and
        has one within `period` steps.
        """
        steps = [step for step in steps if not moving.isdisjoint(step[-1])]
        self._look_at([made for made, *_ in steps])
        if _measured(number):
            self._angles += largest_norms([(made, b) for made, b, _ in steps])
        of_skew = by_rotation(steps)
        turns: dict[torch.device, list[Turn]] = defaultdict(list)
        scaled, turning = _is_scaled(number, period), []
        for module, e in layers:
            step_in, step_out = map(of_skew.get, self._skews[e])
            if step_in is None and step_out is None:
                continue
            weight = stored_weight(module)
            e.note_norm(weight)
            scale = _to_its_norm(e, weight) if scaled else None
            turn = turn_of(weight, e, step_in, step_out, self._numbers[e], scale)
            turns[weight.device].append(turn)
            turning.append(e)
        mark_interrupted(turning, True)
        try:
            for device, several in turns.items():
                seed = layers[0][1].config.seed
                turn_weights_(several, seed, number, self._finite.get(device))
        except BaseException as error:
            error.add_note(f"poetx: {INTERRUPTED}")
            raise

    def _look_at(self, steps: Sequence[Tensor]) -> None:
        """Bring the flags of the devices up to date: 0 where a step is not finite."""
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for step in steps:
            by_device[step.device].append(step)
        for device, found in by_device.items():
            largest = torch.stack(torch._foreach_norm(found, float("inf")))
            finite = largest.isfinite().all().int()
            before = self._finite.get(device)
            self._finite[device] = finite if before is None else before * finite

    def _finish(self) -> None:
        """Every layer is whole again; the flags go to the host."""
        mark_interrupted(self._skews, False)
        flags = [flag for flag in self._finite.values() if not flag.is_meta]
        angles = [angle for angle in self._angles if not angle.is_meta]
        self._told += [_Told(flag, False) for flag in flags] + [_Told(a, True) for a in angles]
        self._finite, self._angles = {}, []
        if not any(told.event for told in self._told):
            self.check()

    def check(self) -> None:
        """Read what earlier steps have told.

        Raises:
            DivergedError: one was not finite.
        """
        told, self._told = self._told, []
        values = [(t.is_angle, t.read()) for t in told]
        if not all(value for is_angle, value in values if not is_angle):
            raise DivergedError(DIVERGED)
        angles = [value for is_angle, value in values if is_angle]
        if angles:
            self.angle = max(angles)
            self._look_at_angle()

    def _look_at_angle(self) -> None:
        orders = {e.order for e in self._numbers} - {None}
        if self._warned or not orders or self.angle is None or self.angle <= LARGE:
            return
        self._warned = True
        power = min(k for k in orders if k is not None) + 1
        log.warning(
            "one optimiser step turned rotations by %.3g, and with merge_interval=1 it changes "
            "singular values by up to %.1e for good: lower poetx_lr, warm it up, or prepare with "
            "cayley='exact' or a larger neumann_order",
            self.angle,
            self.angle**power,
        )

    def forget(self) -> None:
        """Another state has been loaded: what was told of steps before it says nothing."""
        self._told = []


def _measured(number: int) -> bool:
    """Whether the angle of a step is measured: of the first ones often, later now and then."""
    return number & (number - 1) == 0 or number % MEASURED_EVERY == 0


def _is_scaled(number: int, period: int) -> bool:
    """Whether what turns in a step gets its norm back: every side once, of `period` steps."""
    return number >= NORM_EVERY and number % NORM_EVERY < period


def _to_its_norm(e: OrthogonalEquivalence, weight: Tensor) -> Tensor | None:
    """What brings a weight to the norm that it began with; ``None`` of one that keeps it."""
    if weight.element_size() > 2:
        return None
    scale = e.reference_norm / e.norm(weight)
    return torch.where((scale - 1).abs() < ROUNDING, scale, 1.0)  # 1 where it is NaN, too


def _bytes_of_steps(layer: Layer) -> int:
    return sum(4 * side.blocks * packed_size(side.block) for side in layer[1].sides)


class _Told:
    """A scalar on its way from the device to the host."""

    def __init__(self, value: Tensor, is_angle: bool):
        self.is_angle = is_angle
        self.event: torch.cuda.Event | None = None
        if value.is_cuda:
            host = torch.empty((), dtype=value.dtype, pin_memory=True)
            host.copy_(value, non_blocking=True)
            with torch.cuda.device(value.device):
                self.event = torch.cuda.Event()
                self.event.record()
            value = host
        self._value = value

    def read(self) -> float:
        """Its value; waits where the device has not come that far."""
        if self.event is not None:
            self.event.synchronize()
        return float(self._value)
