"""Runs that differ in the seed alone, as one: their mean, and how it compares with AdamW's.

A loss is compared with that of tuned AdamW: the lowest mean over the same seeds of any AdamW run of
the same shapes, tokens, start and corpus, in whichever plan it is.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.quality.settings import Settings
from benchmarks.rows import Row

NAMES = {
    ("dense", "adamw"): "AdamW",
    ("dense", "muon"): "Muon",
    ("dense", "scale"): "SCALE",
    ("lora", "adamw"): "ReLoRA",
    ("poet", "adamw"): "original POET",
    ("variant", "muon"): "variant",
    ("poetx", "muon"): "POETXMuon",
    ("poetx", "adamw"): "POETXAdamW",
}

_SIZE = ("corpus", "preset", "width", "layers", "steps", "batch_size", "seq_len", "start")
_SETTINGS = {f.name: f.default for f in dataclasses.fields(Settings) if f.name != "seed"}
"""Setting → what a row from before there was that setting had."""


def name(row: Row) -> str:
    """The method as a reader knows it."""
    found = NAMES[row["method"], row["optimizer"]]
    return "LoRA" if found == "ReLoRA" and row.get("restart") is None else found


class Line:
    """Runs that differ in the seed alone.

    Attributes:
        row: the first of them.
        loss: the mean; ``None`` where one diverged.
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = sorted(rows, key=lambda row: row["seed"])
        self.row = self.rows[0]
        self.loss = self.mean(self.seeds)

    @property
    def seeds(self) -> list[int]:
        return [row["seed"] for row in self.rows]

    def mean(self, seeds: Iterable[int]) -> float | None:
        """The mean loss of some seeds; ``None`` where one is not here, or diverged."""
        losses = {row["seed"]: row["val_loss"] for row in self.rows}
        chosen = [losses.get(seed) for seed in seeds]
        found = [loss for loss in chosen if loss is not None]
        return statistics.fmean(found) if len(found) == len(chosen) else None

    def over(self, known: Iterable[Line]) -> float | None:
        """The loss over tuned AdamW's among `known`, in per cent."""
        alike = (line for line in known if _is_reference(line.row, self.row))
        losses = [line.mean(self.seeds) for line in alike]
        reference = min((loss for loss in losses if loss is not None), default=None)
        if reference is None or self.loss is None:
            return None
        return 100 * (self.loss / reference - 1)


def lines(rows: Iterable[Row]) -> list[Line]:
    """Rows that differ in the seed alone, together."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        values = [row.get(key, old) for key, old in _SETTINGS.items()]
        found[json.dumps([row["corpus"], *values])].append(row)
    return [Line(group) for group in found.values()]


def best(given: Iterable[Line]) -> list[Line]:
    """Of each method and block size the lowest loss; within 1 % of it the line of most seeds."""
    found: dict[str, list[Line]] = defaultdict(list)
    for line in given:
        if line.loss is not None:
            key = [name(line.row), line.row["block_size"], line.row["weights"]]
            found[json.dumps([*key, *(line.row.get(size) for size in _SIZE)])].append(line)
    return [_best_of(group) for group in found.values()]


def _best_of(group: Sequence[Line]) -> Line:
    losses = {line: line.loss for line in group if line.loss is not None}
    near = [line for line, loss in losses.items() if loss <= 1.01 * min(losses.values())]
    return min(near, key=lambda line: (-len(line.rows), losses[line]))


def _is_reference(row: Row, other: Row) -> bool:
    alike = all(row.get(key) == other.get(key) for key in _SIZE)
    return alike and name(row) == "AdamW" and row["weights"] == "float32"
