"""What the param groups of an optimiser hold of prepared layers: rotations, never the weights.

The frozen weights leave the groups, their moments with them, whatever their flags say. The packed
skew parameters go into groups of their own, one for each of the user's groups and block size, which
follow the group they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from poetx_compile.layers.live_objects import LiveObjects
from poetx_compile.layers.parametrization import Layer, stored_weight
from poetx_compile.optim.follow import FOLLOWS, GROUP, KEPT, follow, followed, number, ratio_to
from poetx_compile.optim.groups import BLOCK, RATIO, Rule, rule_of

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

    A skew parameter moves where the optimiser holds it, or the weight in its place.

    Args:
        poetx_lr: rate of the skew parameters; default as in `param_groups`.
        whole: also the other side of a layer of which one side is held.
        live: the live schedulers, which are told of new groups.
    """
    groups = optimizer.param_groups
    before = len(groups)
    where = {p: i for i, group in enumerate(groups) for p in group["params"]}
    names = _names(optimizer)
    moved: dict[tuple[int, int], list[tuple[nn.Linear, nn.Parameter, str]]] = {}
    for module, e in layers:
        weight = stored_weight(module)
        for side, other in zip(e.sides, reversed(e.sides), strict=True):
            skew = side.skew
            here = where.get(skew)
            if (here is not None and BLOCK in groups[here]) or not skew.numel():
                continue  # in a group of rotations already, or of a side that has none
            source = where.get(weight, here)
            if source is None and whole and skew.requires_grad:
                source = where.get(other.skew)
            if source is None:
                continue  # trained by nobody
            name = names.get(weight, "weight")
            prefix = name.removesuffix("weight") + "parametrizations.weight.0."
            name = names.get(skew, f"{prefix}skew_{side.name}")
            moved.setdefault((source, side.block), []).append((module, skew, name))
    rule, ratios = rule_of(optimizer), {}
    for (source, b), members in moved.items():  # what is refused is refused before any change
        weights = [stored_weight(module) for module, _, _ in members]
        ratios[source, b] = (
            rule.ratio(b, weights)
            if poetx_lr is None
            else ratio_to(optimizer, groups[source], poetx_lr)
        )
    gone: set[Tensor] = {skew for members in moved.values() for _, skew, _ in members}
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
        if FOLLOWS in ours and ours[FOLLOWS] == group.get(GROUP) and ours[BLOCK] == b:
            ours["params"] += [skew for _, skew, _ in members]
            if "param_names" in ours:
                ours["param_names"] += [name for _, _, name in members]
            return
    named = "param_names" in group
    kept = {"weight_decay": 0.0, **rule.options}
    kept = {key: value for key, value in kept.items() if key in group}
    label = f"poetx b={b}"
    ours = {
        "params": [(name, skew) if named else skew for _, skew, name in members],
        "name": f"{group['name']} {label}" if "name" in group else label,
        BLOCK: b,
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
