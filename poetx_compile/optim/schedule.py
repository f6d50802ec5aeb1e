"""`attach`: an optimiser that counts its steps and merges, through torch's own optimiser hooks."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poetx_compile._torch import _disable_dynamo
from poetx_compile.config import POETXConfig
from poetx_compile.distributed.wrappers import reshard
from poetx_compile.errors import (
    ConfigError,
    IncompatibleStateError,
    ParallelismError,
    StaleOptimizerError,
    UnownedRotationsError,
)
from poetx_compile.layers.eligibility import unwrap_compiled
from poetx_compile.layers.integrity import check_stored_weights
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.permutation import Moves
from poetx_compile.layers.prepared import (
    Layer,
    PreparedLayers,
    check_alone,
    prepared_linears,
    redrawn,
    stored_weight,
)
from poetx_compile.layers.registry import registry
from poetx_compile.layers.sharding import check_processes
from poetx_compile.optim.angle import ANGLE, AngleGuard
from poetx_compile.optim.early import Early, Rehearse, compile_early
from poetx_compile.optim.follow import follow_all
from poetx_compile.optim.groups import BLOCK, GAINS, RULE, only, prepared_config
from poetx_compile.optim.merge import check_whole, merge, redraw
from poetx_compile.optim.ownership import own
from poetx_compile.optim.probe import Probed, probe, reset_state
from poetx_compile.optim.rates import RateWatch
from poetx_compile.optim.regroup import drop_weights, regroup
from poetx_compile.optim.transport import transport
from poetx_compile.optim.turning import Make, Turner

log = logging.getLogger("poetx_compile")

STEP = "poetx_step"
LAST_MERGE = "poetx_last_merge"
LAST_REDRAW = "poetx_last_redraw"
MOMENTUM = "momentum"
"""Setting of a group that is stepped by a momentum, and not by two moments."""

_ATTRIBUTE = "_poetx_schedule"


def attach(
    optimizer: Optimizer, model: nn.Module, config: POETXConfig | None = None
) -> MergeSchedule:
    """Make `optimizer` merge the rotations of `model` as its steps go by.

    After `merge_interval` optimiser steps, or earlier where the angle guard says so, all rotations
    are merged and start again at zero. Every `redraw_interval` steps a merge draws the permutations
    again; the skew parameters' moments follow their planes, stay or are fresh again
    (`POETXConfig.moments`). Steps count where `optimizer.step` really ran: gradient
    accumulation and steps that a `GradScaler` skips do not count. The counters are in the param
    groups of the skew parameters, hence in `optimizer.state_dict()`. The frozen weights leave the
    groups, now and whenever something adds them. With ``merge_interval=1`` each step turns the
    weights by its update of the skew parameters, which are zero otherwise.

    Args:
        optimizer: any `torch.optim.Optimizer` that holds every trainable skew parameter
            (`param_groups` makes such groups), or Accelerate's wrapper of one.
        model: the prepared model, compiled or not.
        config: ``None``, or the configuration of `prepare`.

    Returns:
        The schedule, to look at.

    Raises:
        AdoptionError: `optimizer` cannot train rotations, with the reason: it is tried on small
            parameters (`poetx_compile.optim.probe`).
        ConfigError: `optimizer` is none, or attached already; the model is not prepared, or
            prepared with another configuration; layers outside of it share permutations with it;
            or the state of a parameter cannot be reset.
        UnownedRotationsError: skew parameters that no group of the optimiser holds.
        ParallelismError: the model is sharded in a way in which rotations cannot train.
        IncompatibleStateError: processes prepared the model differently.
    """
    optimizer, model = unwrap_optimizer(optimizer), unwrap_compiled(model)
    config = prepared_config(model, config)
    if schedule_of(optimizer) is not None:
        raise ConfigError(
            "this optimiser is attached already: POETXAdamW and POETXMuon attach themselves, "
            "attach any other optimiser once"
        )
    skews = [skew for _, _, e in prepared_linears(model) for skew in e.skews]
    return attach_probed(optimizer, model, config, probe(optimizer, skews, config.moments))


def attach_probed(
    optimizer: Optimizer, model: nn.Module, config: POETXConfig, probed: Probed
) -> MergeSchedule:
    """`attach` of an optimiser that is known to train rotations."""
    check_processes(model)
    if config.merged and getattr(optimizer, "parameters_as_bucket_view", False):
        raise ParallelismError(
            "a ZeroRedundancyOptimizer with parameters_as_bucket_view=True keeps the memory of its "
            "parameters, and with merge_interval=1 they have some only within a step: leave that "
            "argument out"
        )
    schedule = MergeSchedule(optimizer, model, config, probed)
    setattr(optimizer, _ATTRIBUTE, schedule)
    # Where Dynamo compiles `optimizer.step`, the hooks stay out of its graphs.
    optimizer.register_step_pre_hook(torch.compiler.disable(schedule._before_step))
    optimizer.register_step_post_hook(torch.compiler.disable(schedule._after_step))
    optimizer.register_state_dict_pre_hook(schedule._before_state_dict)
    optimizer.register_state_dict_post_hook(schedule._after_state_dict)
    optimizer.register_load_state_dict_pre_hook(schedule._before_load)
    optimizer.register_load_state_dict_post_hook(schedule._after_load)
    optimizer.__reduce_ex__ = _refuse_copy  # type: ignore[method-assign, assignment]
    if not _by_batches(optimizer):  # those of this package say what their own steps launch
        schedule.compile_early()
    return schedule


def schedule_of(optimizer: Optimizer) -> MergeSchedule | None:
    """The schedule that `attach` gave an optimiser, or the one that it wraps; or ``None``."""
    return getattr(unwrap_optimizer(optimizer), _ATTRIBUTE, None)


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The optimiser itself, behind wrappers whose groups and state are its own (Accelerate's).

    Raises:
        ConfigError: `optimizer` is something else.
    """
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer) and all(
        getattr(optimizer, name, None) is getattr(inner, name) for name in ("param_groups", "state")
    ):
        return unwrap_optimizer(inner)
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # a wrapper may be one in name alone
        raise ConfigError(
            f"a {type(optimizer).__name__} is no optimiser of torch: give the "
            "torch.optim.Optimizer itself, not what wraps it"
        )
    return optimizer


class MergeSchedule:
    """When the rotations of a model are merged and redrawn; made by `attach`.

    Attributes:
        turner: what makes the steps of the merged form, or ``None``.
        merges: number of merges done by this object (not saved).
        early_merges: those of them that the angle guard asked for.
        redraws: those of them that drew the permutations again.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, config: POETXConfig, probed: Probed):
        self._model, self._config, self._probed = model, config, probed
        self._optimizer = weakref.ref(optimizer)
        self._ledger: dict[str, Any] = _fresh()
        self._loaded: dict[str, Any] | None = None
        self._layers: list[Layer] = []
        self._skews: set[nn.Parameter] = set()
        self._ours: set[nn.Parameter] = set()  # with gains
        self._weights: set[nn.Parameter] = set()
        self._loose: set[nn.Parameter] = set()
        self._guard: AngleGuard | None = None
        self.turner: Turner | None = None
        self._early: list[Early] = []
        self._rates = RateWatch()
        self.merges = self.early_merges = self.redraws = 0
        self._restored = self._stepped = False
        self._take(optimizer, [(m, e) for _, m, e in prepared_linears(model)])
        self._loads = self._count_loads()

    @property
    def step(self) -> int:
        """Steps so far of an optimiser that held rotations."""
        return self._ledger[STEP]

    @property
    def last_merge(self) -> int:
        """The step of the last merge; 0 before the first."""
        return self._ledger[LAST_MERGE]

    @property
    def last_redraw(self) -> int:
        """The step of the last redraw; 0 before the first."""
        return self._ledger[LAST_REDRAW]

    @property
    def angle(self) -> float | None:
        """The guard's last measurement of the largest angle, in radians; ``None`` without a guard.

        A few steps old; `diagnostics` computes the present one exactly. With ``merge_interval=1``
        the largest angle of the step that was measured last, ``None`` before the first.
        """
        if self.turner is not None:
            return self.turner.angle
        return self._ledger[ANGLE] if self._guard is not None else None

    @property
    def config(self) -> POETXConfig:
        """The configuration of the layers."""
        return self._config

    @property
    def equivalences(self) -> list[OrthogonalEquivalence]:
        """The layers that are merged."""
        return [e for _, e in self._layers]

    def extend(self, linears: Iterable[nn.Linear]) -> None:
        """Merge further linears with those of before, which were not a model of the user's."""
        assert isinstance(self._model, PreparedLayers)
        added = PreparedLayers(linears)
        prepared_config(added, self._config)
        self._model.extend(added)
        optimizer = self._optimizer()
        assert optimizer is not None
        self._take(optimizer, [(m, e) for _, m, e in prepared_linears(self._model)])

    def _take(self, optimizer: Optimizer, layers: list[Layer]) -> None:
        """Merge `layers` from now on, all of them."""
        skews = {skew for _, e in layers for skew in e.skews}
        gains = {gain for _, e in layers for gain in e.gains.values()}
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in skews - owned if p.requires_grad and p.numel()]
        if missing:
            raise UnownedRotationsError(
                f"{len(missing)} of {len(skews)} skew parameters are in no group of the "
                "optimiser and would never train: build it from param_groups(model, lr=...) "
                "after prepare, call adopt(optimizer, model), or give attach the part of the model "
                "that this optimiser trains"
            )
        if idle := [gain for gain in gains - owned if gain.requires_grad]:
            raise UnownedRotationsError(
                f"{len(idle)} of {len(gains)} gains are in no group of the optimiser and would "
                "never train: build it from param_groups(model, lr=...) after prepare, or call "
                "adopt(optimizer, model)"
            )
        check_alone(e for _, e in layers)
        self._ours = skews | gains
        self._layers, self._skews, self._revision = layers, skews, registry.revision
        self._weights = {stored_weight(module) for module, _ in layers}
        drop_weights(optimizer, layers)
        self._redraws = bool(redrawn(self.equivalences))
        self._loose = self._ours & set(_loose_parameters(optimizer))  # as the user has built them
        if self._config.merged:
            self.turner = Turner(layers)
            for e in self.equivalences:
                e.rest()
        elif self._config.max_angle is not None:
            pairs = [(s.skew, s.block) for _, e in layers for s in e.sides if s.blocks]
            self._guard = AngleGuard(pairs, self._config.max_angle)
        self._claim(optimizer)

    def _claim(self, optimizer: Optimizer) -> None:
        """Own the skew parameters in the groups, and put the keys of the counters there."""
        own(self.equivalences, optimizer)
        for group in self._groups(optimizer):
            for key, value in self._placeholders().items():
                group.setdefault(key, value)

    def _tidy_groups(self, optimizer: Optimizer) -> None:
        """Put right what was added to the groups since: by whoever unfreezes a part of the model.

        Frozen weights leave them. Where rotations have groups of their own, others get some too.
        """
        apart = hasattr(optimizer, RULE) or any(BLOCK in group for group in optimizer.param_groups)
        strays = self._weights | (self._ours - self._loose) if apart else self._weights
        if any(p in strays for p in _loose_parameters(optimizer)):
            reshard(self._model)  # as in `_check_layers`
            movable = [(m, e) for m, e in self._layers if self._loose.isdisjoint(e.skews)]
            regroup(optimizer, movable if apart else [])
            drop_weights(optimizer, self._layers)
            self._claim(optimizer)

    def _placeholders(self) -> dict[str, Any]:
        """The keys of the counters in a live group. Their values are in the ledger alone: a
        compiled `optimizer.step` would be compiled again wherever a group changes."""
        guard = {} if self._guard is None else self._guard.fresh()
        return {STEP: 0, LAST_MERGE: 0, LAST_REDRAW: 0, **guard}

    def _groups(self, optimizer: Optimizer) -> Iterator[dict[str, Any]]:
        """The groups that hold skew parameters of these layers, or will."""
        for group in optimizer.param_groups:
            if STEP in group or any(p in self._skews for p in group["params"]):
                yield group

    def _turns(self, group: dict[str, Any]) -> bool:
        """Whether a step may have turned rotations of a group: not where all of them are frozen."""
        rotations = (p for p in group["params"] if p in self._skews)
        return any(p.requires_grad or p.grad is not None for p in rotations)

    def compile_early(self, rehearse: Rehearse | None = None, period: int = 1) -> None:
        """Compile the kernels of the steps to come; arguments as of `optim.early`."""
        self._early = compile_early(self._layers, rehearse, period)

    # --- hooks of the optimiser -------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        while self._early:
            self._early.pop().wait()
        self._check_layers()
        self._tidy_groups(optimizer)
        follow_all(optimizer)
        if self.turner is not None:
            self.turner.check()
            return None if _by_batches(optimizer) else self.turner.before_step(args, kwargs)
        if self._guard_restarts:
            self._ledger = self._restarted()
        loads = self._count_loads()
        if loads != self._loads or not self._stepped:  # what DDP or a checkpoint has put there
            check_stored_weights([(e, stored_weight(m)) for m, e in self._layers])
        self._loads, self._restored, self._stepped = loads, False, True
        return None

    @_disable_dynamo  # where Dynamo compiles `optimizer.step`, this stays out of its graphs
    def turn_by_batches(self, optimizer: Optimizer, update: Callable[[], Any]) -> None:
        """The step of an optimiser of this package in the merged form (`Turner.step`).

        Args:
            update: one step of all that is in the groups. It is called for the dense parameters,
                then for the rotations, a batch of layers at a time.
        """
        assert self.turner is not None

        def update_those(rotations: set[Tensor]) -> None:
            with only(optimizer, rotations.__contains__):
                update()

        with only(optimizer, lambda p: p not in self._skews):
            update()
        self.turner.step(self.step + 1, self._moving(optimizer), update_those)

    def turn_by(self, optimizer: Optimizer, make: Make, period: int) -> None:
        """The same for the rotations alone, by an optimiser that makes steps (`Turner.turn_by`)."""
        assert self.turner is not None
        self.turner.turn_by(self.step + 1, self._moving(optimizer), make, period)

    def resting(self, period: int) -> set[nn.Parameter]:
        """The rotations that do not turn in the step under way, where each does in every `period`.

        Both sides of a layer are half a period apart, and neighbouring layers a step, so that all
        steps cost about the same.
        """
        if period == 1:
            return set()
        turning: set[nn.Parameter] = set()
        for side, ahead in enumerate((0, period // 2)):
            first = -(self.step + 1 + ahead) % period
            turning.update(e.skews[side] for _, e in self._layers[first::period])
        return self._skews - turning

    def _moving(self, optimizer: Optimizer) -> set[Tensor]:
        """The parameters that the step under way can move."""
        if _skipped(optimizer):
            return set()
        return {p for g in optimizer.param_groups if float(g["lr"]) != 0 for p in g["params"]}

    def _count_loads(self) -> int:
        return sum(e.loads for _, e in self._layers)

    @property
    def _guard_restarts(self) -> bool:
        """Whether it does at the next step: weights were loaded, the optimiser was not."""
        return self._guard is not None and not self._restored and self._count_loads() != self._loads

    def _restarted(self) -> dict[str, Any]:
        ledger = dict(self._ledger)
        assert self._guard is not None
        self._guard.restart(ledger, ledger[STEP])
        return ledger

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.turner is not None and not _by_batches(optimizer):
            self.turner.after_step(self.step + 1, self._moving(optimizer))
        if _skipped(optimizer):
            return
        groups = [group for group in self._groups(optimizer) if group["params"]]
        if not groups:  # all rotations were frozen when the groups were made
            return
        self._rates.look(optimizer)
        ledger = dict(self._ledger)
        ledger[STEP] += 1
        lr = max(float(group["lr"]) if self._turns(group) else 0.0 for group in groups)
        due = early = again = False
        # Frozen rotations turn nothing, and none turn at a learning rate of zero. Tools that want
        # only the optimiser's state made (torch.distributed.checkpoint) take such a step, on a
        # model that must not change.
        if lr > 0:
            again = self._redraw_due(ledger)
        if lr > 0 and self.turner is None:
            due = again or ledger[STEP] - ledger[LAST_MERGE] >= self._config.merge_interval
            if self._guard is not None:
                early = self._guard.after_step(ledger, ledger[STEP], lr) and not due
        if due or early:
            self._merge(optimizer, ledger, again)
            self.early_merges += early
            log.info(
                "step %d: the rotations of %d nn.Linear are merged, %s",
                ledger[STEP],
                len(self._layers),
                "as the angle guard asked" if early else "on schedule",
            )
        elif again:
            self._redraw(optimizer, ledger)
        if again:
            log.info("step %d: the permutations are drawn again", ledger[STEP])
        self._ledger = ledger

    def _redraw_due(self, ledger: dict[str, Any]) -> bool:
        interval = self._config.redraw_interval
        if interval is None or not self._redraws:
            return False
        return ledger[STEP] - ledger[LAST_REDRAW] >= interval

    def _before_state_dict(self, optimizer: Optimizer) -> None:
        self._tidy_groups(optimizer)

    def _after_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Write the counters into the saved groups, the same into each, so that each is whole.

        They are those that the next step of this run starts from, and are written there alone: a
        run that saves is the run that does not.
        """
        if self._guard_restarts:  # the run that goes on from here cannot know
            ledger = self._restarted()
        else:
            ledger = dict(self._ledger)
            if self._guard is not None:
                self._guard.enter(ledger)
        for saved in state_dict["param_groups"]:
            saved.update({key: ledger[key] for key in self._placeholders() if key in saved})

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._tidy_groups(optimizer)
        self._loaded = None
        groups = []
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
            missing = [key for key in (STEP, LAST_MERGE) if key in group and key not in saved]
            if missing:
                raise IncompatibleStateError(
                    f"the optimiser state has no {missing[0]!r}: it was saved by an optimiser that "
                    "did not merge. Load the model's weights only and start a new optimiser."
                )
            if group.get(BLOCK) != saved.get(BLOCK):
                raise IncompatibleStateError(
                    f"the optimiser state was saved at block size {saved.get(BLOCK)}, group "
                    f"{group.get('name')!r} has {group.get(BLOCK)}: prepare the model with the "
                    "block size of the checkpoint, or start a new optimiser"
                )
            if (MOMENTUM in group) != (MOMENTUM in saved):
                raise IncompatibleStateError(
                    f"the optimiser state is not that of a {type(optimizer).__name__}: it was "
                    f"saved {'with' if MOMENTUM in saved else 'without'} a momentum. Load it into "
                    "an optimiser of its own class, or load the model's weights only and start a "
                    "new optimiser"
                )
            if STEP in group:  # saved without the guard: it starts anew
                known = {key: saved[key] for key in _fresh() if key in saved}
                known.setdefault(LAST_REDRAW, saved[LAST_MERGE])  # once these were the same
                self._loaded = self._loaded or _fresh() | known
                saved = saved | self._placeholders()
            groups.append(saved)
        rest = state_dict["param_groups"][len(groups) :]  # too many: torch will say so
        return state_dict | {"param_groups": groups + rest}

    def _after_load(self, optimizer: Optimizer) -> None:
        self._restored = True
        if self._loaded is not None:
            self._ledger, self._loaded = self._loaded, None
        if self._guard is not None:
            self._guard.drop_pending()
        if self.turner is not None:
            self.turner.forget()
        self._rates.loaded(optimizer)

    # --- the transaction --------------------------------------------------------------------------

    def _merge(self, optimizer: Optimizer, ledger: dict[str, Any], redraw: bool) -> None:
        self._check_layers(thoroughly=True)  # also layers that were replaced by others
        merge(self._model, redraw=redraw, then=partial(self._redrawn, optimizer, ledger))
        ledger[LAST_MERGE] = ledger[STEP]
        if self._guard is not None:
            self._guard.merged(ledger, ledger[STEP])
        self.merges += 1

    def _redraw(self, optimizer: Optimizer, ledger: dict[str, Any]) -> None:
        """A redraw of the merged form, between whose steps there is nothing to merge."""
        self._check_layers(thoroughly=True)
        redraw(self._model, then=partial(self._redrawn, optimizer, ledger))

    def _redrawn(self, optimizer: Optimizer, ledger: dict[str, Any], moves: Moves) -> None:
        """Do with the moments of redrawn sides what the configuration says."""
        if not moves:
            return
        ledger[LAST_REDRAW] = ledger[STEP]
        self.redraws += 1
        sides = [s for e in self.equivalences for s in e.sides if s.permutation in moves]
        # A ZeroRedundancyOptimizer has the state of its shard in an optimiser of its own.
        inner = getattr(optimizer, "optim", optimizer)
        if self._config.moments == "reset":
            reset_state(inner, {side.skew for side in sides}, self._probed.reset)
        elif self._config.moments == "transport":
            transport(sides, moves, inner.state, self._probed.signed)

    def _check_layers(self, thoroughly: bool = False) -> None:
        check_whole(e for _, e in self._layers)
        if self._revision == registry.revision and not thoroughly:
            return
        reshard(self._model)  # FSDP2 may have left whole parameters in the place of its own
        here = [e for _, _, e in prepared_linears(self._model)]
        skews = {skew for e in here for skew in e.skews}
        changed = here != [e for _, e in self._layers] or skews != self._skews
        if self.turner is not None:  # at rest, skew parameters stay the same where weights do not
            weights = {stored_weight(m) for _, m, _ in prepared_linears(self._model)}
            changed |= weights != self._weights
        if changed:
            raise StaleOptimizerError(
                "the rotations of the model are no longer those this optimiser was built for "
                "(prepare, merge_and_unload or load_state_dict(assign=True) was called since, or a "
                "layer was replaced): build a new optimiser"
            )
        self._revision = registry.revision


def _loose_parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """What is in groups that are not of rotations or gains alone."""
    for group in optimizer.param_groups:
        if BLOCK not in group and GAINS not in group:
            yield from group["params"]


def _refuse_copy(protocol: int) -> Any:
    """In the place of an attached optimiser's `__reduce_ex__`: torch's copies have no hooks."""
    raise StaleOptimizerError(
        "a copy of this optimiser (copy.deepcopy, pickle, torch.save) would never merge: build a "
        "new one for the copied model and load copy.deepcopy(optimizer.state_dict()) into it"
    )


def _fresh() -> dict[str, Any]:
    """The ledger of an optimiser that has taken no step."""
    return {STEP: 0, LAST_MERGE: 0, LAST_REDRAW: 0, **AngleGuard.fresh()}


def _by_batches(optimizer: Optimizer) -> bool:
    """Whether an optimiser makes the steps of the merged form itself: those of this package."""
    return hasattr(optimizer, RULE)


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a `GradScaler` has made the step a no-op.

    With a fused optimiser the scaler calls `step` in any case and leaves the decision, a tensor,
    in `found_inf`. Reading it waits for the device, as the scaler does with other optimisers.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
