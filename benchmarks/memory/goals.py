"""What was asked of 8B and 13B on one GPU, beside what the rows say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.memory.cases import Case, of_row
from benchmarks.memory.plans import IN_TURN, RARELY, XQ, at, merged, stored
from benchmarks.memory.tables import is_measured, ratio
from benchmarks.rows import Row


@dataclasses.dataclass(frozen=True)
class Goal:
    """At most so many GiB at the peak and, where it is asked, at least that of AdamW's tokens/s."""

    name: str
    case: Case
    peak_gib: float
    ratio: float | None = None


_LEAN = merged(256, variant="mem", **IN_TURN)
_XQ = stored(256, "mem", **XQ)

GOALS = (
    Goal("the best form, b = 256", merged(256, **IN_TURN), 22.5, 1.1),
    Goal("the leanest form, b = 256", _LEAN, 21.5, 0.9),
    Goal("b = 512", merged(512, **IN_TURN), 23.5),
    Goal("b = 1024", merged(1024, **RARELY), 26.0, 0.85),
    Goal("POET-XQ, b = 256", _XQ, 16.0, 0.8),
    Goal("POET-XQ, checkpointed", at([_XQ], checkpointing=True)[0], 13.0),
    Goal("13B, 1 × 2048", at([_LEAN], model="13b", seq=2048)[0], 42.0),
)


def markdown(rows: Sequence[Row], goals: Sequence[Goal] = GOALS) -> str:
    """A line for each goal: what was asked, what was measured, whether that meets it."""
    lines = ["| | asked | measured | |", "| --- | --- | --- | --- |"]
    for goal in goals:
        asked = f"≤ {goal.peak_gib:g} GiB" + (f", ≥ {goal.ratio:g}" if goal.ratio else "")
        found = [row for row in rows if of_row(row) == goal.case and is_measured(row)]
        if not found:
            lines.append(f"| {goal.name} | {asked} | | not measured |")
        for row in found:
            speed = ratio(row, rows)
            measured = f"{row['peak_gib']:.2f} GiB" + _shown(goal, speed)
            lines.append(f"| {goal.name} | {asked} | {measured} | {_verdict(goal, row, speed)} |")
    return "\n".join(lines)


def _shown(goal: Goal, speed: float | None) -> str:
    """Two digits, or three where two would hide that it is missed."""
    if speed is None:
        return ""
    hidden = goal.ratio is not None and speed < goal.ratio <= round(speed, 2)
    return f", {speed:.{3 if hidden else 2}f}"


def _verdict(goal: Goal, row: Row, speed: float | None) -> str:
    missed = ["memory"] if row["peak_gib"] > goal.peak_gib else []
    if goal.ratio is not None and speed is None:
        missed.append("no AdamW beside it")
    elif goal.ratio is not None and speed is not None and speed < goal.ratio:
        missed.append("speed")
    return f"missed: {', '.join(missed)}" if missed else "met"
