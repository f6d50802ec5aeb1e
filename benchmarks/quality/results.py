"""Rows of plans in ``benchmarks/results/quality-<plan>.json``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.quality.settings import Settings
from benchmarks.rows import RESULTS, Row, read, write

PREFIX = "quality-"


def path(folder: Path, plan: str) -> Path:
    """Where the rows of a plan are."""
    return folder / f"{PREFIX}{Path(plan).stem}.json"


def all_rows(folders: Iterable[Path]) -> list[Row]:
    """The rows of every plan in some folders; of a run that is there twice, the last one."""
    files = (f for folder in folders for f in sorted(folder.glob(f"{PREFIX}*.json")))
    return list({row["run"]: row for file in files for row in read(file)}.values())


def save(folder: Path, plans: dict[str, list[Settings]], rows: dict[str, Row]) -> None:
    """Write the rows of each plan, in its order."""
    for plan, runs in plans.items():
        if found := [rows[run.run] for run in runs if run.run in rows]:
            write(path(folder, plan), found)


def load(plan: str, folder: Path = RESULTS) -> list[Row]:
    """The rows of a plan, or of a file of rows; none where it has not been run."""
    file = Path(plan) if plan.endswith(".json") else path(folder, plan)
    return read(file) if file.is_file() or plan.endswith(".json") else []


def load_all(plans: Iterable[str], folder: Path = RESULTS) -> list[Row]:
    """The rows of some plans, each run once."""
    return list({row["run"]: row for plan in plans for row in load(plan, folder)}.values())
