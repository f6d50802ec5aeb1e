"""The angle guard: merge early rather than let the largest angle of a rotation pass `max_angle`.

The angle of a block is the spectral norm θ of its Q: an eigenvalue ±iθ turns its plane by 2·atan θ,
and the Cayley-Neumann expansion of order 3 shrinks that plane by θ⁴. Measuring θ costs the device a
few reads of Q, so most steps are covered by a bound that is arithmetic on the host:

``θ(now) ≤ θ(measured) + turn · (sum of the learning rates since)``

with `turn`, the largest turn of a step per unit of learning rate, taken from the first step after
each merge (there Q is that step) and from the growth between measurements. A measurement is
launched where the bound has come half of the way to the limit, and is read one step later, when the
device has finished it and is busy with the next step: nothing waits. (Only the first of a run is
waited for, and all of them where merges come every few steps.) Which step reads which measurement
does not depend on timing, so all processes decide alike. Where the skew parameters are sharded each
process measures its own blocks, and one number is reduced over all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from poetx_compile.distributed.shards import groups_of, local, reduce_over
from poetx_compile.optim.spectral_norm import largest_norms

UNDERESTIMATE = 1.02
"""The Lanczos estimate may lie this much below the norm."""

SAFETY = 1.25
"""Allowance for steps that turn further than those measured."""

WAY = 1 / 2
"""A measurement is renewed when the bound has come this far from it to the limit: steps that
suddenly double their turn are noticed before they pass it."""

LARGE_STEP = 1 / 16
"""A step that turns by more than this fraction of the limit is measured and read at once."""

MAX_AGE = 16
"""A measurement is renewed after this many steps, however little they seem to turn."""

ANGLE = "poetx_angle"
ANGLE_STEP = "poetx_angle_step"
TRAVEL = "poetx_travel"
TURN = "poetx_turn"

log = logging.getLogger("poetx_compile")

Ledger = MutableMapping[str, Any]


class AngleGuard:
    """Decides after each optimiser step whether the next one could pass the limit.

    All it knows, but for a measurement under way, are four numbers in a ledger that is saved with
    the optimiser: the last measured angle, its step, the sum of the learning rates since (travel)
    and the turn per unit of learning rate.

    Args:
        skews: (packed skew parameter, block size) of every rotated side.
        limit: `POETXConfig.max_angle`, radians.
    """

    def __init__(self, skews: Sequence[tuple[Tensor, int]], limit: float):
        self._skews, self._limit = skews, limit
        self._pending: _Measurement | None = None
        self._warned = False

    @staticmethod
    def fresh() -> dict[str, float]:
        """The ledger of a guard that has seen nothing."""
        return {ANGLE: 0.0, ANGLE_STEP: 0, TRAVEL: 0.0, TURN: 0.0}

    def after_step(self, ledger: Ledger, step: int, lr: float) -> bool:
        """Whether a merge is due: the angle could pass the limit in the next step.

        Args:
            ledger: updated in place.
            step: number of this optimiser step, from 1.
            lr: the largest learning rate of the skew parameters in this step, > 0.
        """
        self.collect(ledger)
        ledger[TRAVEL] += lr
        if self._should_measure(ledger, step, lr):
            self._pending = _Measurement(self._skews, ledger, step)
            # Waited for only where there is nothing to predict from yet, and where a single step
            # is so large that a merge, far dearer, comes every few steps anyway.
            if ledger[TURN] == 0.0 or SAFETY * ledger[TURN] * lr > LARGE_STEP * self._limit:
                self.collect(ledger)
        return self._bound(ledger, lr) > self._limit

    def merged(self, ledger: Ledger, step: int) -> None:
        """Start again from zero; a measurement under way still tells how far a step turns."""
        if self._pending is not None:
            self._pending.before_merge = True
        ledger.update({ANGLE: 0.0, ANGLE_STEP: step, TRAVEL: 0.0})

    def collect(self, ledger: Ledger) -> None:
        """Enter the measurement under way, if there is one, into the ledger for good."""
        self.enter(ledger)
        self._pending = None

    def enter(self, ledger: Ledger) -> None:
        """Enter the measurement under way, if there is one, into a ledger."""
        pending = self._pending
        if pending is None:
            return
        angle = pending.read()
        if not math.isfinite(angle):
            return  # nothing is known, and no merge can help; perhaps a checkpoint is loaded
        turn = (angle - pending.known) / pending.travel
        if pending.age == 1 and turn * pending.travel > self._limit and not self._warned:
            self._warned = True
            log.warning(
                "a single optimiser step turned rotations by %.3g, more than max_angle = %g: the "
                "angle guard merges after every step and cannot do better. Lower poetx_lr.",
                turn * pending.travel,
                self._limit,
            )
        ledger[TURN] = turn if pending.known == 0.0 else max(ledger[TURN], turn)
        if not pending.before_merge:
            ledger.update({ANGLE: angle, ANGLE_STEP: pending.step, TRAVEL: 0.0})

    def drop_pending(self) -> None:
        """Drop the measurement under way: another state has been loaded."""
        self._pending = None

    def restart(self, ledger: Ledger, step: int) -> None:
        """Measure now, and wait: the rotations are not those that the steps so far have made."""
        self.drop_pending()
        angle = _Measurement(self._skews, ledger, step).read()
        if math.isfinite(angle):
            ledger.update({ANGLE: angle, ANGLE_STEP: step, TRAVEL: 0.0})

    def _should_measure(self, ledger: Ledger, step: int, lr: float) -> bool:
        age = step - ledger[ANGLE_STEP]
        # Read in the next step at the earliest, where the one after that has to be decided.
        then = self._bound(ledger, 2 * lr)
        return (
            ledger[TURN] == 0.0
            or (ledger[ANGLE] == 0.0 and age == 1)
            or then > (1 - WAY) * UNDERESTIMATE * ledger[ANGLE] + WAY * self._limit
            or age >= MAX_AGE
        )

    def _bound(self, ledger: Ledger, ahead: float) -> float:
        """Upper bound of the angle after `ahead` more learning rate."""
        return UNDERESTIMATE * ledger[ANGLE] + SAFETY * ledger[TURN] * (ledger[TRAVEL] + ahead)


class _Measurement:
    """The largest angle at a step, on its way from the device to the host."""

    def __init__(self, skews: Sequence[tuple[Tensor, int]], ledger: Ledger, step: int):
        self.step, self.age = step, step - ledger[ANGLE_STEP]
        self.known: float = ledger[ANGLE]
        self.travel: float = ledger[TRAVEL]
        self.before_merge = False
        self._values: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []
        groups = groups_of(skew for skew, _ in skews)
        for norm in largest_norms([(local(skew), b) for skew, b in skews]):
            value = reduce_over(groups, norm, "max")
            if value.is_cuda:
                host = torch.empty((), dtype=value.dtype, pin_memory=True)
                host.copy_(value, non_blocking=True)
                with torch.cuda.device(value.device):
                    event = torch.cuda.Event()
                    event.record()
                self._events.append(event)
                value = host
            self._values.append(value)

    def read(self) -> float:
        """The angle; NaN where nothing is known, as of rotations on meta."""
        if any(value.is_meta for value in self._values):
            return math.nan
        for event in self._events:
            event.synchronize()
        return max(float(value) for value in self._values)
