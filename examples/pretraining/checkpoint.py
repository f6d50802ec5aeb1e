"""The checkpoint of a run: a file of `poetx_compile`, and the random number generators."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

import poetx_compile as poetx
from poetx_compile.errors import CheckpointError
from poetx_compile.state.checkpoint import read_checkpoint
from pretraining.failure import RunError

NAME = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a run into its folder, in the place of the last one.

    Args:
        folder: of the run.
        state: whole tensors and plain values; ``model`` and ``optimizer`` are state dicts.
    """
    rest = {key: value for key, value in state.items() if key not in ("model", "optimizer")}
    poetx.save_checkpoint(folder / NAME, state["model"], state["optimizer"], **rest)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, with tensors on the CPU; `RunError` where it cannot be read."""
    try:
        saved = read_checkpoint(folder / NAME)
    except FileNotFoundError as error:
        raise RunError(f"no checkpoint at {folder / NAME}") from error
    except CheckpointError as error:
        raise RunError(str(error)) from error
    return {**saved["extra"], "model": saved["model"], "optimizer": saved["optimizer"]}


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
