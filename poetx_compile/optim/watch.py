"""What is looked at around the steps of all optimisers, so that no rotation is left out in silence.

Before a step, where the optimiser holds parameters of prepared layers: rotations that the compiler
made are taken over; a weight that `prepare` froze, in an optimiser without its rotations, raises;
so does a prepared weight of zeros, which cannot train (values may come after `prepare`); rotations
that nobody merges are told once. After a step: rotations that get gradients and that no optimiser
holds.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from poetx_compile.distributed.shards import groups_of, local, reduce_over
from poetx_compile.errors import NothingToTrainError, UnownedRotationsError
from poetx_compile.layers.eligibility import linears
from poetx_compile.layers.live_objects import LiveObjects
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.prepared import Layer, equivalence_of, stored_weight
from poetx_compile.layers.registry import registry
from poetx_compile.optim.hooks import After, Before, step_hooks
from poetx_compile.optim.ownership import held, layers_of, ownership
from poetx_compile.optim.takeover import take_over

log = logging.getLogger("poetx_compile")


class _Look(NamedTuple):
    """What was found when an optimiser was looked at."""

    state: tuple[int, int]
    idle: weakref.WeakSet[OrthogonalEquivalence]
    """Layers with frozen rotations: it is looked at again when these train."""

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether there is nothing new to see."""
        return self.state == _state(optimizer) and not any(e.trains for e in self.idle)


def _state(optimizer: Optimizer) -> tuple[int, int]:
    """What may have changed since an optimiser was looked at: layers, weights, parameters."""
    return registry.revision, sum(len(group["params"]) for group in optimizer.param_groups)


class Watch:
    """What was seen so far; one a process."""

    def __init__(self) -> None:
        self._looked: weakref.WeakKeyDictionary[Optimizer, _Look] = weakref.WeakKeyDictionary()
        step_hooks.before(Before.OWN, self.before_step)
        step_hooks.after(After.COUNT, self.after_step)

    def before_step(self, optimizer: Optimizer) -> None:
        """Give an optimiser what it is to train, and refuse what it cannot."""
        if (look := self._looked.get(optimizer)) is not None and look.holds(optimizer):
            return
        found = held(optimizer)
        layers = [(m, e) for m, e in found if e.trains]
        if adopted := [m for m, e in layers if e.adopted]:
            take_over(optimizer, adopted)
        by_hand = [(m, e) for m, e in layers if not e.adopted]
        _check_rotations(optimizer, by_hand)
        if any(e.merged for _, e in by_hand):
            raise UnownedRotationsError(
                f"{type(optimizer).__name__} would step rotations that with merge_interval=1 are "
                "zero whenever the model runs, and train nothing: call "
                "poetx_compile.attach(optimizer, model)"
            )
        # A step at a rate of zero turns nothing, and may come before the values of the weights:
        # torch.distributed.checkpoint takes one, to have the optimiser's state made.
        if not any(float(group.get("lr", 1.0)) > 0 for group in optimizer.param_groups):
            return
        _check_weights([(m, e) for m, e in layers_of(optimizer) if e.written and e.trains])
        if by_hand:
            for _, e in by_hand:
                ownership.record(e).told = True
            log.warning(
                "%s trains the rotations of %d layer(s) and never merges them: call "
                "poetx_compile.attach(optimizer, model)",
                type(optimizer).__name__,
                len(by_hand),
            )
        idle = weakref.WeakSet(e for _, e in found if not e.trains)
        self._looked[optimizer] = _Look(_state(optimizer), idle)

    def after_step(self, optimizer: Optimizer) -> None:
        """Tell of rotations that got gradients before two steps while no optimiser holds them.

        Adopted ones raise: the script knows nothing of them. Those of `prepare` may be left out on
        purpose, and are told once. A gradient counts once: one that is left over from an earlier
        backward (of another model, or because two optimisers step after each backward) says nothing
        new.
        """
        idle = _with_two_gradients()
        if not idle:
            return
        gc.collect()  # those of a model that is gone say nothing
        layers = dict.fromkeys(m for layer in idle if (m := layer()) is not None)
        states = [e for m in layers if (e := equivalence_of(m)) is not None]
        by_hand = [e for e in states if not e.adopted]
        for e in by_hand:
            ownership.record(e).told = True
        if by_hand:
            log.warning(
                "the rotations of %d prepared layer(s) had gradients at two steps of %s, but no "
                "optimiser holds them, and they do not train: build it from "
                "poetx_compile.param_groups(model, lr=...), or freeze them",
                len(by_hand),
                type(optimizer).__name__,
            )
        if adopted := len(states) - len(by_hand):
            for _, record in ownership.records():
                record.seen.clear()
            raise UnownedRotationsError(
                f"the rotations of {adopted} adopted layer(s) had gradients at two steps of "
                f"{type(optimizer).__name__}, but no optimiser holds them, and their dense weights "
                "are frozen: the model does not train. Give model.parameters() to an optimiser, "
                "exclude or freeze what is not to train, or build poetx_compile.POETXAdamW(model)"
            )


watch = Watch()


def _check_rotations(optimizer: Optimizer, layers: Sequence[Layer]) -> None:
    """Raise where an optimiser has frozen weights, and not their rotations."""
    parameters = {p for group in optimizer.param_groups for p in group["params"]}
    without = [e for _, e in layers if parameters.isdisjoint(e.skews)]
    if without:
        raise UnownedRotationsError(
            f"{type(optimizer).__name__} holds the weights of {len(without)} prepared layer(s), "
            "which are frozen, and not their rotations: it was built before prepare. Build it from "
            "poetx_compile.param_groups(model, lr=...), or call "
            "poetx_compile.adopt(optimizer, model)"
        )


def _check_weights(layers: Sequence[Layer]) -> None:
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
    root = LiveObjects().root(module)
    return next((n for n, m in linears(root).items() if m is module and n), "(root)")


def _with_two_gradients() -> list[weakref.ref[nn.Linear]]:
    """The layers that no optimiser holds and that have had gradients at two steps."""
    idle = []
    for e, record in ownership.records():
        if record.told or not record.unheld or record.linear is None:
            continue
        for side in e.sides:
            gradient = side.skew.grad
            if side.name not in record.unheld or gradient is None:
                continue
            now = id(gradient), gradient._version
            last, count = record.seen.get(side.name, (None, 0))
            if last != now:
                record.seen[side.name] = now, count + 1
                if count:
                    idle.append(record.linear)
    return idle
