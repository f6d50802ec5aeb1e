"""What the param groups of an optimiser hold of prepared layers: rotations, never the weights.

The frozen weights leave the groups, their moments with them, whatever their flags say. The packed
skew parameters go into groups of their own, one for each of the user's groups and block size, which
follow the group they come from, and so do gains, without weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from poetx_compile.layers.live_objects import LiveObjects
from poetx_compile.layers.prepared import Layer, stored_weight
from poetx_compile.optim.follow import FOLLOWS, GROUP, KEPT, follow, followed, number, ratio_to
from poetx_compile.optim.groups import BLOCK, GAINS, RATIO, Rule, rule_of

_NO_BLOCK = 0
"""In the place of a block size: of gains."""

_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_SCHEDULER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")
"""Lists with an entry for each group, in the schedulers of torch."""


def regroup(
    optimizer: Optimizer,
    layers: Sequence[Layer],
    poetx_lr: float | None = None,
    *,
    whole: bool = False,
    live: LiveObjects | None = None,
) -> None:
    """Frozen weights leave the groups; skew parameters move into groups that follow the others.

    A skew parameter or a gain moves where the optimiser holds it, or the weight in its place.

    Args:
        poetx_lr: rate of the skew parameters; default as in `param_groups`.
        whole: also the other side of a layer of which one side is held.
        live: the live schedulers, which are told of new groups.
    """
    groups = optimizer.param_groups
    before = len(groups)
    where = {p: i for i, group in enumerate(groups) for p in group["params"]}
    names = _names(optimizer)
    moved: dict[tuple[int, int], list[tuple[nn.Linear, nn.Parameter, str]]] = {}  # b = 0: gains
    for module, e in layers:
        weight = stored_weight(module)
        sides = [(side.skew, side.block, f"skew_{side.name}") for side in e.sides]
        gains = [(gain, _NO_BLOCK, name) for name, gain in e.gains.items()]
        for parameter, b, own_name in (*sides, *gains):
            here = where.get(parameter)
            if (here is not None and _is_apart(groups[here])) or not parameter.numel():
                continue  # in a group of its own already, or of a side that has no rotation
            source = where.get(weight, here)
            if source is None and whole and parameter.requires_grad:
                source = next((where[skew] for skew in e.skews if skew in where), None)
            if source is None:
                continue  # trained by nobody
            name = names.get(weight, "weight")
            prefix = name.removesuffix("weight") + "parametrizations.weight.0."
            name = names.get(parameter, prefix + own_name)
            moved.setdefault((source, b), []).append((module, parameter, name))
    rule, ratios = rule_of(optimizer), {}
    for (source, b), members in moved.items():  # what is refused is refused before any change
        weights = [stored_weight(module) for module, _, _ in members]
        if b == _NO_BLOCK:
            ratios[source, b] = 1.0
        elif poetx_lr is None:
            ratios[source, b] = rule.ratio(b, weights)
        else:
            ratios[source, b] = ratio_to(optimizer, groups[source], poetx_lr)
    gone: set[Tensor] = {parameter for members in moved.values() for _, parameter, _ in members}
    drop_weights(optimizer, layers)
    for group in groups:
        _drop(group, gone)
    for source, b in sorted(moved, key=lambda key: (key[0], -key[1])):
        _add(optimizer, groups[source], b, moved[source, b], ratios[source, b], rule)
    if len(groups) > before:
        for scheduler in (live or LiveObjects()).schedulers_of(optimizer):
            _extend(scheduler, optimizer, before)


def drop_weights(optimizer: Optimizer, layers: Sequence[Layer]) -> None:
    """Take the frozen weights of `layers` out of all groups, with the moments of dense training.

    The empty skew parameters of sides of size 1 go as well: an optimiser that was built before the
    model had rotations has none, and the states of both fit each other.
    """
    gone: set[Tensor] = {stored_weight(module) for module, _ in layers}
    gone.update(skew for _, e in layers for skew in e.skews if not skew.numel())
    for group in optimizer.param_groups:
        _drop(group, gone)
    for parameter in gone:
        optimizer.state.pop(parameter, None)


def _is_apart(group: dict[str, Any]) -> bool:
    """Whether a group holds rotations or gains alone."""
    return BLOCK in group or GAINS in group


def _drop(group: dict[str, Any], gone: set[Tensor]) -> None:
    stay = [i for i, p in enumerate(group["params"]) if p not in gone]
    for key in ("params", "param_names"):
        if key in group and len(stay) < len(group[key]):
            group[key] = [group[key][i] for i in stay]


def _add(
    optimizer: Optimizer,
    group: dict[str, Any],
    b: int,
    members: list[tuple[nn.Linear, nn.Parameter, str]],
    ratio: float,
    rule: Rule,
) -> None:
    for ours in optimizer.param_groups:
        same = ours.get(FOLLOWS) == group.get(GROUP) and ours.get(BLOCK, _NO_BLOCK) == b
        if FOLLOWS in ours and same:
            ours["params"] += [parameter for _, parameter, _ in members]
            if "param_names" in ours:
                ours["param_names"] += [name for _, _, name in members]
            return
    named = "param_names" in group
    kept = {"weight_decay": 0.0, **(rule.options if b else {})}
    kept = {key: value for key, value in kept.items() if key in group}
    label = f"poetx b={b}" if b else "gains"
    ours = {
        "params": [(name, p) if named else p for _, p, name in members],
        "name": f"{group['name']} {label}" if "name" in group else label,
        **({BLOCK: b} if b else {GAINS: True}),
        FOLLOWS: number(optimizer, group),
        RATIO: ratio,
        KEPT: sorted(kept),
        **kept,
    }
    follow(ours, group)
    optimizer.add_param_group(ours)


def _names(optimizer: Optimizer) -> dict[Tensor, str]:
    return {
        p: name
        for group in optimizer.param_groups
        for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }


def _extend(scheduler: Any, optimizer: Optimizer, before: int) -> None:
    """Tell a scheduler of the groups after the first `before`, which it was built for.

    Torch's schedulers refuse to step where the groups are more than they know of.
    """
    groups = optimizer.param_groups
    for known, ours in enumerate(groups[before:], start=before):
        source = next(i for i, g in enumerate(groups) if g is followed(optimizer, ours))
        for name in (*_SCHEDULER_RATES, *_SCHEDULER_LISTS):
            values = vars(scheduler).get(name)
            if isinstance(values, list) and len(values) == known:
                value = values[source]
                values.append(value * ours[RATIO] if name in _SCHEDULER_RATES else value)
