"""Param groups for any torch optimiser: dense parameters, and skew parameters by block size."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poetx_compile.config import POETXConfig, differences
from poetx_compile.errors import ConfigError
from poetx_compile.layers.eligibility import linears, unwrap_compiled
from poetx_compile.layers.prepare import leave, prepare
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.layers.registry import registry

BLOCK = "poetx_block"
"""Key of a param group that holds skew parameters: their block size."""

GAINS = "poetx_gains"
"""Key of a param group that holds gains."""

RATIO = "poetx_ratio"
"""Key of a group of skew parameters: its learning rate divided by that of dense parameters."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How skew parameters are trained by a kind of optimiser.

    Attributes:
        ratio: (b, weights that the rotations turn) → learning rate over that of dense parameters.
        options: of the skew groups alone.
    """

    ratio: Callable[[int, Sequence[nn.Parameter]], float]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@torch.no_grad()
def _root_mean_square(weights: Sequence[nn.Parameter]) -> float:
    squares = [float(w.float().square().mean()) for w in weights]
    return (sum(squares) / len(squares)) ** 0.5


def _angle_ratio(b: int, weights: Sequence[nn.Parameter]) -> float:
    """2 from b = d/2 on, 1/3 more with each halving, 3 from d/16 down (docs/quality.md).

    d is the narrower side of a weight, on average.
    """
    d = sum(min(weight.shape) for weight in weights) / len(weights)
    return min(3.0, max(2.0, 2 + math.log2(d / (2 * b)) / 3))


RULES = {
    "adamw": Rule(lambda b, weights: 64 / b),
    "muon": Rule(_angle_ratio),
    # Its rate is relative to the size of a parameter. Rotations start at zero, so theirs is made
    # absolute (the second eps), at what the dense weights would move by.
    "adafactor": Rule(lambda b, weights: 64 / b * _root_mean_square(weights), {"eps": (None, 1.0)}),
}


RULE = "poetx_rule"
"""Attribute of an optimiser of this package: the name of its rule."""


def rule_of(optimizer: Optimizer) -> Rule:
    """The rule for an optimiser of this package (which says its `rule`), of torch or of anybody."""
    relative = isinstance(optimizer, torch.optim.Adafactor)
    return RULES[getattr(optimizer, RULE, "adafactor" if relative else "adamw")]


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    poetx_lr: float | None = None,
    weight_decay: float = 0.01,
    rule: str = "adamw",
) -> list[dict[str, Any]]:
    """Param groups of a prepared model; every trainable parameter is in exactly one.

    ===================  ============================================  ==========  ============
    name                 parameters                                    lr          weight decay
    ===================  ============================================  ==========  ============
    ``dense``            two dimensions or more (embeddings, heads)    `lr`        as given
    ``dense no decay``   norms and biases                              `lr`        0
    ``gains``            gains of weights (`POETXConfig.gains`)        `lr`        0
    ``poetx b=…``        packed skew parameters, a group a block size  `poetx_lr`  0
    ===================  ============================================  ==========  ============

    Args:
        model: a prepared model, compiled or not.
        lr: learning rate of the dense parameters.
        poetx_lr: learning rate of the skew parameters; default ``lr · 64/b`` for ``rule="adamw"``,
            for ``rule="muon"``, where it is an angle, ``2 · lr`` from b = d/2 on to ``3 · lr`` at
            d/16, d the narrower side of a weight, and ``lr · 64/b`` times the root mean square of
            the weights for ``rule="adafactor"``.
        weight_decay: of the group ``dense``.
        rule: ``"adamw"`` for AdamW, SGD and most others; ``"muon"`` for an optimiser that
            orthogonalises its steps; ``"adafactor"`` for `torch.optim.Adafactor`, whose rate is
            relative to the size of a parameter: that of the skew groups is made absolute.

    Returns:
        A list of dicts for `torch.optim.Optimizer`. `attach` makes the optimiser merge.

    Raises:
        ConfigError: the model is not prepared, or an argument is out of range.
    """
    if rule not in RULES:
        allowed = " or ".join(map(repr, RULES))
        raise ConfigError(f"rule = {rule!r} is not allowed: use {allowed}")
    if poetx_lr is not None and not poetx_lr >= 0:
        raise ConfigError(f"poetx_lr = {poetx_lr!r} is not allowed: use None, or a number ≥ 0")
    model = unwrap_compiled(model)
    prepared_config(model)
    block_of: dict[nn.Parameter, tuple[int, nn.Parameter]] = {}
    for _, module, e in prepared_linears(model):
        block_of |= {side.skew: (side.block, stored_weight(module)) for side in e.sides}
    stored = {weight for _, weight in block_of.values()}  # frozen, whatever their flags say
    gained = {gain for _, _, e in prepared_linears(model) for gain in e.gains.values()}
    dense: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    gains: list[nn.Parameter] = []
    skew: dict[int, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter in stored or not parameter.numel():
            continue
        if parameter in block_of:
            skew.setdefault(block_of[parameter][0], []).append(parameter)
        elif parameter in gained:
            gains.append(parameter)
        else:
            (dense if parameter.ndim >= 2 else no_decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"name": "dense", "params": dense, "lr": lr, "weight_decay": weight_decay},
        {"name": "dense no decay", "params": no_decay, "lr": lr, "weight_decay": 0.0},
        {"name": "gains", "params": gains, "lr": lr, "weight_decay": 0.0, GAINS: True},
    ]
    groups = [group for group in groups if group["params"]]
    for b, parameters in sorted(skew.items(), reverse=True):
        weights = [block_of[p][1] for p in parameters]
        rate = lr * RULES[rule].ratio(b, weights) if poetx_lr is None else poetx_lr
        group = {"name": f"poetx b={b}", "params": parameters, "lr": rate, "weight_decay": 0.0}
        ratio = {RATIO: float(rate) / float(lr)} if lr > 0 else {}
        groups.append({**group, **RULES[rule].options, BLOCK: b, **ratio})
    return groups


@contextlib.contextmanager
def only(optimizer: Optimizer, wanted: Callable[[Tensor], bool]) -> Iterator[None]:
    """Let an optimiser hold the wanted parameters alone, in groups that have any."""
    groups = optimizer.param_groups
    fewer = [{**g, "params": [p for p in g["params"] if wanted(p)]} for g in groups]
    optimizer.param_groups = [group for group in fewer if group["params"]]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def prepared_config(model: nn.Module, config: POETXConfig | None = None) -> POETXConfig:
    """The configuration a model, or its parts, were prepared with.

    Raises:
        ConfigError: nobody has prepared it; its parts differ; or `config` is given and differs.
    """
    found = {e.config for _, _, e in prepared_linears(unwrap_compiled(model))}
    if not found:
        raise ConfigError("the model is not prepared: call poetx_compile.prepare(model) first")
    if len(found) > 1:
        raise ConfigError(
            "parts of this model were prepared with different configurations: "
            "give each part an optimiser of its own, or prepare the whole model once"
        )
    (earlier,) = found
    if config is not None and config != earlier:
        changed = ", ".join(differences(config, earlier))
        raise ConfigError(
            f"this model was prepared with another configuration (differs in {changed}): "
            "merge_and_unload(model) first, or leave config out"
        )
    return earlier


def ensure_prepared(model: nn.Module, config: POETXConfig | None = None) -> nn.Module:
    """The user's module behind `model`, prepared with `config` if nobody has prepared it."""
    model = unwrap_compiled(model)
    if all(e.adopted for _, _, e in prepared_linears(model)):
        prepare(model, config)  # of a model that the compiler adopted, whatever it has not seen
    else:
        # Parts prepared by hand stay the only ones; a graph without them may have adopted more.
        reason = "the model was prepared in parts, and this layer was not"
        rest = {n: m for n, m in linears(model).items() if equivalence_of(m) is None}
        rest = {n: m for n, m in rest.items() if registry.adopted.get(m.weight) is not None}
        leave(rest, dict.fromkeys(rest, reason))
    prepared_config(model, config)
    return model
