"""metrics.jsonl: one JSON object a line, with the same fields in every line; and TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pretraining.failure import RunError
from pretraining.files import write_text


@dataclasses.dataclass(frozen=True)
class Row:
    """The state of a run after `step` optimiser steps; ``None`` where a field does not apply.

    Attributes:
        step: optimiser steps done.
        loss: mean training loss since the last row, nats per byte, so that runs with different
            vocabularies compare.
        loss_per_token: the same, nats per token.
        val_loss: validation loss, nats per byte; in the rows of evaluations.
        lr: the learning rate of the last step, for each parameter group.
        tokens_per_s: training tokens per second since the last row, without compilation and
            evaluation.
        peak_memory_mib: peak so far: allocated on the CUDA device, else resident in the process.
        last_merge: step of the last merge, 0 before the first; of a POET-X run.
        max_angle: largest angle θ (spectral norm of Q) since the last merge, in radians; in the
            rows of evaluations of a POET-X run. With --no-figures as the angle guard estimates it.
        orthogonality_error: largest ‖GᵀG − I‖ of a rotation, in the same rows.
    """

    step: int
    loss: float | None
    loss_per_token: float | None
    val_loss: float | None
    lr: dict[str, float]
    tokens_per_s: float | None
    peak_memory_mib: float
    last_merge: int | None = None
    max_angle: float | None = None
    orthogonality_error: float | None = None


class MetricsFile:
    """Appends rows to metrics.jsonl; each line is complete once `append` returns.

    Args:
        path: the file.
        last_step: rows after this step are dropped: a resumed run writes them again.
        board: folder for TensorBoard, if it is to have the same rows.

    Raises:
        RunError: TensorBoard is asked for and not installed.
    """

    def __init__(self, path: Path, last_step: int, board: Path | None = None):
        self.path = path
        self._board = None if board is None else _writer(board, last_step)
        self.rows = [r for r in read_rows(path) if r["step"] <= last_step] if path.exists() else []
        write_text(path, "".join(map(_line, self.rows)))

    def append(self, row: Row) -> None:
        values = {k: _finite(v) for k, v in dataclasses.asdict(row).items()}
        self.rows.append(values)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(_line(values))
        if self._board is not None:
            for name, value in _scalars(values):
                self._board.add_scalar(name, value, row.step)
            self._board.flush()


def _writer(folder: Path, last_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError("--tensorboard needs tensorboard: pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=last_step + 1)


def _scalars(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row by name; those of a group as ``field/group``."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{group}", number) for group, number in value.items())
        elif value is not None and name != "step":
            yield name, value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise RunError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
    return rows


def peak_memory_mib(device: torch.device, *, replayed: bool = False) -> float:
    """Peak memory in MiB: allocated on a CUDA device, else the resident set of the process.

    What CUDA graphs that are `replayed` use is reserved and not allocated: then all that is
    reserved counts.
    """
    if device.type == "cuda" and replayed:
        return torch.cuda.max_memory_reserved(device) / 2**20
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB on Linux


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
