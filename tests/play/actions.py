"""The actions: what users do, each the same to both copies, and what each may change.

An action is a function of the world and of keyword arguments; the decorator lists the values that
a random sequence takes for each, and how often the action comes. One that makes no sense in the
state the world is in (`needs`) is passed over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile import merge as merge_module
from poetx_compile.errors import EffectiveWeightError, InterruptedMergeError, StaleOptimizerError
from poetx_compile.parametrization import prepared_linears
from tests.play import training
from tests.play.invariants import (
    checked_merge,
    close,
    plain_state,
    require,
    same,
    state,
    unchanged,
)
from tests.play.world import OPTIMIZERS, PRODUCTS, RATE, Copy, World, draw_options
from tests.tolerances import tolerance


@dataclasses.dataclass(frozen=True)
class Action:
    function: Callable[..., None]
    weight: int
    needs: str
    values: dict[str, tuple]

    def draw(self, rng: random.Random) -> dict[str, Any]:
        return {name: rng.choice(values) for name, values in self.values.items()}

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
def raises(kind: type[BaseException], what: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    require(False, f"{what}: no {kind.__name__}")


# --- training and evaluation ----------------------------------------------------------------------


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
    if not any(p.requires_grad for p in world.eager.model.parameters()):
        return
    for copy in world.copies:
        copy.model.train()
    for _ in range(steps):
        training.step(world, micro, clip, closure, zeros)


@action(2, "settled")
def skip_a_step(world: World) -> None:
    """A GradScaler finds an infinite gradient: nothing happens, no step is counted."""
    if not any(p.requires_grad for p in world.eager.model.parameters()):
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
        checked_merge(copy.model)
        same(plain_state(copy), before, f"{copy.name} after a merge", weights)


@action(1)
def interrupt_a_merge(world: World) -> None:
    """Everything refuses until a checkpoint has been loaded."""
    with unchanged(world):
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
                merge_module.merge(copy.model)
            uses = (lambda copy=copy: copy.run(tokens), copy.model.state_dict, copy.optimizer.step)
            for use in uses:
                with raises(InterruptedMergeError, f"{copy.name} after half of a merge"):
                    use()
            copy.model.load_state_dict(saved)


# --- saving, copying, unloading -------------------------------------------------------------------


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
    import copy as copying

    with unchanged(world):
        old = world.eager, world.compiled
        new = []
        for copy in world.copies:
            model = copying.deepcopy(copy.model)
            made = world.like_before(copy, model, model)
            made.optimizer.load_state_dict(copying.deepcopy(copy.optimizer.state_dict()))
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
    if any(p.requires_grad for p in world.eager.model.parameters()):
        mode = world.eager.model.training
        training.step(world, 1, None, False, False)
        for copy in world.copies:
            copy.model.train(mode)


def _one_step_as(world: World, old: Copy) -> None:
    """Both copies take a step that `old`, which the eager one was made from, takes alone."""
    if not any(p.requires_grad for p in old.model.parameters()):
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


@action(1)
def unload(world: World) -> None:
    """A plain model again, trained densely by an optimiser that knows nothing of rotations."""
    for copy in world.copies:
        before = plain_state(copy)
        training.backward_if(copy, world)
        require(poetx.merge_and_unload(copy.model) is copy.model, "unloaded: another object")
        same(copy.model.state_dict(), before, f"{copy.name}, unloaded")
        copy.model.zero_grad()
        with raises(StaleOptimizerError, f"{copy.name}: a step of the old optimiser"):
            copy.optimizer.step()
        for name in ("q", "k", "scale", "o"):
            layer = copy.model.get_submodule(name)
            require(type(layer) is nn.Linear, f"{name}, unloaded: {type(layer)}")
            require(layer.weight.requires_grad, f"{name}, unloaded: frozen")
    world.new_optimizers("dense")


@action(4, "dense", kind=OPTIMIZERS, block_size=(3, 4, (4, 3)), first=(True, False))
def prepare_again(world: World, *, kind: str, block_size: Any, first: bool) -> None:
    """With other blocks; compiled anew, or by the code that there is."""
    world.config = dataclasses.replace(world.config, block_size=block_size)
    for copy in world.copies:
        before = plain_state(copy)
        world.prepare(copy)
        same(plain_state(copy), before, f"{copy.name}, prepared again")
        copy.model.zero_grad()
    world.new_optimizers(kind)
    if first:
        world.compile()


# --- writing --------------------------------------------------------------------------------------


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
    if how == "merged":
        weights = [copy.model.get_submodule(layer).weight for copy in world.copies]
        force_a_merge(world)
    with unchanged(world):
        for i, copy in enumerate(world.copies):
            linear = copy.model.get_submodule(layer)
            if how == "parameter":
                with raises(KeyError, "a parameter assigned"):
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


@action(1, part=("model", "layer"))
def load_plain_weights(world: World, *, part: str) -> None:
    """The weights of the plain model into the prepared one: the same function, rotations at zero."""
    for copy in world.copies:
        before = plain_state(copy)
        values = {k: v for k, v in before.items() if part == "model" or k.startswith("q.")}
        copy.model.load_state_dict(values, strict=part == "model")
        same(plain_state(copy), before, f"{copy.name}, loaded from plain weights")


@action(1)
def load_as_new_parameters(world: World) -> None:
    """``assign=True``: the optimiser of before is refused, and a new one takes over."""
    with unchanged(world, but=("optimizer",)):
        for copy in world.copies:
            saved = {k: v.clone() for k, v in copy.model.state_dict().items()}
            copy.model.load_state_dict(saved, assign=True)
            with raises(StaleOptimizerError, f"{copy.name}: a step after assign=True"):
                copy.optimizer.step()
    world.new_optimizers(world.kind)


# --- dtypes ---------------------------------------------------------------------------------------


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
            for skew in (e.skew_in, e.skew_out):
                require(skew.dtype == wide, f"{name}: rotations in {skew.dtype}")


# --- flags, rates, optimisers ---------------------------------------------------------------------


def _selected(model: nn.Module, what: str) -> list[nn.Parameter]:
    own = {"rotations": "skew_", "biases": "bias", "embedding": "embedding", "norm": "norm"}
    named = dict(model.named_parameters())
    if what == "rotations of q":
        what = "q.parametrizations.weight.0.skew_"
    stores = {n for n in named if n.endswith("original")}
    return [
        p for n, p in named.items() if own.get(what, what) in n and n not in stores and p.numel()
    ]


PARTS = ("rotations of q", "biases", "embedding", "norm")
"""What is frozen and unfrozen."""


@action(2, "settled", what=PARTS)
def freeze(world: World, *, what: str) -> None:
    with unchanged(world, but=("requires_grad",)):
        for copy in world.copies:
            for p in _selected(copy.model, what):
                p.requires_grad_(False)
                p.grad = None


@action(2, "settled", what=PARTS, new=(True, False))
def unfreeze(world: World, *, what: str, new: bool) -> None:
    """Parameters that no optimiser holds get a new one."""
    with unchanged(world, but=("requires_grad",)):
        for copy in world.copies:
            for p in _selected(copy.model, what):
                p.requires_grad_(True)
    held = {p for g in world.eager.optimizer.param_groups for p in g["params"]}
    if any(p.requires_grad and p.numel() and p not in held for p in world.eager.model.parameters()):
        world.new_optimizers(world.kind)


@action(2, kind=OPTIMIZERS)
def new_optimizer(world: World, *, kind: str) -> None:
    with unchanged(world, but=("optimizer",)):
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


@action(1, "settled", to=("decay", "no decay", "split"))
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
                    break
        else:
            for group in groups:
                if "poetx_block" not in group:
                    group["weight_decay"] = 0.1 if to == "decay" else 0.0

    with unchanged(world, but=("optimizer",)):
        for copy in world.copies:
            edit(copy)
            if to == "split":
                copy.scheduler = None  # torch's schedulers know the groups they were built for
    if to == "split":
        world.edits.append(edit)
        world.made_scheduler = None


@action(1, "settled", kind=("LambdaLR", "CosineAnnealingLR", "StepLR"))
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


# --- compiling and looking ------------------------------------------------------------------------


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
    import copy as copying

    other = copying.deepcopy(copy.model)
    merge_module.merge(other)
    poetx.merge_and_unload(other)(tokens)
    require(not list(prepared_linears(other)), "an unloaded copy is prepared")
