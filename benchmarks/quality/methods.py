"""A model made ready to train as `Settings` say; what differs between the methods stands here."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from benchmarks.quality.baselines import adamw, lora, muon, poet, scale, variant
from benchmarks.quality.settings import PlanError, Settings
from llama import Llama

_DENSE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw.optimizer,
    "muon": muon.optimizer,
    "scale": scale.optimizer,
}
_ROTATED: dict[str, Any] = {
    "adamw": poetx.POETXAdamW,
    "muon": poetx.POETXMuon,
}
_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "muon": torch.optim.Muon,
    "scale": scale.Scale,
}
_FIELDS = {field.name for field in dataclasses.fields(poetx.POETXConfig)}


@dataclasses.dataclass
class Trained:
    """A model with its optimiser.

    Attributes:
        model: the plain module, which owns the parameters.
        forward: `model` compiled: ``forward(tokens, targets)`` gives the loss.
        clip: clips the gradients.
        plain: the weights as the plain model names them.
        after: called after each optimiser step with its number, from 1, and the number of steps.
        rate: share of the scheduled learning rate at a step, from 0.
        merges: how often rotations were merged; ``None`` where nothing merges.
    """

    model: nn.Module
    forward: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    clip: Callable[[], Any]
    plain: Callable[[], dict[str, Any]]
    after: Callable[[int, int], None] = lambda step, steps: None
    rate: Callable[[int], float] = lambda step: 1.0
    merges: Callable[[], int | None] = lambda: None

    def state_bytes(self, parameter: nn.Parameter | None = None) -> int:
        """Bytes of the optimiser's state, of one parameter or of all."""
        if isinstance(self.optimizer, muon.Pair):
            tensors = self.optimizer.tensors()
        else:
            states = list(self.optimizer.state.values())
            if parameter is not None:
                states = [self.optimizer.state.get(parameter, {})]
            tensors = [v for s in states for v in s.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def poetx_config(settings: Settings) -> poetx.POETXConfig:
    """The configuration of a run that rotates; `settings.config` goes before what is chosen here.

    Rows are normalised where training is from scratch.

    Raises:
        PlanError: this checkout knows no such field, or refuses its value.
    """
    assert settings.block_size is not None
    values: dict[str, Any] = dict(settings.config)
    if unknown := sorted(set(values) - _FIELDS):
        raise PlanError(f"POETXConfig of this checkout has no {', '.join(unknown)}")
    if settings.method == "poet":
        values = poet.fields(values)
    init = "keep" if settings.start else "rows"
    values = {"seed": settings.seed, "init": init, **values}
    try:
        return poetx.POETXConfig(block_size=settings.block_size, **values)
    except ValueError as error:
        raise PlanError(str(error)) from error


def check(settings: Settings) -> None:
    """Raise `PlanError` where this checkout cannot run `settings`, before anything runs."""
    if settings.rotates:
        poetx_config(settings)
    if settings.method == "variant":
        name, known = "variant", set(variant.OPTIONS)
    else:
        kind = (_ROTATED if settings.rotates else _CLASSES)[settings.optimizer]
        name, known = kind.__name__, set(inspect.signature(kind.__init__).parameters)
    if unknown := sorted(set(settings.options) - known):
        raise PlanError(f"{name} of this checkout has no {', '.join(unknown)}")
    settings.shapes()
    if settings.before is not None:
        check(settings.before)
        if settings.before.shapes() != settings.shapes():
            raise PlanError("a run and the one it starts from need the same shapes")


def build(settings: Settings, model: Llama, stage: str) -> Trained:
    """Make `model` ready to train.

    Args:
        settings: checked.
        model: on its device, in its dtype.
        stage: ``"inductor"``, ``"aot_eager"``, ``"eager"``, or ``"none"`` for no `torch.compile`.
    """
    options: dict[str, Any] = {k: _value(v) for k, v in settings.options.items()}
    if settings.method == "variant":
        return _variant(settings, model, stage, options)
    if settings.rotates:
        return _rotated(settings, model, stage, options)
    low_rank: list[lora.LowRankLinear] = []
    if settings.method == "lora":
        assert settings.rank is not None
        low_rank = lora.prepare(model, settings.rank)
    make = _DENSE[settings.optimizer]
    optimizer = make(model, lr=settings.lr, weight_decay=settings.weight_decay, **options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained = Trained(
        model,
        _compiled(model, stage),
        optimizer,
        lambda: torch.nn.utils.clip_grad_norm_(parameters, settings.clip),
        lambda: dict(model.state_dict()),
    )
    if low_rank:
        restarts = lora.Restarts(low_rank, optimizer, settings.restart)
        trained.after, trained.rate = restarts.after, restarts.rate
        trained.plain = lambda: lora.plain_state_dict(model)
    return trained


def _compiled(model: nn.Module, stage: str) -> Any:
    return model if stage == "none" else torch.compile(model, backend=stage, dynamic=False)


def _variant(settings: Settings, model: Llama, stage: str, options: dict[str, Any]) -> Trained:
    assert settings.poetx_lr is not None
    optimizer = variant.optimizer(
        model,
        lr=settings.lr,
        poetx_lr=settings.poetx_lr,
        weight_decay=settings.weight_decay,
        clip=settings.clip,  # with the packed gradients, which it alone knows
        config=poetx_config(settings),
        **options,
    )
    return Trained(
        model,
        _compiled(model, stage),
        optimizer,
        lambda: None,
        lambda: dict(model.state_dict()),
    )


def _rotated(settings: Settings, model: Llama, stage: str, options: dict[str, Any]) -> Trained:
    poetx.prepare(model, poetx_config(settings))
    if settings.gradients != "float32":
        for name, parameter in model.named_parameters():
            if ".skew_" in name:
                parameter.grad_dtype = getattr(torch, settings.gradients)
    optimizer: Any = _ROTATED[settings.optimizer](
        model,
        lr=settings.lr,
        poetx_lr=settings.poetx_lr,
        **{"betas": adamw.BETAS, "weight_decay": settings.weight_decay, **options},
    )
    forward: Any = model
    if stage != "none":
        forward = torch.compile(
            model, backend=poetx.poetx_backend, options={"stage": stage}, dynamic=False
        )
    return Trained(
        model,
        forward,
        optimizer,
        lambda: poetx.clip_grad_norm_(optimizer, settings.clip),
        lambda: poetx.plain_state_dict(model),
        merges=lambda: optimizer.schedule.merges,
    )


def _value(value: Any) -> Any:
    """A JSON value as Python has it: ``"torch.bfloat16"`` is a dtype, a list is a tuple."""
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return tuple(value) if isinstance(value, list) else value
