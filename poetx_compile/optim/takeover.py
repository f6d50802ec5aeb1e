"""`adopt`: an optimiser that was built over a plain model takes over the model's rotations.

The frozen weights leave its param groups, their moments with them. The packed skew parameters go
into groups of their own, one for each of the user's groups and block size, which follow the group
they come from: the same options, no weight decay, and a learning rate in a fixed ratio to its own,
whoever sets that and when. So any scheduler works, built before or after, and a loop that writes
``group["lr"]`` as well.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poetx_compile import ownership
from poetx_compile.census import Census
from poetx_compile.config import POETXConfig
from poetx_compile.errors import AdoptionError, ConfigError, UnownedRotationsError
from poetx_compile.optim.groups import (
    BLOCK,
    Rule,
    ensure_prepared,
    prepared_config,
    rule_of,
    skew_blocks,
)
from poetx_compile.optim.schedule import MergeSchedule, attach, schedule_of
from poetx_compile.parametrization import (
    OrthogonalEquivalence,
    PreparedLayers,
    check_alone,
    equivalence_of,
    prepared_linears,
    stored_weight,
)

log = logging.getLogger("poetx_compile")

FOLLOWS = "poetx_follows"
"""Key of a group of ours: the position of the user's group that it follows."""

RATIO = "poetx_ratio"
"""Key of a group of ours: its learning rate divided by that of the group it follows."""

KEPT = "poetx_kept"
"""Key of a group of ours: the options it does not take from the group it follows."""

_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Options that are learning rates; all but the first are kept in the groups by schedulers."""

_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_SCHEDULER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")
"""Lists with an entry for each group, in the schedulers of torch."""

_NOT_FOR_ROTATIONS: tuple[tuple[str, str], ...] = (
    (
        "Muon",
        "it orthogonalises matrices, and packed skew parameters are none: build "
        "poetx_compile.POETXMuon(model), or give torch.optim.Muon only what stays dense",
    ),
    (
        "LBFGS",
        "its history is of one vector of all parameters, and means nothing after a merge: use an "
        "optimiser that treats parameters one by one",
    ),
    ("SparseAdam", "it takes sparse gradients, and those of rotations are dense: use Adam"),
    (
        "ASGD",
        "it averages parameters over steps, and rotations start again at zero at each merge: use "
        "SGD",
    ),
)


def adopt(
    optimizer: Optimizer,
    model: nn.Module,
    config: POETXConfig | None = None,
    *,
    poetx_lr: float | None = None,
) -> MergeSchedule:
    """Give the rotations of `model` to an optimiser that was built over ``model.parameters()``.

    What the first step does by itself where the compiler adopted the model; call it before, to load
    a checkpoint, or with an optimiser that something else has built. The packed skew parameters get
    groups of their own: the options of the group that holds the weight, no weight decay, and a
    learning rate that stays in proportion to that group's. The frozen weights leave the optimiser.
    It then merges as after `attach`.

    Args:
        optimizer: any torch optimiser that updates each parameter by itself, built before or after
            `prepare`, with or without schedulers.
        model: prepared here, with `config`, if nobody has; compiled or not.
        config: ``None``, or the configuration of the model.
        poetx_lr: learning rate of the skew parameters where the group they come from has its own
            (``group["initial_lr"]``, if a scheduler has been built); default as in `param_groups`.

    Returns:
        The schedule of the merges.

    Raises:
        AdoptionError: `optimizer` cannot train rotations (Muon, L-BFGS and others), with the
            reason.
        UnownedRotationsError: it does not hold the weights of all layers of `model`: give `adopt`
            the part of the model that it trains.
    """
    model = ensure_prepared(model, config)
    return take_over(optimizer, [m for _, m, _ in prepared_linears(model)], poetx_lr=poetx_lr)


def take_over(
    optimizer: Optimizer,
    linears: Sequence[nn.Linear],
    census: Census | None = None,
    poetx_lr: float | None = None,
) -> MergeSchedule:
    """Move the rotations of prepared linears into `optimizer` and attach it to them."""
    schedule = schedule_of(optimizer)
    if schedule is not None and not any(FOLLOWS in group for group in optimizer.param_groups):
        raise ConfigError(
            "this optimiser merges the rotations of other layers, from groups of their own: build "
            "it from poetx_compile.param_groups over all of them, or another one for these"
        )
    layers = [(m, e) for m in linears if (e := equivalence_of(m)) is not None]
    layers = [(m, e) for m, e in layers if ownership.owner(e.skew_in) is not optimizer]
    if schedule is not None and not layers:
        return schedule
    _check(optimizer, layers, schedule, poetx_lr)
    before = len(optimizer.param_groups)
    _regroup(optimizer, layers, poetx_lr)
    for scheduler in (census or Census()).schedulers_of(optimizer):
        _extend(scheduler, optimizer, before)
    if schedule is None:
        schedule = attach(optimizer, PreparedLayers(m for m, _ in layers))
        optimizer.register_step_pre_hook(torch.compiler.disable(_before_step))
    else:
        schedule.extend(m for m, _ in layers)
    _tell(optimizer, layers)
    return schedule


def take_over_all(census: Census, linears: Iterable[nn.Linear]) -> int:
    """Let every live optimiser take over what it holds of `linears`; returns how many it was."""
    wanted = {id(m) for m in linears}
    taken = 0
    for optimizer in census.optimizers:
        mine = [m for m, _ in ownership.held(optimizer) if id(m) in wanted]
        if mine:
            take_over(optimizer, mine, census)
            taken += len(mine)
    return taken


ownership.take_over = take_over


def _check(
    optimizer: Optimizer,
    layers: list[tuple[nn.Linear, OrthogonalEquivalence]],
    schedule: MergeSchedule | None,
    poetx_lr: float | None,
) -> None:
    """Raise before anything is changed."""
    kind = type(optimizer)
    if poetx_lr is not None and not poetx_lr >= 0:
        raise ConfigError(f"poetx_lr = {poetx_lr!r} is not allowed: use None, or a number ≥ 0")
    for name, reason in _NOT_FOR_ROTATIONS:
        if isinstance(optimizer, getattr(torch.optim, name, ())):
            raise AdoptionError(f"torch.optim.{name} cannot train rotations: {reason}")
    held = {p for group in optimizer.param_groups for p in group["params"]}
    missing = [m for m, e in layers if not {stored_weight(m), e.skew_in, e.skew_out} & held]
    if missing:
        raise UnownedRotationsError(
            f"{kind.__name__} holds the weights of {len(layers) - len(missing)} of {len(layers)} "
            "prepared layers: give adopt the part of the model whose parameters it was built from"
        )
    before = [] if schedule is None else schedule.equivalences
    prepared_config(
        PreparedLayers(m for m, _ in layers), None if schedule is None else schedule.config
    )
    check_alone([*before, *(e for _, e in layers)])
    # Torch's Adagrad, and whoever does as it does: a new parameter would have no state.
    if isinstance(optimizer, torch.optim.Adagrad):
        late = [e for _, e in layers if not {e.skew_in, e.skew_out} & set(optimizer.state)]
        if late:
            raise AdoptionError(
                f"{kind.__name__} makes its state when it is built, and was built before the model "
                "had rotations: call poetx_compile.prepare(model) before building it"
            )


def _regroup(
    optimizer: Optimizer,
    layers: list[tuple[nn.Linear, OrthogonalEquivalence]],
    poetx_lr: float | None,
) -> None:
    """Frozen weights leave the groups; skew parameters move into groups that follow the others."""
    groups = optimizer.param_groups
    where = {p: i for i, group in enumerate(groups) for p in group["params"]}
    names = _names(optimizer)
    rule = rule_of(optimizer)
    moved: dict[tuple[int, int], list[tuple[nn.Linear, nn.Parameter, str]]] = {}
    gone: set[Tensor] = set()
    for module, e in layers:
        weight = stored_weight(module)
        gone.add(weight)
        for side, (skew, b) in zip(("in", "out"), skew_blocks(e), strict=True):
            here = where.get(skew)
            if (here is not None and BLOCK in groups[here]) or not skew.requires_grad:
                continue  # in a group of rotations already, or trained by nobody
            source = where.get(weight, here)
            if source is None:
                other = e.skew_out if side == "in" else e.skew_in
                source = where[other]
            name = names.get(weight, "weight")
            name = names.get(skew, f"{name[: -len('weight')]}parametrizations.weight.0.skew_{side}")
            moved.setdefault((source, b), []).append((module, skew, name))
            gone.add(skew)
    for group in groups:
        _drop(group, gone)
    for parameter in gone:
        if not parameter.requires_grad:  # moments of dense training before
            optimizer.state.pop(parameter, None)
    for (source, b), members in sorted(moved.items(), key=lambda item: (item[0][0], -item[0][1])):
        weights = [stored_weight(module) for module, _, _ in members]
        _add(optimizer, source, b, members, rule, weights, poetx_lr)


def _drop(group: dict[str, Any], gone: set[Tensor]) -> None:
    stay = [i for i, p in enumerate(group["params"]) if p not in gone]
    for key in ("params", "param_names"):
        if key in group:
            group[key] = [group[key][i] for i in stay]


def _add(
    optimizer: Optimizer,
    source: int,
    b: int,
    members: list[tuple[nn.Linear, nn.Parameter, str]],
    rule: Rule,
    weights: list[nn.Parameter],
    poetx_lr: float | None,
) -> None:
    group = optimizer.param_groups[source]
    for ours in optimizer.param_groups:
        if ours.get(FOLLOWS) == source and ours[BLOCK] == b:
            ours["params"] += [skew for _, skew, _ in members]
            if "param_names" in ours:
                ours["param_names"] += [name for _, _, name in members]
            return
    named = "param_names" in group
    ratio = rule.ratio(b, weights)
    if poetx_lr is not None:
        ratio = poetx_lr / float(group.get("initial_lr", group["lr"]))
    kept = {"weight_decay": 0.0, **rule.options}
    kept = {key: value for key, value in kept.items() if key in group}
    label = f"poetx b={b}"
    ours = {
        "params": [(name, skew) if named else skew for _, skew, name in members],
        "name": f"{group['name']} {label}" if "name" in group else label,
        BLOCK: b,
        FOLLOWS: source,
        RATIO: ratio,
        KEPT: sorted(kept),
        **kept,
    }
    _follow(ours, group)
    optimizer.add_param_group(ours)


def _names(optimizer: Optimizer) -> dict[Tensor, str]:
    return {
        p: name
        for group in optimizer.param_groups
        for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }


@torch.no_grad()
def _follow(ours: dict[str, Any], group: dict[str, Any]) -> None:
    """Bring a group of ours up to date with the user's group that it follows."""
    for key, value in group.items():
        if key in ("params", "param_names", "name", *ours[KEPT]) or key.startswith("poetx_"):
            continue
        if key not in _RATES:
            ours[key] = value
        elif isinstance(ours.get(key), Tensor):
            ours[key].copy_(value * ours[RATIO])
        else:
            ours[key] = value * ours[RATIO]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if FOLLOWS in group:
            _follow(group, optimizer.param_groups[group[FOLLOWS]])


def _extend(scheduler: Any, optimizer: Optimizer, before: int) -> None:
    """Tell a scheduler of the groups after the first `before`, which it was built for.

    Torch's schedulers refuse to step where the groups are more than they know of.
    """
    for known, ours in enumerate(optimizer.param_groups[before:], start=before):
        source, ratio = ours[FOLLOWS], ours[RATIO]
        for name in (*_SCHEDULER_RATES, *_SCHEDULER_LISTS):
            values = vars(scheduler).get(name)
            if isinstance(values, list) and len(values) == known:
                value = values[source]
                values.append(value * ratio if name in _SCHEDULER_RATES else value)


def _tell(optimizer: Optimizer, layers: list[tuple[nn.Linear, OrthogonalEquivalence]]) -> None:
    config = layers[0][1].config
    blocks = {g[BLOCK]: g[RATIO] for g in optimizer.param_groups if FOLLOWS in g}
    rates = ", ".join(f"{ratio:.3g} x lr at b={b}" for b, ratio in blocks.items())
    guard = "" if config.max_angle is None else f" or when an angle reaches {config.max_angle:g}"
    log.info(
        "%s trains %d nn.Linear through rotations from now on: %s, no weight decay, merged every "
        "%d steps%s; their dense weights are frozen and have no moments. A model that the compiler "
        "adopted is compiled once more at its next call. poetx_compile.prepare(model, config) "
        "beforehand chooses otherwise, options={'unprepared': 'refuse'} refuses.",
        type(optimizer).__name__,
        len(layers),
        rates,
        config.merge_interval,
        guard,
    )
