"""Which `nn.Linear` can be trained through rotations, and the reason where one cannot."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poetx_compile._torch import FakeTensor, _ConvNd, is_traceable_wrapper_subclass
from poetx_compile.config import POETXConfig
from poetx_compile.distributed.shards import is_sharded
from poetx_compile.distributed.wrappers import user_name
from poetx_compile.errors import ConfigError, NothingToTrainError
from poetx_compile.layers.prepared import equivalence_of

PREPARED = "already prepared"
"""The one reason that is no refusal: the layer is trained through rotations."""

ZEROS = "the weight is all zeros, which no rotation changes: it trains densely"

_ROUTER_NAMES = ("gate", "gating", "router", "shared_expert_gate")
_ROUTER_PARTS = ("gate", "gating", "rout", "switch")

HOOKED = (
    "has a post-accumulate-grad hook (an optimiser step in the backward?), which never runs for a "
    "frozen weight"
)


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The user's own module behind `torch.compile(model)`.

    Raises:
        ConfigError: `model` is something else: its parameters, an optimiser, a function.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a {type(model).__name__} is no model: give the nn.Module itself")
    return getattr(model, "_orig_mod", model)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` of the model under every name it has (a shared one has several).

    The names are the user's, without wrappers of compiled parts.
    """
    return {
        user_name(name): module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    }


def _name_matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith("." + pattern)


def _targeted(name: str, target: str | Sequence[str] | None) -> bool:
    if target is None or target == "all-linear":
        return True
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(_name_matches(name, pattern) for pattern in target)


def check_targets(names: Sequence[str], config: POETXConfig) -> None:
    """Raise where a pattern of `target_modules` matches no `nn.Linear` at all."""
    target = config.target_modules
    if target is None or target == "all-linear":
        return
    patterns = [target] if isinstance(target, str) else list(target)
    for pattern in patterns:
        one = pattern if isinstance(target, str) else [pattern]
        if not any(_targeted(name, one) for name in names):
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise NothingToTrainError(
                f"target_modules pattern {pattern!r} matches no nn.Linear; there are: {shown}"
            )


def refusals(model: nn.Module, config: POETXConfig) -> dict[str, str | None]:
    """For each `nn.Linear` by name: ``None`` where it is eligible, else the reason why not."""
    owners = _weight_owners(model)
    heads = _output_embeddings(model)
    found = linears(model)
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in found.items():
        names[id(module)].append(name)
    reasons: dict[str, str | None] = {}
    for name, module in found.items():
        first = names[id(module)][0]
        if name != first:
            reasons[name] = f"shared: the same module as {first}"
        else:
            reasons[name] = _refusal(model, names[id(module)], module, config, owners, heads)
    return reasons


def _refusal(
    model: nn.Module,
    names: list[str],
    module: nn.Linear,
    config: POETXConfig,
    owners: dict[int, list[str]],
    heads: set[int],
) -> str | None:
    if equivalence_of(module) is not None:
        return PREPARED
    if (reason := name_refusal(names, config)) is not None:
        return reason
    if id(module) in heads:
        return "output embedding (model.get_output_embeddings())"
    if any(_is_router(model, name) for name in names):
        return "router of a mixture of experts"
    if type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    if parametrize.is_parametrized(module, "weight"):
        return "weight has another parametrization"
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return "weight is no parameter"
    others = [owner for owner in owners[id(weight)] if owner != names[0]]
    if others:
        return f"tied: the weight belongs to {', '.join(others)} as well"
    return weight_refusal(weight)


def name_refusal(names: Sequence[str], config: POETXConfig) -> str | None:
    """Why the configuration leaves a layer of these names alone, or ``None``."""
    if not any(_targeted(name, config.target_modules) for name in names):
        return "not in target_modules"
    for pattern in config.exclude_modules:
        if any(_name_matches(name, pattern) for name in names):
            return f"excluded by name: {pattern}"
    return None


def weight_refusal(weight: nn.Parameter) -> str | None:
    """Why a parameter cannot be the frozen weight of a POET layer, or ``None``."""
    if nn.parameter.is_lazy(weight):
        return "not initialised: run the model once, then call prepare"
    if is_sharded(weight):
        return "weight is sharded: prepare before fully_shard; tensor parallelism is not supported"
    if is_traceable_wrapper_subclass(weight):
        return f"weight is a {type(weight.data).__name__}: prepare before quantising"
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {weight.dtype} cannot be rotated"
    if not weight.requires_grad:
        return "frozen by the user (requires_grad is False)"
    if weight._post_accumulate_grad_hooks:
        return HOOKED
    if weight.dim() != 2 or min(weight.shape) == 0 or max(weight.shape) < 2:
        return f"shape {list(weight.shape)} has nothing to rotate"
    if is_all_zeros(weight):
        return ZEROS
    return None


def has_values(weight: Tensor) -> bool:
    """Whether there is something to read in a weight: not on meta, of a fake mode, or sharded."""
    return not (weight.is_meta or isinstance(weight, FakeTensor) or is_sharded(weight))


def is_all_zeros(weight: Tensor) -> bool:
    """Whether every entry of a weight is zero, as far as that can be known here."""
    if not has_values(weight):
        return False
    w = weight.detach()
    return not w[:1].any() and not w.any()  # the first row tells of almost any weight


def trained_by(found: dict[str, nn.Linear], reasons: dict[str, str | None]) -> set[int]:
    """Identity of the linears that are, or are going to be, trained through rotations.

    A shared module has a reason under its later names: it is trained all the same.
    """
    return {id(found[name]) for name, reason in reasons.items() if reason in (None, PREPARED)}


class OtherWeight(NamedTuple):
    """A weight that belongs to no `nn.Linear`: the module it is in, its own name, and why not."""

    module: str
    name: str
    shape: tuple[int, ...]
    reason: str
    trains: bool


def other_weights(model: nn.Module) -> Iterator[OtherWeight]:
    """Every parameter of two dimensions or more outside of `nn.Linear`, once.

    A module with `in_features` and `out_features` but no such parameter (a quantised layer, with
    buffers of its own) counts as one.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        module_name = user_name(name)
        if isinstance(module, nn.Linear) or ".parametrizations." in f".{module_name}.":
            continue
        weights = {
            name: p
            for name, p in module._parameters.items()
            if p is not None and not nn.parameter.is_lazy(p) and p.dim() >= 2
        }
        for name, p in weights.items():
            if id(p) not in seen:
                seen.add(id(p))
                full = f"{module_name}.{name}".lstrip(".")
                reason = _not_linear(module, p.dim())
                yield OtherWeight(module_name, full, tuple(p.shape), reason, p.requires_grad)
        sizes = [vars(module).get(key) for key in ("out_features", "in_features")]
        if not weights and isinstance(sizes[0], int) and isinstance(sizes[1], int):
            shape = (sizes[0], sizes[1])
            yield OtherWeight(module_name, module_name, shape, _not_linear(module, 2), False)


def _not_linear(module: nn.Module, dimensions: int) -> str:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    reason = f"{type(module).__name__} is no nn.Linear"
    return f"{reason} ({dimensions} dimensions)" if dimensions > 2 else reason


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """id(parameter) → the distinct modules that own it, each by its first name."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(user_name(name))
    return owners


def _output_embeddings(model: nn.Module) -> set[int]:
    """Identity of the output embedding, where a model says which it is (the Hugging Face way)."""
    heads = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                heads.add(id(getter()))
            except (NotImplementedError, AttributeError):
                continue
    return heads


def _is_router(model: nn.Module, name: str) -> bool:
    """A linear that chooses among experts, or a part of what does: a rotation would mix experts."""
    path = name.split(".") if name else []
    parents = [
        unwrap_compiled(model.get_submodule(".".join(path[:depth]))) for depth in range(len(path))
    ]
    if parents and "router" in type(parents[-1]).__name__.lower():
        return True
    return any(_routes(parent, child) for parent, child in zip(parents, path, strict=True))


def _routes(parent: nn.Module, child: str) -> bool:
    """Whether a child of a module is called a router, and has experts beside it.

    They are called so, or are as many as it has outputs: a gate of a gated MLP is no router.
    """
    if "experts" in parent._modules and child in _ROUTER_NAMES:
        return True
    if not any(part in child.lower() for part in _ROUTER_PARTS):
        return False
    counts = set(_expert_counts(parent, child))
    return bool(counts) and any(
        m.out_features in counts
        for m in parent.get_submodule(child).modules()
        if isinstance(m, nn.Linear)
    )


def _expert_counts(parent: nn.Module, child: str) -> Iterator[int]:
    """How many experts there may be beside a child: lists of modules or weights that are alike, and
    weights of three dimensions, of the parent or of a sibling."""
    siblings = [m for name, m in parent._modules.items() if m is not None and name != child]
    for module in (parent, *siblings):
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList):
            members = module.values() if isinstance(module, nn.ModuleDict) else module
            if len(module) > 1 and len({type(member) for member in members}) == 1:
                yield len(module)
        elif not isinstance(module, _ConvNd):
            for p in module._parameters.values():
                if p is not None and not nn.parameter.is_lazy(p) and p.dim() > 2 and len(p) > 1:
                    yield len(p)
