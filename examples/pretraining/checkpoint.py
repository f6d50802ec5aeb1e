"""One safetensors file with everything a run needs to go on: tensors only, written atomically.

The tensors of a nested value (a state_dict) are stored by their path; the rest of it, numbers and
structure, is JSON in the file's metadata. Nothing is pickled.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretraining.failure import RunError
from pretraining.files import write_atomically

_FORMAT = "1"


def save_checkpoint(path: Path, value: dict[str, Any]) -> None:
    """Write `value`: nested dicts, lists and tuples of tensors, numbers, strings and None."""
    tensors: dict[str, Tensor] = {}
    tree = _flatten(value, "", tensors)
    metadata = {"format": _FORMAT, "tree": json.dumps(tree)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, with tensors on the CPU.

    Raises:
        RunError: the file is missing, cut off, or no checkpoint of these scripts.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or "tree" not in metadata:
                raise RunError(f"{path} is a safetensors file, but no checkpoint of this script")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _restore(json.loads(metadata["tree"]), tensors)
    except FileNotFoundError as error:
        raise RunError(f"no checkpoint at {path}") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"the checkpoint {path} is broken: {error}") from error


def random_state() -> dict[str, Any]:
    """State of every global generator: Python's, torch's, and those of the CUDA devices."""
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned; CUDA only where the devices are the same in number."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON tree of `value`; its tensors go to `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[key, _flatten(v, _join(path, key), tensors)] for key, v in value.items()]
        if not all(isinstance(key, str | int) for key, _ in items):
            raise TypeError(f"a dict of the checkpoint has keys that are no str or int: {path}")
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten(v, _join(path, i), tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a checkpoint cannot hold the {type(value).__name__} at {path}")


def _restore(tree: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _restore(node, tensors) for key, node in content}
    if kind in ("list", "tuple"):
        nodes = [_restore(node, tensors) for node in content]
        return nodes if kind == "list" else tuple(nodes)
    if kind == "value":
        return content
    raise ValueError(f"unknown node {kind!r} in its tree")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
