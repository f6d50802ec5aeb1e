"""`save_checkpoint`, `load_checkpoint`: one file with all a run goes on from, whole or absent."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poetx_compile._torch import is_traceable_wrapper_subclass
from poetx_compile.distributed.wrappers import user_name
from poetx_compile.errors import CheckpointError
from poetx_compile.layers.eligibility import unwrap_compiled
from poetx_compile.layers.loading import fit_names
from poetx_compile.state.files import write_atomically

_FORMAT = "poetx_compile checkpoint 1"
_PLAIN = (Tensor, str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device)


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | Mapping[str, Any],
    optimizer: Optimizer | Mapping[str, Any] | None = None,
    **extra: Any,
) -> None:
    """Write the states of a model and of its optimiser, and whatever else the run needs.

    The file holds tensors and plain values, so ``torch.load(path, weights_only=True)`` reads it. It
    is written beside `path`, brought to the disk and renamed: a kill at any point leaves the
    earlier checkpoint or the new one, never a part. A run that was killed and goes on from it is
    the run that was not, bit for bit, where everything else that it depends on is in `extra` too::

        poetx.save_checkpoint(path, model, optimizer, step=step, rng=torch.get_rng_state())
        extra = poetx.load_checkpoint(path, model, optimizer)

    Args:
        path: of the file; what is there is replaced.
        model: prepared or not, compiled or not; or its state dict, where that has been gathered
            from shards (`torch.distributed.checkpoint` saves them without). Of several processes
            one writes the file.
        optimizer: any, or its state dict; the merge counters are part of it.
        extra: tensors, numbers, strings, ``None``, and dicts, lists and tuples of these.

    Raises:
        TypeError: something is neither a whole tensor nor a plain value; names where it is.
        InterruptedMergeError: a merge was cut off.
    """
    value = {
        "format": _FORMAT,
        "model": {user_name(key): tensor for key, tensor in _state(model).items()},
        "optimizer": None if optimizer is None else _state(optimizer),
        "extra": extra,
    }
    _check(value, "")
    write_atomically(Path(path), lambda temporary: torch.save(value, temporary))


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote into the model and the optimiser that are given.

    Args:
        path: of the file.
        model: prepared with the configuration of the checkpoint, and the same `shared`.
        optimizer: built as the one that was saved.

    Returns:
        What was given as `extra`, tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is cut off, or no checkpoint, or holds no optimiser.
        IncompatibleStateError: it does not fit; `load_state_dict` has the particulars.
    """
    value = read_checkpoint(path)
    if optimizer is not None and value["optimizer"] is None:
        raise CheckpointError(
            f"{os.fspath(path)} holds no state of an optimiser: load the model alone, and "
            "start a new optimiser"
        )
    if model is not None:
        model, state = unwrap_compiled(model), dict(value["model"])
        fit_names(state, model)
        model.load_state_dict(state)
    if optimizer is not None:
        optimizer.load_state_dict(value["optimizer"])
    return dict(value["extra"])


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a file of `save_checkpoint`: ``model``, ``optimizer`` and ``extra``, on the CPU.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
    """
    with open(path, "rb") as file:
        try:
            value = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # zip files and pickles break in many ways
            message = f"{os.fspath(path)} is broken, or no checkpoint: {error}"
            raise CheckpointError(message) from error
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise CheckpointError(
            f"{os.fspath(path)} was not written by poetx_compile.save_checkpoint: read it with "
            "torch.load, and give its parts to load_state_dict of model and optimiser"
        )
    return value


def _state(of: nn.Module | Optimizer | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(of, nn.Module):
        of = unwrap_compiled(of)
    return of if isinstance(of, Mapping) else of.state_dict()


def _check(value: Any, where: str) -> None:
    """Raise `TypeError` unless `value` is what ``weights_only=True`` reads."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str | int | float):
                raise TypeError(
                    f"a checkpoint cannot hold the key {key!r} at {where or 'its root'}: use "
                    "strings and numbers"
                )
            _check(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check(inner, f"{where}.{index}")
    elif not isinstance(value, _PLAIN) or is_traceable_wrapper_subclass(value):
        raise TypeError(
            f"a checkpoint cannot hold the {type(value).__name__} at {where}: give whole tensors, "
            "plain values, and dicts, lists and tuples of them; of a sharded model, its gathered "
            "state"
        )
