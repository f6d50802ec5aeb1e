"""Which optimiser trains the rotations of which layer.

Rotations are owned once an optimiser is attached to them (`optim.schedule`).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.prepared import Layer, equivalence_of, stored_weight
from poetx_compile.layers.registry import registry


@dataclasses.dataclass
class Record:
    """What is known of the training of one layer.

    Attributes:
        linear: weakly, the linear it belongs to; ``None`` of a copy, which nobody enrolled.
        optimizer: weakly, the one that merges it.
        skew_in: the id of the parameter that it was attached to.
        unheld: the sides whose rotations no optimiser holds, as far as is known.
        seen: by side, the last gradient that was seen at a step, and how many there were.
        told: the user has been told that nobody trains it, or means it to be so.
    """

    linear: weakref.ref[nn.Linear] | None = None
    optimizer: weakref.ref[Optimizer] | None = None
    skew_in: int = 0
    unheld: set[str] = dataclasses.field(default_factory=lambda: {"in", "out"})
    seen: dict[str, tuple[Any, int]] = dataclasses.field(default_factory=dict)
    told: bool = False


class Ownership:
    """The records of all layers that were enrolled or attached to; one a process."""

    def __init__(self) -> None:
        self._records: weakref.WeakKeyDictionary[OrthogonalEquivalence, Record]
        self._records = weakref.WeakKeyDictionary()
        self._revision = -1

    def record(self, layer: OrthogonalEquivalence) -> Record:
        """What is known of `layer`; made where nothing is."""
        self._look()
        if layer not in self._records:
            self._records[layer] = Record()
        return self._records[layer]

    def records(self) -> list[tuple[OrthogonalEquivalence, Record]]:
        """Every layer of which something is known."""
        self._look()
        return list(self._records.items())

    def _look(self) -> None:
        """Make the records of layers that were enrolled since."""
        if self._revision == registry.revision:
            return
        self._revision = registry.revision
        for module, e in enrolled():
            if e not in self._records:
                self._records[e] = Record()
            if self._records[e].linear is None:
                self._records[e].linear = weakref.ref(module)


ownership = Ownership()


def own(equivalences: Iterable[OrthogonalEquivalence], optimizer: Optimizer) -> None:
    """Note that `optimizer` merges these layers, and trains those of their rotations it holds."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for e in equivalences:
        record = ownership.record(e)
        record.optimizer, record.skew_in = weakref.ref(optimizer), id(e.skew_in)
        record.unheld -= {side.name for side in e.sides if side.skew in held}


def owner(equivalence: OrthogonalEquivalence) -> Optimizer | None:
    """The live optimiser that trains and merges the rotations of a layer, as they are now."""
    record = ownership.record(equivalence)
    ours = record.optimizer is not None and record.skew_in == id(equivalence.skew_in)
    return record.optimizer() if ours and record.optimizer is not None else None


def enrolled() -> Iterator[Layer]:
    """The linears that were enrolled and are still prepared."""
    for module in registry.linears():
        if (e := equivalence_of(module)) is not None:
            yield module, e


def layers_of(optimizer: Optimizer) -> list[Layer]:
    """The enrolled layers of which `optimizer` holds a parameter, in its order."""
    layers = dict(enrolled())
    # As they are now: sharding makes new parameters.
    module_of = {p: m for m, e in layers.items() for p in (stored_weight(m), *e.skews)}
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    found = dict.fromkeys(m for p in parameters if (m := module_of.get(p)) is not None)
    return [(m, layers[m]) for m in found]


def held(optimizer: Optimizer) -> list[Layer]:
    """The enrolled layers without an owner of which `optimizer` holds a parameter, in its order."""
    return [(m, e) for m, e in layers_of(optimizer) if owner(e) is None]


def prepared_by_hand(optimizer: Optimizer) -> bool:
    """Whether `optimizer` holds parameters of layers that `prepare` has prepared."""
    return any(not e.adopted for _, e in layers_of(optimizer))
