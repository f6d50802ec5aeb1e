"""Which optimiser trains which rotations, watched through torch's global step hooks.

A prepared layer is enrolled here, and its rotations are owned once an optimiser is attached to
them. Before each step of any torch optimiser: what the compiler adopted and no backward has settled
is settled. Where the optimiser holds parameters of enrolled layers: rotations that the compiler
made are taken over; a weight that `prepare` froze, in an optimiser without its rotations, raises;
so does a prepared weight of zeros, which cannot train (values may come after `prepare`); rotations
that nobody merges are told once. After each step: rotations that get gradients and that no
optimiser holds.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from poetx_compile.census import Census
from poetx_compile.eligibility import linears
from poetx_compile.errors import NothingToTrainError, UnownedRotationsError
from poetx_compile.parametrization import (
    OrthogonalEquivalence,
    equivalence_of,
    revision,
    stored_weight,
)
from poetx_compile.shards import groups_of, local, reduce_over

log = logging.getLogger("poetx_compile")

_linears: weakref.WeakSet[nn.Linear] = weakref.WeakSet()  # enrolled, and still prepared or not
_Layers = weakref.WeakKeyDictionary[OrthogonalEquivalence, Any]
_owners: _Layers = weakref.WeakKeyDictionary()  # layer → its optimiser, weakly; id of its skew_in
_orphans: _Layers = weakref.WeakKeyDictionary()  # layer → its linear; sides no optimiser holds
_looked: weakref.WeakKeyDictionary[Optimizer, _Look] = weakref.WeakKeyDictionary()
trials: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Copies of optimisers that `optim.probe` steps: they train nothing."""

_version = 0
_steps = 0
_watching = False

take_over: Callable[[Optimizer, list[nn.Linear]], Any] | None = None
"""Gives an optimiser the rotations of linears whose weights it holds; set by `optim.takeover`."""

settle: Callable[..., None] | None = None
"""Moves adopted states into their modules where no backward has; set by `settling`."""


class _Look(NamedTuple):
    """What was found when an optimiser was looked at."""

    state: tuple[int, int, int]
    idle: weakref.WeakSet[OrthogonalEquivalence]
    """Layers with frozen rotations: it is looked at again when these train."""

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether there is nothing new to see."""
        return self.state == _state(optimizer) and not any(e.trains for e in self.idle)


def enrol(module: nn.Linear, equivalence: OrthogonalEquivalence) -> None:
    """Watch over the rotations of a layer that has just been prepared."""
    global _version
    _version += 1
    _linears.add(module)
    if stored_weight(module)._backward_hooks:
        log.warning(
            "a gradient hook of a weight of shape %s is not called any more: the weight is frozen, "
            "and rotations are trained in its place. Register hooks after poetx_compile.prepare",
            list(stored_weight(module).shape),
        )
    _orphans[equivalence] = weakref.ref(module), set(_sides(equivalence))
    watch()


def own(equivalences: Iterable[OrthogonalEquivalence], optimizer: Optimizer) -> None:
    """Note that `optimizer` merges these layers, and trains those of their rotations it holds."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for e in equivalences:
        _owners[e] = weakref.ref(optimizer), id(e.skew_in)
        if e in _orphans:
            _, sides = _orphans[e]
            sides -= {side for side, skew in _sides(e).items() if skew in held}


def _sides(equivalence: OrthogonalEquivalence) -> dict[str, nn.Parameter]:
    return {"in": equivalence.skew_in, "out": equivalence.skew_out}


def owner(equivalence: OrthogonalEquivalence) -> Optimizer | None:
    """The live optimiser that trains and merges the rotations of a layer, as they are now."""
    reference, skew_in = _owners.get(equivalence, (None, None))
    return reference() if reference is not None and skew_in == id(equivalence.skew_in) else None


def enrolled() -> list[tuple[nn.Linear, OrthogonalEquivalence]]:
    """The layers that are watched, and are still prepared."""
    return [(m, e) for m in list(_linears) if (e := equivalence_of(m)) is not None]


def prepared_by_hand(optimizer: Optimizer) -> bool:
    """Whether `optimizer` holds parameters of layers that `prepare` has prepared."""
    return any(not e.adopted for _, e in _layers_of(optimizer))


def held(optimizer: Optimizer) -> list[tuple[nn.Linear, OrthogonalEquivalence]]:
    """The enrolled layers without an owner of which `optimizer` holds a parameter, in its order."""
    return [(m, e) for m, e in _layers_of(optimizer) if owner(e) is None]


def _layers_of(optimizer: Optimizer) -> list[tuple[nn.Linear, OrthogonalEquivalence]]:
    """The enrolled layers of which `optimizer` holds a parameter, in its order."""
    layers = dict(enrolled())
    # As they are now: sharding makes new parameters.
    module_of = {p: m for m, e in layers.items() for p in (stored_weight(m), e.skew_in, e.skew_out)}
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    found = dict.fromkeys(m for p in parameters if (m := module_of.get(p)) is not None)
    return [(m, layers[m]) for m in found]


def steps() -> int:
    """How many steps the optimisers of this process have taken since the first `prepare`."""
    return _steps


def watch() -> None:
    """Look at the steps of all optimisers from now on."""
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_pre_hook(torch.compiler.disable(_before_any_step))
        register_optimizer_step_post_hook(torch.compiler.disable(_after_any_step))


def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in trials:
        return
    if settle is not None and torch._C._current_graph_task_id() == -1:  # in no backward
        settle(late=True)
    if (look := _looked.get(optimizer)) is not None and look.holds(optimizer):
        return
    found = held(optimizer)
    layers = [(m, e) for m, e in found if e.trains]
    if (adopted := [m for m, e in layers if e.adopted]) and take_over is not None:
        take_over(optimizer, adopted)
    by_hand = [(m, e) for m, e in layers if not e.adopted]
    parameters = {p for group in optimizer.param_groups for p in group["params"]}
    without = [e for _, e in by_hand if not {e.skew_in, e.skew_out} & parameters]
    if without:
        raise UnownedRotationsError(
            f"{type(optimizer).__name__} holds the weights of {len(without)} prepared layer(s), "
            "which are frozen, and not their rotations: it was built before prepare. Build it from "
            "poetx_compile.param_groups(model, lr=...), or call "
            "poetx_compile.adopt(optimizer, model)"
        )
    # A step at a rate of zero turns nothing, and may come before the values of the weights:
    # torch.distributed.checkpoint takes one, to have the optimiser's state made.
    if not any(float(group.get("lr", 1.0)) > 0 for group in optimizer.param_groups):
        return
    _check_weights([(m, e) for m, e in _layers_of(optimizer) if e.written and e.trains])
    if by_hand:
        for _, e in by_hand:
            _orphans.pop(e, None)
        log.warning(
            "%s trains the rotations of %d layer(s) and never merges them: call "
            "poetx_compile.attach(optimizer, model)",
            type(optimizer).__name__,
            len(by_hand),
        )
    idle = weakref.WeakSet(e for _, e in found if not e.trains)
    _looked[optimizer] = _Look(_state(optimizer), idle)


def _state(optimizer: Optimizer) -> tuple[int, int, int]:
    """What may have changed since an optimiser was looked at: layers, weights, its parameters."""
    return _version, revision(), sum(len(group["params"]) for group in optimizer.param_groups)


def _check_weights(layers: Sequence[tuple[nn.Linear, OrthogonalEquivalence]]) -> None:
    """Raise `NothingToTrainError` where a weight is all zeros; of sharded ones, in every process.

    `prepare` leaves such a weight dense, if it has values by then.
    """
    by_device: dict[torch.device, list[nn.Linear]] = defaultdict(list)
    for module, _ in layers:
        by_device[stored_weight(module).device].append(module)
    empty = []
    for modules in by_device.values():
        weights = [stored_weight(module) for module in modules]
        some = torch.stack([local(weight).any() for weight in weights]).int()
        found = reduce_over(groups_of(weights), some, "max").tolist()
        empty += [module for module, any_ in zip(modules, found, strict=True) if not any_]
    if empty:
        names = ", ".join(map(_name, empty))
        raise NothingToTrainError(
            f"the weight of {names} is all zeros, which no rotation changes: it "
            "would never train. Name it in exclude_modules, or call prepare when the model has "
            "its values, to train it densely; of a model that is prepared, "
            "poetx_compile.merge_and_unload(layer) makes a layer dense: build a new optimiser then"
        )
    for _, e in layers:
        e.written = False


def _name(module: nn.Linear) -> str:
    """The name of a linear in its model, as far as the process knows."""
    root = Census().root(module)
    return next((n for n, m in linears(root).items() if m is module and n), "(root)")


_gradients: _Layers = weakref.WeakKeyDictionary()  # layer → last gradient and how many, by side


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Tell of rotations that got gradients before two steps while no optimiser holds them.

    Adopted ones raise: the script knows nothing of them. Those of `prepare` may be left out on
    purpose, and are told once. A gradient counts once: one that is left over from an earlier
    backward (of another model, or because two optimisers step after each backward) says nothing
    new.
    """
    global _steps
    if optimizer in trials:
        return
    _steps += 1
    idle = _count_gradients()
    if not idle:
        return
    gc.collect()  # those of a model that is gone say nothing
    layers = dict.fromkeys(m for layer in idle if (m := layer()) is not None)
    states = [e for m in layers if (e := equivalence_of(m)) is not None]
    by_hand = [e for e in states if not e.adopted]
    for e in by_hand:
        _orphans.pop(e, None)
    if by_hand:
        log.warning(
            "the rotations of %d prepared layer(s) had gradients at two steps of %s, but no "
            "optimiser holds them, and they do not train: build it from "
            "poetx_compile.param_groups(model, lr=...), or freeze them",
            len(by_hand),
            type(optimizer).__name__,
        )
    if adopted := len(states) - len(by_hand):
        _gradients.clear()
        raise UnownedRotationsError(
            f"the rotations of {adopted} adopted layer(s) had gradients at two steps of "
            f"{type(optimizer).__name__}, but no optimiser holds them, and their dense weights are "
            "frozen: the model does not train. Give model.parameters() to an optimiser, exclude or "
            "freeze what is not to train, or build poetx_compile.POETXAdamW(model)"
        )


def _count_gradients() -> list[weakref.ref[nn.Linear]]:
    """The layers that no optimiser holds and that have had gradients at two steps."""
    idle = []
    for e, (reference, sides) in list(_orphans.items()):
        seen = _gradients.setdefault(e, {})
        for side, skew in _sides(e).items():
            if side not in sides or skew.grad is None:
                continue
            now = id(skew.grad), skew.grad._version
            last, count = seen.get(side, (None, 0))
            if last != now:
                seen[side] = now, count + 1
                if count:
                    idle.append(reference)
    return idle
