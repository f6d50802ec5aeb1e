"""Actions: saving and loading, copies, a plain model and back."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import poetx_compile as poetx
from poetx_compile.errors import StaleOptimizerError
from tests.play import training
from tests.play.invariants import (
    plain_state,
    require,
    same,
    state,
    trained,
    unchanged,
)
from tests.play.registry import action, raises
from tests.play.world import OPTIMIZERS, Copy, World


def _through_files(copy: Copy, how: str) -> Callable[[nn.Module, Any], None]:
    """Save a copy; what is returned loads it into another model and optimiser."""
    scheduler = copy.scheduler and copy.scheduler.state_dict()
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "checkpoint.pt"
    if how == "save_checkpoint":
        poetx.save_checkpoint(path, copy.model, copy.optimizer)
    else:
        saved = {"model": copy.model.state_dict(), "optimizer": copy.optimizer.state_dict()}
        torch.save(saved, path)

    def load(model: nn.Module, optimizer: Any, into_scheduler: Any = None) -> None:
        with folder:
            if how == "save_checkpoint":
                poetx.load_checkpoint(path, model, optimizer)
            else:
                saved = torch.load(path, weights_only=True)
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
        if into_scheduler is not None:
            into_scheduler.load_state_dict(scheduler)

    return load


@action(3, how=("save_checkpoint", "state_dict"))
def resume(world: World, *, how: str) -> None:
    """In a new process, as it were: the next step is the one that would have been, bit for bit."""
    with unchanged(world):
        old = world.eager
        new = []
        for copy in world.copies:
            load = _through_files(copy, how)
            model = world.plain().to(world.dtype).train(copy.model.training)
            poetx.prepare(model, world.config, shared=training.shared(world))
            made = world.like_before(copy, model, model)
            load(model, made.optimizer, made.scheduler)
            new.append(made)
        world.eager, world.compiled = new
        world.compile()
    _one_step_as(world, old)


@action(2, how=("save_checkpoint", "state_dict"))
def roll_back(world: World, *, how: str) -> None:
    """Train on, and load what was before into the same model and optimiser."""
    with unchanged(world):
        loads = [_through_files(copy, how) for copy in world.copies]
        train_if_anything_trains(world)
        for copy, load in zip(world.copies, loads, strict=True):
            copy.model.train(copy.model.training)
            load(copy.model, copy.optimizer, copy.scheduler)
            for p in copy.model.parameters():
                p.grad = None


@action(2)
def deep_copy(world: World) -> None:
    """Go on with copies; the originals do not move."""
    with unchanged(world):
        old = world.eager, world.compiled
        new = []
        for copy in world.copies:
            model = deepcopy(copy.model)
            made = world.like_before(copy, model, model)
            made.optimizer.load_state_dict(deepcopy(copy.optimizer.state_dict()))
            if made.scheduler is not None:
                made.scheduler.load_state_dict(copy.scheduler.state_dict())
            new.append(made)
        world.eager, world.compiled = new
        world.compile()
    before = [state(copy) for copy in old]
    train_if_anything_trains(world)
    for copy, then in zip(old, before, strict=True):
        same(state(copy), then, f"{copy.name}, whose copy was trained")


def train_if_anything_trains(world: World) -> None:
    if trained(world.eager):
        mode = world.eager.model.training
        training.step(world, 1, None, False, False)
        for copy in world.copies:
            copy.model.train(mode)


def _one_step_as(world: World, old: Copy) -> None:
    """Both copies take a step that `old`, which the eager one was made from, takes alone."""
    if not trained(old):
        return
    tokens = world.batch()
    old.model.train()
    for copy in world.copies:
        copy.model.train()
    training.backward(old, [tokens])
    old.optimizer.step()
    if old.scheduler is not None:
        old.scheduler.step()
    training.step(world, 1, None, False, False, [tokens])
    same(state(world.eager), state(old), "resumed")


@action(2)
def unload(world: World) -> None:
    """A plain model again, trained densely by an optimiser that knows nothing of rotations."""
    if world.setup.adopted:
        torch._dynamo.reset()  # as the message says where code of another instance adopts
    for copy in world.copies:
        before = plain_state(copy)
        trains = {name: e.skew_in.requires_grad for name, _, e in copy.layers()}
        training.backward_if(copy, world)
        require(poetx.merge_and_unload(copy.model) is copy.model, "unloaded: another object")
        same(copy.model.state_dict(), before, f"{copy.name}, unloaded")
        copy.model.zero_grad()
        with raises(StaleOptimizerError, f"{copy.name}: a step of the old optimiser"):
            copy.optimizer.step()
        for name in ("q", "k", "scale", "o"):
            layer = copy.model.get_submodule(name)
            require(type(layer) is nn.Linear, f"{name}, unloaded: {type(layer)}")
            flag = layer.weight.requires_grad
            require(flag == trains[name], f"{name}, unloaded: requires_grad={flag}")
    world.new_optimizers("dense")


@action(4, "dense", kind=OPTIMIZERS, block_size=(3, 4, (4, 3)), first=(True, False))
def prepare_again(world: World, *, kind: str, block_size: Any, first: bool) -> None:
    """With other blocks; compiled anew, or by the code that there is."""
    world.config = dataclasses.replace(world.config, block_size=block_size)
    for copy in world.copies:
        copy.model.requires_grad_(True)  # a frozen weight is left as it is
        before = plain_state(copy)
        world.prepare(copy)
        same(plain_state(copy), before, f"{copy.name}, prepared again")
        copy.model.zero_grad()
    world.new_optimizers(kind)
    if world.setup.adopted and block_size != world.compiled_for and not first:
        # The blocks that an adopted model would get are among the options of its compilation.
        with raises(BackendCompilerFailed, "other blocks than compiled for", "contradict"):
            world.compiled.run(world.batch())
        first = True
    if first:
        world.compile()
