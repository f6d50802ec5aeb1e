"""What an action is, and the table of all of them.

An action is a function of the world and of keyword arguments; the decorator lists the values that
a random sequence takes for each, and how often the action comes. One that makes no sense in the
state the world is in (`needs`) is passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.play.invariants import require
from tests.play.world import World

WITHHELD: tuple[str, ...] = ()
"""Values that meet faults which are known, and are being mended: not drawn until then."""


@dataclasses.dataclass(frozen=True)
class Action:
    function: Callable[..., None]
    weight: int
    needs: str
    values: dict[str, tuple]

    def draw(self, rng: random.Random) -> dict[str, Any]:
        return {
            name: rng.choice([v for v in values if v not in WITHHELD])
            for name, values in self.values.items()
        }

    def makes_sense(self, world: World) -> bool:
        if self.needs == "prepared":
            return world.prepared
        if self.needs == "dense":
            return world.kind == "dense"
        return self.needs == "any" or not world.unsettled


ACTIONS: dict[str, Action] = {}


def action(weight: int = 1, needs: str = "prepared", **values: tuple) -> Callable:
    """Register an action.

    Args:
        weight: how often it comes.
        needs: a world that is ``"prepared"``, ``"dense"`` (unloaded), ``"settled"`` (either, but
            not about to be adopted), or ``"any"``.
        values: what each argument is drawn from.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        ACTIONS[function.__name__] = Action(function, weight, needs, values)
        return function

    return register


@contextlib.contextmanager
def raises(kind: type[BaseException], what: str, says: str = "") -> Iterator[None]:
    try:
        yield
    except kind as error:
        require(says in str(error), f"{what}: {error}")
        return
    require(False, f"{what}: no {kind.__name__}")
