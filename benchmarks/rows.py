"""Rows: dicts of JSON values that say where they were measured; files and tables of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

RESULTS = Path(__file__).resolve().parent / "results"


def environment(device: torch.device, dtype: torch.dtype) -> Row:
    """What every row begins with: gpu, torch, triton (``None`` where there is none), dtype."""
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if has_triton else None,
        "dtype": str(dtype).removeprefix("torch."),
    }


def result_path(folder: Path, name: str, gpu: str) -> Path:
    """``<folder>/<name>-<gpu>.json``, the name of the GPU in lower case with hyphens."""
    return folder / f"{name}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows so far, whole or not at all: a run that is cut off keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> list[Row]:
    """The rows of a file; `ValueError` where it holds something else."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is no list of rows")
    return rows


def table(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """An ASCII table of some columns; a value that a row lacks, or that is ``None``, is ``-``."""
    cells = [list(columns), *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def line(row: Row, columns: Sequence[str]) -> str:
    """A row on one line, for progress."""
    return ", ".join(f"{column}={cell(row.get(column))}" for column in columns)


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
