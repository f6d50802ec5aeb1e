"""The figure: tokens/s against the peak, a point for each way to train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.memory.cases import DENSE, POETX, Case, label, of_row
from benchmarks.memory.tables import is_measured, ratio
from benchmarks.rows import Row

SHOWN = (
    "tokens/s over AdamW's against the peak of memory; hollow: gives up accumulation, clipping, DDP"
)


def draw(rows: Sequence[Row], known: Sequence[Row], path: Path) -> Path:
    """Draw the rows that fit into `path`.

    Args:
        known: where AdamW is looked for.

    Raises:
        ValueError: no row has both.
    """
    from matplotlib.figure import Figure

    measured = [(row, ratio(row, known)) for row in rows if is_measured(row)]
    points = [(row, speed) for row, speed in measured if speed is not None]
    if not points:
        raise ValueError("no row with a peak, tokens/s, and AdamW's beside it")
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    panel = figure.subplots()
    for number, (row, speed) in enumerate(points, 1):
        case = of_row(row)
        colour, marker = _style(case)
        panel.plot(
            row["peak_gib"], speed, marker, color=colour, markersize=8,
            fillstyle="none" if row["gives_up"] else "full", label=f"{number}  {label(case)}",
        )  # fmt: skip
        panel.annotate(
            str(number), (row["peak_gib"], speed), textcoords="offset points", xytext=(6, 4)
        )
    first = points[0][0]
    panel.axhline(1.0, color="black", linewidth=0.6)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("peak of memory, GiB (hollow: without accumulation, clipping and DDP)")
    panel.set_ylabel("tokens/s, AdamW = 1")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small", handlelength=1)
    figure.suptitle(
        f"Llama {first['model'].upper()}, 1 x {first['seq']} tokens, bf16: {first['gpu']}, "
        f"torch {first['torch']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _style(case: Case) -> tuple[str, str]:
    if case.method != POETX:
        return "tab:gray", "o" if case.method == DENSE else "s"
    if case.base == "int8":
        return "tab:green", "D"
    return ("tab:red", "o") if case.merged else ("tab:blue", "o")
