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

from torch import nn
from torch.optim import Optimizer

from poetx_compile.config import POETXConfig
from poetx_compile.errors import AdoptionError, ConfigError, UnownedRotationsError
from poetx_compile.layers.live_objects import LiveObjects
from poetx_compile.layers.prepared import (
    Layer,
    PreparedLayers,
    check_alone,
    equivalence_of,
    prepared_linears,
    stored_weight,
)
from poetx_compile.optim.follow import FOLLOWS
from poetx_compile.optim.groups import BLOCK, RATIO, ensure_prepared, prepared_config
from poetx_compile.optim.ownership import held, owner
from poetx_compile.optim.probe import Probed, probe
from poetx_compile.optim.regroup import regroup
from poetx_compile.optim.schedule import (
    MergeSchedule,
    attach_probed,
    schedule_of,
    unwrap_optimizer,
)

log = logging.getLogger("poetx_compile")


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
            (``group["initial_lr"]``, if a scheduler has been built; where that is 0, the rate its
            warm-up ends at); default as in `param_groups`.

    Returns:
        The schedule of the merges.

    Raises:
        AdoptionError: `optimizer` cannot train rotations (Muon, L-BFGS and others), with the
            reason: it is tried on small parameters, as in `attach`.
        UnownedRotationsError: it does not hold the weights of all layers of `model`: give `adopt`
            the part of the model that it trains.
    """
    optimizer = unwrap_optimizer(optimizer)
    model = ensure_prepared(model, config)
    return take_over(optimizer, [m for _, m, _ in prepared_linears(model)], poetx_lr=poetx_lr)


def take_over(
    optimizer: Optimizer,
    linears: Sequence[nn.Linear],
    live: LiveObjects | None = None,
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
    layers = [(m, e) for m, e in layers if owner(e) is not optimizer]
    if schedule is not None and not layers:
        return schedule
    probed = _check(optimizer, layers, schedule, poetx_lr)
    regroup(optimizer, layers, poetx_lr, whole=True, live=live)
    if schedule is None:
        taken = PreparedLayers(m for m, _ in layers)
        schedule = attach_probed(optimizer, taken, prepared_config(taken), probed)
    else:
        schedule.extend(m for m, _ in layers)
    _tell(optimizer, layers)
    return schedule


def take_over_all(live: LiveObjects, linears: Iterable[nn.Linear]) -> int:
    """Let every live optimiser take over what it holds of `linears`; returns how many it was."""
    wanted = {id(m) for m in linears}
    taken = 0
    for optimizer in live.optimizers:
        mine = [m for m, _ in held(optimizer) if id(m) in wanted]
        if mine:
            take_over(optimizer, mine, live)
            taken += len(mine)
    return taken


def _check(
    optimizer: Optimizer,
    layers: list[Layer],
    schedule: MergeSchedule | None,
    poetx_lr: float | None,
) -> Probed:
    """Raise before anything is changed."""
    kind = type(optimizer).__name__
    if poetx_lr is not None and not poetx_lr >= 0:
        raise ConfigError(f"poetx_lr = {poetx_lr!r} is not allowed: use None, or a number ≥ 0")
    inside = {p for group in optimizer.param_groups for p in group["params"]}
    missing = [m for m, e in layers if e.trains and not {stored_weight(m), *e.skews} & inside]
    if missing:
        raise UnownedRotationsError(
            f"{kind} holds the weights of {len(layers) - len(missing)} of {len(layers)} "
            "prepared layers: give adopt the part of the model whose parameters it was built from"
        )
    before = [] if schedule is None else schedule.equivalences
    taken = PreparedLayers(m for m, _ in layers)
    config = prepared_config(taken, None if schedule is None else schedule.config)
    check_alone([*before, *(e for _, e in layers)])
    tensors = {t for m, e in layers for t in (stored_weight(m), *e.skews)}
    probed = probe(optimizer, tensors, config.moments)
    if probed.early:
        late = [e for _, e in layers if optimizer.state.keys().isdisjoint(e.skews)]
        if late:
            raise AdoptionError(
                f"{kind} makes its state when it is built, and was built before the model "
                "had rotations: call poetx_compile.prepare(model) before building it"
            )
    return probed


def _tell(optimizer: Optimizer, layers: list[Layer]) -> None:
    config = layers[0][1].config
    ours = [g for g in optimizer.param_groups if FOLLOWS in g and BLOCK in g]
    blocks = {g[BLOCK]: g[RATIO] for g in ours}
    rates = ", ".join(f"{ratio:.3g} x lr at b={b}" for b, ratio in blocks.items())
    when = f"merged every {config.merge_interval} steps"
    if config.merged:
        when = "which turn the weights in each step"
    elif config.max_angle is not None:
        when += f" or when an angle reaches {config.max_angle:g}"
    log.warning(  # one line, at the level that is seen: the user's optimiser is another from here
        "%s trains %d nn.Linear through rotations from now on (rate %s, %s); "
        "their dense weights are frozen. Call poetx_compile.prepare(model, config) before, to "
        "choose otherwise; options={'unprepared': 'refuse'} refuses",
        type(optimizer).__name__,
        len(layers),
        rates,
        when,
    )
