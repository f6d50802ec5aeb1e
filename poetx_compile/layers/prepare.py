"""`prepare` and `merge_and_unload`: into the parametrized form and back to plain `nn.Linear`."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poetx_compile._torch import _unsafe_preserve_version_counter
from poetx_compile.config import POETXConfig, differences
from poetx_compile.distributed.shards import is_sharded
from poetx_compile.distributed.wrappers import PREPARE_FIRST, user_name, wrapper_of
from poetx_compile.errors import ConfigError, NothingToTrainError, ParallelismError
from poetx_compile.layers import effective
from poetx_compile.layers.eligibility import (
    PREPARED,
    OtherWeight,
    check_targets,
    has_values,
    linears,
    other_weights,
    refusals,
    trained_by,
    unwrap_compiled,
)
from poetx_compile.layers.initialise import check_values, described, initialise
from poetx_compile.layers.integrity import check_stored_weights
from poetx_compile.layers.loading import guard_loads, unguard_loads
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.permutation import Permutation
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.layers.prepared_class import own_class, share_class
from poetx_compile.layers.registry import registry
from poetx_compile.layers.report import LayerRow, PrepareReport
from poetx_compile.layers.saving import unwatch_saving, watch_saving
from poetx_compile.layers.sharing import Groups
from poetx_compile.layers.trained import trained as what_trains

log = logging.getLogger("poetx_compile")
M = TypeVar("M", bound=nn.Module)

SHARDED_EXPORT = (
    "a sharded model cannot be unloaded in place: gather its state (get_model_state_dict of "
    "torch.distributed.checkpoint.state_dict, with full_state_dict=True) and give it to "
    "poetx_compile.plain_state_dict"
)

_SHAPING = ("block_size", "neumann_order", "cayley", "init", "init_scale", "gains", "base")
"""Fields that an adopted state is made with; the others may still be chosen when it is moved."""


def prepare(
    model: nn.Module,
    config: POETXConfig | None = None,
    *,
    shared: Sequence[Sequence[str]] = (),
) -> PrepareReport:
    """Parametrize every eligible `nn.Linear` weight of `model` as ``R W₀ P``, in place.

    The weights are frozen and stored permuted; packed skew parameters at zero are trained instead.
    The outputs do not change (bitwise in eager), unless `config.init` asks for it. Biases train as
    before. Calling it again prepares what is new and leaves what is prepared. A weight of zeros,
    which no rotation changes, stays dense; so do routers and output embeddings.

    Linears of one parent module with the same number of inputs (q, k, v; gate, up) form a group
    that shares one input permutation. `shared` declares further groups, of either side::

        poetx.prepare(model, config, shared=[("gate_proj.out", "up_proj.out", "down_proj.in")])

    A pattern is the end of a linear's name and the side; ``*`` (as in `fnmatch`) stands for a part
    of the name that varies. Sides whose names are the same in front of the match form a group: one
    for each MLP here, one for the whole model with ``"layers.*.mlp.down_proj.out"``. The outputs do
    not depend on what is shared; `cancel_permutations` removes what then need not be permuted. The
    groups are saved: a model that resumes from a checkpoint is prepared with the same `shared`.

    Args:
        model: any module, an `nn.Linear` itself and a compiled model included.
        config: default `POETXConfig()`, or the configuration of an earlier `prepare`.
        shared: declarations of sides that share one permutation, each a sequence of patterns.

    Returns:
        The report: a row for each `nn.Linear`, and for whatever else has weights of two dimensions
        or more, with its status and the reason.

    Raises:
        NothingToTrainError: no `nn.Linear` is eligible, or a pattern matched nothing.
        ConfigError: the model was prepared with another configuration, or sides cannot share: one
            does not exist, is not trained through rotations, has another size, is in two groups or
            was prepared without sharing.
        ParallelismError: the model is wrapped by DDP or FSDP already.
    """
    model = unwrap_compiled(model)
    if config is not None and not isinstance(config, POETXConfig):
        raise ConfigError(
            f"config = {config!r} is no POETXConfig: use POETXConfig.from_dict for a dict"
        )
    earlier = config_of(model)
    if earlier is not None and config is not None and config != earlier:
        changed = ", ".join(differences(config, earlier))
        if all(e.adopted for _, _, e in prepared_linears(model)):
            raise ConfigError(
                f"the compiler adopted this model with another configuration (differs in {changed})"
                ": give these fields to torch.compile(options={...}), or prepare the model before "
                "its first backward"
            )
        raise ConfigError(
            f"this model was prepared with another configuration (differs in {changed}): "
            "merge_and_unload(model) first, or leave config out"
        )
    found = linears(model)
    adopted = _adopted(found)
    config = config or earlier or _config_of_adopted(adopted) or POETXConfig()
    check_targets(list(found), config)
    reasons = refusals(model, config)
    _check_order(model, reasons)
    fresh = {name: found[name].weight for name, reason in reasons.items() if reason is None}
    if config.initialises:
        check_values(fresh, config)
    if not (trained := trained_by(found, reasons)):
        raise NothingToTrainError(_nothing(model, reasons))
    # Adopted states hold gradients under identity permutations (draw 0): what joins them has to.
    groups = Groups(model, config, 0 if adopted else 1, shared, found, reasons)
    left = {n: r for n, r in reasons.items() if r and id(found[n]) not in trained}
    leave({name: found[name] for name in left}, left)
    for name, weight in fresh.items():
        permutations = groups.permutations(name, found[name])
        if name in adopted:
            _move(found[name], name, adopted[name], config, permutations)
            adopted[name].adopted = False
        else:
            initialise(weight, config)
            register(found[name], OrthogonalEquivalence(weight, config, *permutations))
    guard_loads(model)
    watch_saving(model)
    done = dict.fromkeys(fresh, described(config)) if config.initialises else {}
    rows = list(_rows(model, found, reasons, done))
    why_not = {row.name: row.reason for row in rows if row.is_linear and row.status != "prepared"}
    summary = what_trains(model, config, why_not)
    return PrepareReport(rows, summary, config.merged, _stored_bytes(model))


def _stored_bytes(model: nn.Module) -> tuple[float, float] | None:
    """Bytes of an int8 weight on average, and of a dense one; ``None`` where there is none."""
    layers = [(stored_weight(m), e.scale) for _, m, e in prepared_linears(model)]
    int8 = [(stored, scale) for stored, scale in layers if scale is not None]
    count = sum(stored.numel() for stored, _ in int8)
    if not count:
        return None
    taken = sum(stored.nbytes + scale.nbytes for stored, scale in int8)
    dense = sum(stored.numel() * scale.itemsize for stored, scale in int8)
    return taken / count, dense / count


def _check_order(model: nn.Module, reasons: dict[str, str | None]) -> None:
    """Raise where a wrapper came before `prepare` and there is something left to prepare."""
    wrapper = wrapper_of(model)
    prepared = PREPARED in reasons.values()
    if wrapper is not None and (not prepared or None in reasons.values()):
        raise ParallelismError(
            f"this model was given to {wrapper} before it was prepared, which would leave its "
            f"rotations out: {PREPARE_FIRST}"
        )


def register(
    module: nn.Linear, equivalence: OrthogonalEquivalence, *, as_it_is: bool = False
) -> None:
    """Put `equivalence` on a plain linear: its weight is stored permuted and frozen.

    Args:
        as_it_is: the weight is in stored form, and the rotations stay as they are. No tensor
            changes, and graphs whose backward is still to come keep what they saved.
    """
    equivalence.train(module.training)
    weight = module.weight
    as_it_is = as_it_is or equivalence.merged  # whose stored form is the weight itself
    quantised = None if not equivalence.quantised else _quantised(weight, equivalence, as_it_is)
    as_it_is = as_it_is or quantised is not None
    equivalence.takes_stored = as_it_is
    own_class(module)
    with _set_in_place(), _unchanged(weight) if as_it_is else contextlib.nullcontext():
        parametrize.register_parametrization(module, "weight", equivalence, unsafe=True)
    equivalence.takes_stored = False
    share_class(module)
    stored_weight(module).requires_grad_(False)
    stored_weight(module).grad = None
    if quantised is not None:
        stored_weight(module).data = quantised  # torch lets no right inverse change the dtype
    equivalence.written = not has_values(weight)  # else it has just been looked at
    equivalence.seal(stored_weight(module))
    if has_values(weight):
        equivalence.note_norm(stored_weight(module))
    if stored_weight(module)._backward_hooks:
        log.warning(
            "a gradient hook of a weight of shape %s is not called any more: the weight is frozen, "
            "and rotations are trained in its place. Register hooks after poetx_compile.prepare",
            list(stored_weight(module).shape),
        )
    registry.enrol(module)


def _quantised(weight: Tensor, equivalence: OrthogonalEquivalence, as_it_is: bool) -> Tensor:
    """The int8 form of a weight; the scales are the layer's from here on."""
    stored = weight.detach() if as_it_is else equivalence.stored_form(weight)
    return equivalence.quantise(stored)


@contextlib.contextmanager
def _set_in_place() -> Iterator[None]:
    """Let torch set a parametrized tensor even where it is told to swap: that is refused as long as
    a graph holds the tensor, and compiled code is settled while others do."""
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)


def _unchanged(weight: Tensor) -> contextlib.AbstractContextManager[None]:
    """Torch sets a parametrized tensor to its stored form even where that is the tensor itself."""
    return _unsafe_preserve_version_counter(weight)


def config_of(model: nn.Module) -> POETXConfig | None:
    """The configuration `model`, or the part of it that is prepared, was prepared with."""
    for _, _, equivalence in prepared_linears(unwrap_compiled(model)):
        return equivalence.config
    return None


def merge_and_unload(model: M) -> M:
    """Turn every prepared linear back into a plain `nn.Linear` with its effective weight, in place.

    Parameter names are the original ones again, the weights train again (but those whose rotations
    are frozen), and the outputs are those of the prepared model (to the rounding of the weight's
    dtype). Compiled again, these weights train densely until `prepare` is called. A model that is
    not prepared is returned as it is.

    Args:
        model: a prepared model, compiled or not.

    Returns:
        The same object.

    Raises:
        ParallelismError: the model is sharded; the message says how to export it.
    """
    plain = unwrap_compiled(model)
    layers = list(prepared_linears(plain))
    if any(is_sharded(stored_weight(m), *e.skews) for _, m, e in layers):
        raise ParallelismError(SHARDED_EXPORT)
    check_stored_weights([(e, stored_weight(m)) for _, m, e in layers])
    for _, module, equivalence in layers:
        own_class(module)
        with torch.no_grad():
            weight = effective.plain(module.weight)
            if equivalence.quantised:
                stored_weight(module).data = weight
            else:
                stored_weight(module).copy_(weight)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        module.weight.requires_grad_(equivalence.trains)
        # The weight comes back as the last parameter; optimiser states and others go by position.
        for name in [name for name in module._parameters if name != "weight"]:
            module._parameters[name] = module._parameters.pop(name)
        # The model is compiled again at its next call: that must not start all over by itself.
        registry.decline(module, "merged and unloaded: prepare the model to train rotations again")
        registry.retire(equivalence)
    if any(registry.in_code(equivalence) for _, _, equivalence in layers):
        torch.compiler.reset()  # code that adopted these weights fits them again
    unguard_loads(plain)
    unwatch_saving(plain)
    return model


def _adopted(found: dict[str, nn.Linear]) -> dict[str, OrthogonalEquivalence]:
    """The states that compiled graphs created for linears of this model, by name."""
    states = {
        n: registry.adopted.get(m.weight) for n, m in found.items() if equivalence_of(m) is None
    }
    return {name: state for name, state in states.items() if state is not None}


def _config_of_adopted(adopted: dict[str, OrthogonalEquivalence]) -> POETXConfig | None:
    configs = [state.config for state in adopted.values()]
    if any(config != configs[0] for config in configs):
        raise ConfigError(
            "parts of this model were compiled with different POET-X options: give prepare (or the "
            "optimiser) the configuration to use"
        )
    return configs[0] if configs else None


def move_adopted(model: nn.Module, modules: Sequence[nn.Linear], config: POETXConfig) -> None:
    """Move the adopted states of some linears of `model` into them, gradients included.

    Every eligible linear is given the permutations that `prepare` would give it, whether it has a
    state yet or not: a checkpoint fits a model that was prepared, whatever was adopted first. One
    that comes late, when layers it shares with have been merged, joins them without its gradients:
    they are of other coordinates.
    """
    found = linears(model)
    reasons = refusals(model, config)
    groups = Groups(model, config, 0, (), found, reasons)
    wanted = {id(module) for module in modules}
    for name, reason in reasons.items():
        if reason is not None:
            continue
        module = found[name]
        permutations = registry.reserved(module) or groups.permutations(name, module)
        if id(module) not in wanted:
            registry.reserve(module, permutations)
            continue
        state = registry.adopted.get(module.weight)
        assert state is not None
        permutations = tuple(p.to(module.weight.device) for p in permutations)
        if all(p.draw == 0 for p in permutations):
            _move(module, name, state, config, permutations)
        else:
            registry.release(module.weight)
            perm_in, perm_out = permutations
            perm_out.redraw(perm_out.seed, perm_in.draw)  # as shuffled as the other side is
            late = OrthogonalEquivalence(module.weight, config, *permutations)
            late.adopted = True
            register(module, late)
    guard_loads(model)
    watch_saving(model)


def _move(
    module: nn.Linear,
    name: str,
    state: OrthogonalEquivalence,
    config: POETXConfig,
    permutations: tuple[Permutation, ...],
) -> None:
    """Make an adopted state the parametrization of its linear, gradients included."""
    if all(getattr(state.config, f) == getattr(config, f) for f in _SHAPING):
        state.perm_in, state.perm_out = permutations
        state.configure(config)
        state.write_layout()
    elif all(parameter.grad is None for parameter in state.parameters()):
        initialise(module.weight, config)
        state = OrthogonalEquivalence(module.weight, config, *permutations)
    else:
        raise ConfigError(
            f"{name} was compiled with other POET-X options and holds gradients for them: leave "
            "config out here, or prepare the model before its first backward"
        )
    registry.release(module.weight)
    register(module, state, as_it_is=True)


def leave(modules: dict[str, nn.Linear], reasons: dict[str, str]) -> None:
    """Linears that stay as they are, by name: compiled graphs may not adopt their weights either.

    Where one has, its code is dropped (with all compiled code: Dynamo has nothing finer).
    """
    dropped = False
    for name, module in modules.items():
        weight = module.weight
        if registry.release(weight) is not None:
            dropped = True
            log.warning(
                "%s was adopted by a compiled graph but is not trained through rotations (%s): its "
                "weight trains densely from now on. Call prepare before compiling",
                name or "(root)",
                reasons[name],
            )
        if isinstance(weight, nn.Parameter):
            registry.decline(module, reasons[name])
    if dropped:
        torch.compiler.reset()


def _rows(
    model: nn.Module,
    found: dict[str, nn.Linear],
    reasons: dict[str, str | None],
    done: dict[str, str],
) -> Iterator[LayerRow]:
    """The rows of the report; `done` says what was done to weights, by name."""
    others: dict[str, list[OtherWeight]] = defaultdict(list)
    for weight in other_weights(model):
        others[weight.module].append(weight)
    names = (user_name(name) for name, _ in model.named_modules(remove_duplicate=False))
    for name in dict.fromkeys(names):
        if name in found:
            yield _row(name, found[name], reasons[name], done.get(name))
        for w in others.pop(name, ()):
            status = "dense" if w.trains else "frozen"
            yield LayerRow(w.name, w.shape, "-", status, w.reason, is_linear=False)


def _row(name: str, module: nn.Linear, reason: str | None, done: str | None) -> LayerRow:
    shape = (module.out_features, module.in_features)
    equivalence = equivalence_of(module)
    if equivalence is None:
        return LayerRow(name, shape, "-", "skipped", reason or "")
    e = equivalence
    notes = [note for note in (reason, done) if note is not None]
    left_over = []
    for side in e.sides:
        over = side.permutation.size - side.blocks * side.block
        if side.blocks == 0:
            notes.append(f"{side.name} side of size 1 is not rotated")
        elif over:
            left_over.append(f"{over} {side.name}")
    if left_over:
        ever = "until the next redraw" if e.config.redraw_interval else "for good (never redrawn)"
        notes.append(f"left over {ever}: {', '.join(left_over)}")
    notes += _rank_notes(stored_weight(module))
    blocks = " | ".join(f"{side.blocks}x{side.block}" for side in e.sides)
    return LayerRow(name, shape, blocks, "prepared", "; ".join(notes))


def _rank_notes(stored: Tensor) -> Iterator[str]:
    """What rotations, which keep the rank of a weight, will keep of its rows and columns of zeros.

    Permuted ones count alike. Of other weights the rank would cost a decomposition.
    """
    if not has_values(stored):
        return
    n, m = stored.shape
    rows, columns = (int(stored.detach().any(dim).sum()) for dim in (1, 0))
    zeros = [
        f"{d - k} of {d} {what}"
        for d, k, what in ((n, rows, "rows"), (m, columns, "columns"))
        if k < d
    ]
    if zeros:
        yield f"{' and '.join(zeros)} are zeros: the rank stays at most {min(rows, columns)}"


def _nothing(model: nn.Module, reasons: dict[str, str | None]) -> str:
    others = Counter(weight.reason for weight in other_weights(model))
    lines = [f"  {name or '(root)'}: {reason}" for name, reason in reasons.items()]
    lines += [f"  {count} weight{'s' * (count > 1)}: {why}" for why, count in others.items()]
    what = "no nn.Linear of the model is eligible" if reasons else "the model has no nn.Linear"
    return "\n".join([f"{what}: there is nothing to train through rotations", *lines])
