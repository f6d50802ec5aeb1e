"""Actions: every way to write a weight, plain weights, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from poetx_compile.errors import EffectiveWeightError, StaleOptimizerError
from tests.helpers.tolerances import tolerance
from tests.play.actions_run import force_a_merge
from tests.play.invariants import (
    close,
    plain_state,
    require,
    same,
    trained,
    unchanged,
)
from tests.play.registry import action, raises
from tests.play.world import World


def _view(linear: nn.Linear) -> None:
    linear.weight.view(-1)[3] = 0.5


def _index(linear: nn.Linear) -> None:
    linear.weight[0] = 1


def _assign(linear: nn.Linear) -> None:
    value = torch.randn(linear.weight.shape).to(linear.weight.dtype)
    if type(linear) is nn.Linear:
        linear.weight.data.copy_(value)
    else:
        linear.weight = value


def _load(linear: nn.Linear) -> None:
    value = torch.randn(linear.weight.shape).to(linear.weight.dtype)
    linear.load_state_dict({"weight": value}, strict=False)


WRITES: dict[str, Callable[[nn.Linear], Any]] = {
    "init.normal_": lambda m: nn.init.normal_(m.weight, std=0.3),
    "init.xavier_uniform_": lambda m: nn.init.xavier_uniform_(m.weight),
    "init.trunc_normal_": lambda m: nn.init.trunc_normal_(m.weight, std=0.3),
    "reset_parameters": lambda m: m.reset_parameters(),
    "data.copy_": lambda m: m.weight.data.copy_(torch.randn(m.weight.shape)),
    "data.mul_": lambda m: m.weight.data.mul_(0.9),
    "mul_": lambda m: m.weight.mul_(1.1),
    "copy_": lambda m: m.weight.copy_(torch.randn(m.weight.shape)),
    "view": _view,
    "index": _index,
    "assign": _assign,
    "load_state_dict": _load,
    "renorm_": lambda m: m.weight.renorm_(2, 0, 0.7),
    "detach": lambda m: m.weight.detach().add_(0.1),
    "t": lambda m: m.weight.t()[1].mul_(2.0),
}
"""Ways to write a weight, as on a plain layer."""


@action(4, way=tuple(WRITES), layer=("q", "k", "scale", "o"))
def write(world: World, *, way: str, layer: str) -> None:
    """What is written is what a plain layer would hold, and the rotations start again."""
    seed = world.tick()
    for copy in world.copies:
        before = plain_state(copy)
        linear = copy.model.get_submodule(layer)
        twin = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        twin = twin.to(world.dtype)
        own = {k.removeprefix(f"{layer}."): v for k, v in before.items() if k.startswith(layer)}
        twin.load_state_dict({k: v for k, v in own.items() if k in ("weight", "bias")})
        for target in (twin, linear):
            torch.manual_seed(seed)
            with torch.no_grad():
                WRITES[way](target)
        after = plain_state(copy)
        written = {f"{layer}.{k}" for k in twin.state_dict()}
        for name, value in twin.state_dict().items():
            same(after[f"{layer}.{name}"], value, f"{copy.name}: {layer}.{name} written by {way}")
        same(after, before, f"{copy.name}: not written", written)


@action(1, layer=("q", "o"), how=("parameter", "stale", "shape", "merged"))
def write_in_vain(world: World, *, layer: str, how: str) -> None:
    """What is refused changes nothing."""
    if how in ("merged", "stale") and world.setup.config.get("merge_interval") == 1:
        return  # what was read is the stored weight itself
    if how == "merged":
        weights = [copy.model.get_submodule(layer).weight for copy in world.copies]
        force_a_merge(world)
    with unchanged(world):
        for i, copy in enumerate(world.copies):
            linear = copy.model.get_submodule(layer)
            if how == "parameter":
                with raises(EffectiveWeightError, "a parameter assigned"):
                    linear.weight = nn.Parameter(torch.zeros_like(linear.weight))
            elif how == "shape":
                with raises(ValueError, "another shape assigned"):
                    linear.weight = torch.zeros(2, 3)
            elif how == "merged":
                with (
                    raises(EffectiveWeightError, "a weight written after a merge"),
                    torch.no_grad(),
                ):
                    weights[i].mul_(2)
    if how == "stale":
        for copy in world.copies:
            linear = copy.model.get_submodule(layer)
            weight = linear.weight
            with torch.no_grad():
                linear.weight.mul_(0.9)
            before = plain_state(copy)
            with raises(EffectiveWeightError, "a weight written that was read before"):
                weight.data.mul_(2)
            same(plain_state(copy), before, copy.name)


@action(1, part=("all", "q"))
def load_plain_weights(world: World, *, part: str) -> None:
    """The weights of the plain model into the prepared one: the same function."""
    for copy in world.copies:
        before = plain_state(copy)
        values = {k: v for k, v in before.items() if part == "all" or k.startswith("q.")}
        copy.model.load_state_dict(values, strict=part == "all")
        same(plain_state(copy), before, f"{copy.name}, loaded from plain weights")


@action(1)
def load_as_new_parameters(world: World) -> None:
    """``assign=True``: the optimiser of before is refused, and a new one takes over."""
    if world.setup.tied or not trained(world.eager):
        return  # torch unties what is assigned
    with unchanged(world, but=("optimizer", "guard")):
        for copy in world.copies:
            saved = {k: v.clone() for k, v in copy.model.state_dict().items()}
            copy.model.load_state_dict(saved, assign=True)
            with raises(StaleOptimizerError, f"{copy.name}: a step after assign=True"):
                copy.optimizer.step()
    world.new_optimizers(world.kind)


@action(2, "settled", dtype=("float64", "float32", "bfloat16"))
def cast(world: World, *, dtype: str) -> None:
    """The weights are those of before, rounded; the optimiser casts its state when it is loaded."""
    to = getattr(torch, dtype)
    allowed = max(tolerance(to), tolerance(world.dtype))
    for copy in world.copies:
        before = plain_state(copy)
        copy.model.zero_grad()
        copy.model.to(to)
        copy.optimizer.load_state_dict(copy.optimizer.state_dict())
        for name, value in plain_state(copy).items():
            what = f"{copy.name}: {name} cast to {dtype}"
            if not before[name].is_floating_point():
                same(value, before[name], what)
                continue
            require(value.dtype == to, f"{what}: {value.dtype}")
            close(value, before[name], allowed, what)
        for name, _, e in copy.layers():
            wide = torch.float64 if to == torch.float64 else torch.float32
            for p in (e.skew_in, e.skew_out, *e.gains.values()):
                require(p.dtype == wide, f"{name}: rotations or gains in {p.dtype}")
