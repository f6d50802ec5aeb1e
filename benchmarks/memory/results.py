"""Rows in ``benchmarks/results/memory-<gpu>.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.memory.cases import of_row
from benchmarks.memory.plans import PLANS
from benchmarks.rows import RESULTS, Row, read, result_path, write

NAME = "memory"


def all_rows(folder: Path = RESULTS) -> list[Row]:
    """The rows of every GPU."""
    return [row for file in sorted(folder.glob(f"{NAME}-*.json")) for row in read(file)]


def save(folder: Path, row: Row) -> None:
    """Add a row to those of its GPU, in the place of an earlier one of the same case."""
    path = result_path(folder, NAME, row["gpu"])
    rows = {of_row(known).key(): known for known in (read(path) if path.exists() else [])}
    write(path, list((rows | {of_row(row).key(): row}).values()))


def selected(
    rows: Sequence[Row], plans: Sequence[str] = (), model: str | None = None, seq: int | None = None
) -> list[Row]:
    """The rows of some plans, in their order, of all GPUs; those of all plans where none is named.

    Raises:
        KeyError: there is no such plan.
    """
    chosen = [case for name in plans or PLANS for case in PLANS[name]]
    order = {case.key(): number for number, case in reversed(list(enumerate(chosen)))}
    keyed = [(of_row(row).key(), row) for row in rows]
    found = [(order[key], row) for key, row in keyed if key in order]
    found.sort(key=lambda pair: pair[0])
    return [
        row
        for _, row in found
        if (model is None or row["model"] == model) and (seq is None or row["seq"] == seq)
    ]
