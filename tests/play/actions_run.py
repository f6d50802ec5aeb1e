"""Actions: training, evaluation, merges."""

from __future__ import annotations

import contextlib
import gc
from typing import Any
from unittest import mock

import torch

from poetx_compile.errors import InterruptedMergeError
from poetx_compile.optim import merge as merge_module
from tests.helpers.tolerances import tolerance
from tests.play import training
from tests.play.invariants import (
    checked_merge,
    close,
    guard_is_anew,
    plain_state,
    same,
    state,
    trained,
    unchanged,
)
from tests.play.registry import action, raises
from tests.play.world import PRODUCTS, World


@action(
    6,
    "any",
    steps=(1, 2, 4),
    micro=(1, 1, 3),
    clip=(None, "torch", "poetx"),
    closure=(False, False, True),
    zeros=(False, False, True),
)
def train(
    world: World, *, steps: int, micro: int, clip: str | None, closure: bool, zeros: bool
) -> None:
    if not trained(world.eager):
        return
    for copy in world.copies:
        copy.model.train()
    for _ in range(steps):
        training.step(world, micro, clip, closure, zeros)


@action(2, "settled")
def skip_a_step(world: World) -> None:
    """A GradScaler finds an infinite gradient: nothing happens, no step is counted."""
    if not trained(world.eager):
        return
    with unchanged(world, but=("requires_grad",)):
        tokens = world.batch()
        for copy in world.copies:
            training.backward(copy, [tokens])
            scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
            for p in copy.model.parameters():
                if p.grad is not None:
                    p.grad.fill_(torch.inf)
            scaler.scale(torch.ones(()))  # the scaler makes its state
            scaler.step(copy.optimizer)
            scaler.update()
            copy.model.zero_grad()


@action(4, "any", mode=("no_grad", "inference", "grad"), training=(False, False, True), rows=(3, 2))
def evaluate(world: World, *, mode: str, training: bool, rows: int) -> None:
    """Twice; the models are left in the mode of their evaluation."""
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.no_grad}
    if mode == "grad" and not world.unsettled:
        contexts["grad"] = contextlib.nullcontext  # type: ignore[assignment]
    for copy in world.copies:
        copy.model.train(training)
    with unchanged(world):
        for _ in range(2):
            tokens = world.batch(rows)
            with contexts[mode]():
                expected, actual = (copy.run(tokens) for copy in world.copies)
            what = f"compiled output in evaluation, {mode}"
            close(actual.clone(), expected.clone(), PRODUCTS * tolerance(world.dtype), what)


@action(2)
def force_a_merge(world: World) -> None:
    dense = [plain_state(copy) for copy in world.copies]
    for copy, before in zip(world.copies, dense, strict=True):
        weights = {f"{name}.weight" for name, _, _ in copy.layers()}
        checked_merge(copy.model, redraw=True)
        same(plain_state(copy), before, f"{copy.name} after a merge", weights)


@action(1)
def interrupt_a_merge(world: World) -> None:
    """Everything refuses until a checkpoint has been loaded; of the model alone, here."""
    if any(e.merged for copy in world.copies for _, _, e in copy.layers()):
        return  # there is nothing to merge
    before = [state(copy)["guard"] for copy in world.copies]
    with unchanged(world, but=("guard",)):
        tokens = world.batch()
        for copy in world.copies:
            saved = {k: v.clone() for k, v in copy.model.state_dict().items()}
            real, calls = merge_module._merge_layer, []

            def cut_off(*args: Any, real: Any = real, calls: list = calls) -> None:
                calls.append(1)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                real(*args)

            with (
                mock.patch.object(merge_module, "_merge_layer", cut_off),
                raises(KeyboardInterrupt, "a merge that is cut off"),
            ):
                merge_module.merge(copy.model, redraw=True)
            uses = (lambda copy=copy: copy.run(tokens), copy.model.state_dict, copy.optimizer.step)
            for use in uses:
                with raises(InterruptedMergeError, f"{copy.name} after half of a merge"):
                    use()
            if copy.model.checkpointed:
                gc.collect()  # torch 2.11: hooks of a checkpoint stay until its exception is freed
            copy.model.load_state_dict(saved)
    for copy, then in zip(world.copies, before, strict=True):
        if state(copy)["guard"] != then:
            guard_is_anew(copy)
