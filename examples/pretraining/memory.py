"""The memory that a run may use on its CUDA device, and what is said where that is not enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poetx_compile.inspect.memory.fit import parse_memory, usable
from pretraining.failure import RunError
from pretraining.files import write_json
from pretraining.methods import Method

GIB = 2**30
FAILURE = "failure.json"


def cap(size: str | None, device: torch.device) -> float | None:
    """Let the allocator take no more than a GPU of `size` has for tensors; GiB, or ``None``.

    As `poetx_compile.estimate` counts it: less a CUDA context and what fragments. A card that has
    less is its own limit.
    """
    if size is None:
        return None
    limit = usable(parse_memory(size))
    if device.type != "cuda":
        raise RunError(f"--gpu-memory caps a CUDA device, and the run is on {device}: leave it out")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device.index or 0)
    return min(limit, total) / GIB


def needed(method: Method) -> dict[str, float]:
    """GiB of weights, gradients and the optimiser's state, before any activation.

    What the state has not got yet is counted as AdamW's: two moments as large as the parameter.
    """
    trained = [p for p in method.model.parameters() if p.requires_grad]
    weights = [*method.model.parameters(), *method.model.buffers()]
    state = 0
    for parameter in trained:
        values = method.optimizer.state.get(parameter)
        tensors = [v for v in (values or {}).values() if isinstance(v, Tensor)]
        state += sum(v.nbytes for v in tensors) if values else 2 * parameter.nbytes
    return {
        "weights_gib": sum(t.nbytes for t in weights) / GIB,
        "gradients_gib": sum(p.nbytes for p in trained) / GIB,
        "state_gib": state / GIB,
    }


def out_of_memory(
    error: torch.OutOfMemoryError, method: Method, step: int, limit: float | None, folder: Path
) -> RunError:
    """The `RunError` of a run that does not fit, written into failure.json of its folder as well.

    Args:
        error: torch's own.
        limit: GiB that the run may use; ``None`` for the whole device.
        folder: of the run; nothing is written where it is not there.
    """
    parts = needed(method)
    total = sum(parts.values())
    names = ("weights", "gradients", "moments of the optimiser")
    shown = " + ".join(f"{v:.1f} {n}" for v, n in zip(parts.values(), names, strict=True))
    most = "the device has less" if limit is None else f"the run may use {limit:.1f} GiB"
    message = (
        f"out of memory in step {step + 1}: {method.label} needs {total:.1f} GiB ({shown}) beside "
        f"its activations, and {most}: use a smaller --batch-size, --activation-checkpointing, "
        "--dtype bfloat16 or --method poetx"
    )
    if folder.is_dir():
        peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
        values: dict[str, Any] = {
            "error": message, "step": step, "limit_gib": limit, "peak_gib": peak, **parts,
            "torch": str(error),
        }  # fmt: skip
        write_json(folder / FAILURE, values)
    return RunError(message)
