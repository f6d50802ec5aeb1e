"""Actions: what trains, how fast and by which optimiser; compiling again; looking."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.optim import merge as merge_module
from poetx_compile.optim.follow import FOLLOWS, GROUP
from tests.helpers.tolerances import tolerance
from tests.play.invariants import (
    close,
    require,
    trained,
    unchanged,
)
from tests.play.registry import action, raises
from tests.play.world import OPTIMIZERS, PRODUCTS, RATE, Copy, World, draw_options

PARTS = {
    "rotations": "skew_",
    "rotations of q": "q.parametrizations.weight.0.skew_",
    "gains": "gain_",
    "biases": "bias",
    "embedding": "embedding",
    "norm": "norm",
}
"""What is frozen and unfrozen, by a part of the parameters' names."""


def _set_flags(world: World, what: str, trains: bool) -> None:
    for copy in world.copies:
        if what == "model":
            copy.model.requires_grad_(trains)
        for name, p in copy.model.named_parameters():
            if what != "model" and PARTS[what] in name and p.numel():
                p.requires_grad_(trains)
            if not trains and not p.requires_grad:
                p.grad = None


@action(2, "settled", what=("model", *PARTS))
def freeze(world: World, *, what: str) -> None:
    with unchanged(world, but=("requires_grad",)):
        _set_flags(world, what, False)


@action(2, "settled", what=("model", *PARTS))
def unfreeze(world: World, *, what: str) -> None:
    """Parameters that no optimiser holds get a new one."""
    with unchanged(world, but=("requires_grad",)):
        _set_flags(world, what, True)
    held = {id(p) for g in world.eager.optimizer.param_groups for p in g["params"]}
    if any(id(p) not in held for p in trained(world.eager)):
        world.new_optimizers(world.kind)


@action(2, kind=OPTIMIZERS)
def new_optimizer(world: World, *, kind: str) -> None:
    if not trained(world.eager):
        return
    with unchanged(world, but=("optimizer", "guard")):
        world.new_optimizers(kind)


@action(2, "settled", of=("all", "dense", "rotations", "first"), factor=(0.5, 2.0, 0.0))
def set_rates(world: World, *, of: str, factor: float) -> None:
    with unchanged(world, but=("optimizer",)):
        for copy in world.copies:
            for i, group in enumerate(copy.optimizer.param_groups):
                turns = "poetx_block" in group
                wanted = {"all": True, "dense": not turns, "rotations": turns, "first": i == 0}[of]
                if wanted:
                    group["lr"] = factor * (2e-2 if turns else RATE)


def _followers(copy: Copy, group: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of rotations that follow a group."""
    groups = copy.optimizer.param_groups
    return [g for g in groups if FOLLOWS in g and g[FOLLOWS] == group.get(GROUP)]


def _refuses_to_step(copy: Copy, why: str) -> None:
    with raises(ConfigError, f"{copy.name}: a step of rotations that follow no one group", why):
        copy.optimizer.step()


@action(1, "settled", to=("decay", "no decay", "split", "delete"))
def change_groups(world: World, *, to: str) -> None:
    def edit(copy: Copy) -> None:
        groups = copy.optimizer.param_groups
        weight = copy.model.embedding.weight
        if to == "split":
            for group in groups:
                if any(p is weight for p in group["params"]) and len(group["params"]) > 1:
                    group["params"] = [p for p in group["params"] if p is not weight]
                    options = {k: v for k, v in group.items() if k not in ("params", "name")}
                    copy.optimizer.add_param_group(options | {"params": [weight]})
                    if _followers(copy, group):
                        _refuses_to_step(copy, "which 2 groups have")
                        del groups[-1][GROUP]  # as the message says
                    break
        elif to == "delete":  # as freezing the embedding by leaving it out would
            for i, group in enumerate(groups):
                if len(groups) > 1 and "poetx_block" not in group:
                    for p in groups.pop(i)["params"]:
                        copy.optimizer.state.pop(p, None)  # torch cannot save it otherwise
                    if ours := _followers(copy, group):
                        _refuses_to_step(copy, "which 0 groups have")
                        for rotations in ours:
                            del rotations[FOLLOWS]  # as the message says
                    break
        else:
            for group in groups:
                if "poetx_block" not in group:
                    group["weight_decay"] = 0.1 if to == "decay" else 0.0

    with unchanged(world, but=("optimizer",)):
        for copy in world.copies:
            edit(copy)
            if to in ("split", "delete"):
                copy.scheduler = None  # torch's schedulers know the groups they were built for
    if to in ("split", "delete"):
        world.edits.append(edit)
        world.made_scheduler = None


@action(2, "settled", kind=("LambdaLR", "CosineAnnealingLR", "StepLR"))
def schedule_rates(world: World, *, kind: str) -> None:
    arguments: dict[str, Any] = {
        "LambdaLR": {"lr_lambda": lambda step: 1 / (1 + step)},
        "CosineAnnealingLR": {"T_max": 7},
        "StepLR": {"step_size": 2},
    }[kind]
    world.made_scheduler = lambda optimizer: getattr(torch.optim.lr_scheduler, kind)(
        optimizer, **arguments
    )
    for copy in world.copies:
        for group in copy.optimizer.param_groups:
            group.pop("initial_lr", None)
        copy.scheduler = world.made_scheduler(copy.optimizer)


@action(2, "settled", seed=tuple(range(16)), reset=(True, False))
def compile_again(world: World, *, seed: int, reset: bool) -> None:
    with unchanged(world):
        if reset:
            torch._dynamo.reset()
        world.options = draw_options(random.Random(seed), world.setup.config)
        world.compile()


@action(2, what=("explain", "diagnostics", "functional_call", "a copy", "plain weights"))
def look(world: World, *, what: str) -> None:
    """Looking changes nothing."""
    with unchanged(world):
        tokens = world.batch()
        for copy in world.copies:
            if what == "explain":
                poetx.explain(copy.run, tokens)
            elif what == "diagnostics":
                figures = poetx.diagnostics(copy.run)
                require(all(v == v for v in figures.values()), f"diagnostics: {figures}")
            elif what == "functional_call":
                stand_ins = {n: p.detach().clone() for n, p in copy.model.named_parameters()}
                expected = copy.model(tokens)
                actual = torch.func.functional_call(copy.model, stand_ins, (tokens,))
                close(actual, expected, PRODUCTS * tolerance(world.dtype), "functional_call")
            elif what == "a copy":
                _use_a_copy(copy, tokens)
            else:
                for value in poetx.plain_state_dict(copy.model).values():
                    require(torch.isfinite(value).all(), "a plain weight is not finite")


def _use_a_copy(copy: Copy, tokens: Tensor) -> None:
    """Merge and unload a copy of the model."""
    other = deepcopy(copy.model)
    merge_module.merge(other, redraw=True)
    poetx.merge_and_unload(other)(tokens)
    require(not list(prepared_linears(other)), "an unloaded copy is prepared")
