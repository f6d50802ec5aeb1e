"""`plain_state_dict`: the weights of a prepared model as a plain model has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from poetx_compile._torch import is_traceable_wrapper_subclass
from poetx_compile.distributed.wrappers import user_name
from poetx_compile.errors import IncompatibleStateError
from poetx_compile.layers.eligibility import unwrap_compiled
from poetx_compile.layers.layout import Layout
from poetx_compile.layers.parametrization import QUANTISED
from poetx_compile.ops.gains import GAINS

_LAYOUT = "0.layout"
_OF_INTERVALS = ("original", "0.skew_in", "0.skew_out", _LAYOUT)
_GAINS = tuple(f"0.{name}" for name in GAINS)
_NAMES = (*_OF_INTERVALS, *_GAINS, *(f"0.{name}" for name in QUANTISED))
_SCALE = "0.scale"
_KEY = re.compile(rf"(.*?)parametrizations\.weight\.({'|'.join(map(re.escape, _NAMES))})")


@torch.no_grad()
def plain_state_dict(
    source: nn.Module | Mapping[str, Any], *, device: torch.device | str | None = None
) -> dict[str, Any]:
    """The state dict of the plain model: effective weights under their original names.

    The prepared model is left as it is and trains on; `merge_and_unload` turns it into the plain
    one instead. Of a saved state dict the plain form is found without a model, so a checkpoint can
    be loaded into a plain model, or into one that was prepared with another block size::

        model.save_pretrained(path, state_dict=poetx.plain_state_dict(model))
        other.load_state_dict(poetx.plain_state_dict(torch.load("checkpoint.pt")["model"]))

    Args:
        source: a model, prepared or not, compiled or not, or what its `state_dict` gave.
        device: where the effective weights go, one by one; default: they stay where they are.

    Returns:
        A new dict without ``_orig_mod.``. Effective weights are new tensors; everything else shares
        the memory of what `state_dict` gives, hence of the parameter itself (``copy.deepcopy`` of
        the dict is independent of the model). What is tied or shared is one tensor, under all its
        names.

    Raises:
        IncompatibleStateError: some of a layer's tensors are missing or sharded, or another version
            of this package saved them.
        InterruptedMergeError: a merge was cut off.
    """
    state = _unwrap(source).state_dict() if isinstance(source, nn.Module) else source
    keys = {key: match for key in state if (match := _KEY.fullmatch(key))}
    prepared = {match[1] for match in keys.values() if match[2] != "original"}
    plain: dict[str, Any] = {}
    once = _once(device)
    for key, value in state.items():
        own = key in keys and keys[key][1] in prepared
        prefix = keys[key][1] if own else key[: len(key) - len(key.rpartition(".")[2])]
        weight = user_name(f"{prefix}weight")
        if prefix in prepared and weight not in plain:  # in front, as that of a plain linear
            tensors = _tensors(state, prefix)
            plain[weight] = once(tensors[0], partial(_effective, *tensors))
        if not own:
            is_tensor = isinstance(value, Tensor)
            plain[user_name(key)] = once(value, value.detach) if is_tensor else value
    return plain


def _unwrap(model: nn.Module) -> nn.Module:
    """The user's own module behind `torch.compile` and `DistributedDataParallel`, in any order."""
    inner = unwrap_compiled(model)
    inner = inner.module if isinstance(inner, DistributedDataParallel) else inner
    return inner if inner is model else _unwrap(inner)


def _once(device: torch.device | str | None) -> Callable[[Tensor, Callable[[], Tensor]], Tensor]:
    """A function that makes what belongs to a tensor once, however often its memory comes along."""
    made: dict[Any, Tensor] = {}

    def once(tensor: Tensor, make: Callable[[], Tensor]) -> Tensor:
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if is_traceable_wrapper_subclass(tensor) or not memory[0]:  # sharded, empty or on meta
            return make()
        if memory not in made:
            made[memory] = make() if device is None else make().to(device)
        return made[memory]

    return once


def _tensors(state: Mapping[str, Any], prefix: str) -> list[Any]:
    """The stored weight, the skew parameters, the layout, the gains and the scales of a layer."""
    start = f"{prefix}parametrizations.weight."
    saved = state.get(start + _LAYOUT)
    natural = saved is not None and Layout.of(saved, start + _LAYOUT).natural
    names = ("original", _LAYOUT) if natural else _OF_INTERVALS
    if missing := [start + name for name in names if start + name not in state]:
        raise IncompatibleStateError(
            f"the state dict has no {', '.join(missing)}: give the whole state"
        )
    if others := [k for k in state if k.startswith(start) and not _KEY.fullmatch(k)]:
        raise IncompatibleStateError(
            f"{others[0]} belongs to another parametrization of the weight: remove it first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    tensors: list[Any] = [state.get(start + name) for name in (*names, *_GAINS, _SCALE)]
    if tensors[0].dtype == torch.int8 and tensors[-1] is None:
        raise IncompatibleStateError(
            f"the state dict has no {start + _SCALE}: give the whole state"
        )
    if any(is_traceable_wrapper_subclass(t) for t in tensors):
        raise IncompatibleStateError(
            f"the tensors of {prefix.rstrip('.')} are sharded: gather them with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True, cpu_offload=True)) and pass the result"
        )
    return tensors


def _effective(stored: Tensor, *rest: Any) -> Tensor:
    *skews, saved, gain_in, gain_out, scale = rest
    gains = gain_in, gain_out
    effective = Layout.of(saved, "layout").effective(stored, *skews, gains=gains, scale=scale)
    return stored.clone() if effective is stored else effective
