"""`poetx_compile.estimate` beside what was measured, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import poetx_compile as poetx
from benchmarks.memory.cases import DENSE, POETX, Case, of_row
from benchmarks.memory.methods import poetx_config, untrained
from benchmarks.memory.queue import named
from benchmarks.memory.tables import is_measured
from benchmarks.rows import Row
from benchmarks.rows import table as ascii_table
from poetx_compile.inspect.memory.rows import MemoryRow

TOLERANCE = 0.05
"""Of the measured peak."""

GIB = 2**30

_COMPILED = {"blocks": "layers", "graphs": "layers", "whole": "model"}

PARTS = ("weights", "gradients", "state", "activations", "peak")


def compared(cases: Iterable[Case], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each case that the package estimates, every part as measured and as estimated.

    What it has no estimate for are optimisers of others, and weights in another dtype than the
    products.

    Args:
        rows: of one GPU; a case without a row has the estimate alone.
    """
    found = []
    measured = {of_row(row): row for row in filter(is_measured, rows)}
    for case in filter(estimable, cases):
        row = measured.get(case, {})
        ours = estimated(case)
        names = {"state": "optimizer_state"}
        sizes = {part: getattr(ours, names.get(part, part)) / GIB for part in PARTS}
        line: dict[str, Any] = {"case": named(case)}
        for part in PARTS:
            line |= {part: row.get(f"{part}_gib"), f"{part}, est.": sizes[part]}
        line["error, %"] = 100 * (sizes["peak"] / row["peak_gib"] - 1) if row else None
        found.append(line)
    return found


def estimable(case: Case) -> bool:
    """Whether `estimate` knows what a case does, and counts what it reports."""
    if case.compile == "graphs":
        return False  # the row's peak is what is reserved
    if case.method == DENSE:
        return case.optimizer == "adamw" and case.weights == "bfloat16"
    return case.method == POETX


def estimated(case: Case) -> MemoryRow:
    """The estimate of a case."""
    with torch.device("meta"):
        model = untrained(case)
    ours = case.method == POETX
    config = poetx_config(case) if ours else poetx.POETXConfig()
    settings: dict[str, Any] = {}
    if ours:
        settings = {"optimizer": case.optimizer, "variants": [config.variant]}
        settings |= {"momentum_dtype": case.momentum} if case.momentum else {}
        settings |= {"gradient_dtype": case.gradients, "compiled": _COMPILED[case.compile]}
    else:
        settings = {"variants": []}
    found = poetx.estimate(
        model,
        batch_size=1,
        sequence_length=case.seq,
        config=dataclasses.replace(config, memory_budget=case.memory_budget) if ours else config,
        **settings,
    )
    return found.rows[-1]


def missed(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose peak is off by more than `TOLERANCE`."""
    return [line for line in lines if abs(line["error, %"] or 0) > 100 * TOLERANCE]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """All of them, as text."""
    columns = ["case", *(c for part in PARTS for c in (part, f"{part}, est.")), "error, %"]
    return ascii_table(lines, columns)
