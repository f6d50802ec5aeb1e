"""Figures: tokens/s against the peak, a point for each way to train; the loss of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory.cases import DENSE, POETX, Case, label, of_row
from benchmarks.memory.tables import is_measured, ratio
from benchmarks.rows import Row

SHOWN = (
    "tokens/s over AdamW's against the peak of memory; hollow: gives up accumulation, clipping, DDP"
)

KINDS = {
    "AdamW": ("black", "o"),
    "dense rivals (hollow: no accumulation, clipping, DDP)": ("tab:orange", "s"),
    "POET-X": ("tab:blue", "o"),
    "POET-XQ: frozen weights in int8": ("tab:green", "D"),
}
"""What the legend tells apart → colour and marker."""

APART = 0.055
"""Of the height of the panel: the least distance of two labels that are beside each other."""


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
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    panel = figure.subplots()
    top = 1.1 * max(1.0, *(speed for _, speed in points))
    wide = 1.05 * max(row["cap_gib"] or row["peak_gib"] for row, _ in points)
    panel.set_xlim(0, wide)
    panel.set_ylim(0, top)
    names = short_names([of_row(row) for row, _ in points])
    labels: list[tuple[float, float]] = []
    for name, (row, speed) in sorted(
        zip(names, points, strict=True), key=lambda one: one[1][1], reverse=True
    ):
        kind = _kind(of_row(row))
        colour, marker = KINDS[kind]
        panel.plot(
            row["peak_gib"], speed, marker, color=colour, markersize=9,
            fillstyle="none" if row["gives_up"] else "full", zorder=4,  # above the labels
        )  # fmt: skip
        # Labels are right of their points, from the top down; one that is too near goes lower.
        x = row["peak_gib"] + 0.015 * wide
        beside = [lower - APART * top for other, lower in labels if abs(other - x) < wide / 3]
        labels.append((x, min([speed, *beside])))
        panel.text(
            *labels[-1], f"{name}: {row['peak_gib']:.1f} GiB", color=colour, va="center",
            fontsize="small", bbox={"color": "white", "pad": 1},
        )  # fmt: skip
    for cap in {row["cap_gib"] for row, _ in points if row["cap_gib"]}:
        panel.axvline(cap, color="tab:red", linestyle="--", linewidth=1)
        panel.text(
            cap - 0.005 * wide, 0.6 * top, f"the most allowed: {cap:.0f} GiB",
            color="tab:red", rotation="vertical", ha="right", va="center", fontsize="small",
        )  # fmt: skip
    for kind in KINDS:
        if any(_kind(of_row(row)) == kind for row, _ in points):
            colour, marker = KINDS[kind]
            panel.plot([], [], marker, color=colour, label=kind)
    panel.legend(loc="lower right", bbox_to_anchor=(0.94, 0.0), fontsize="small")
    panel.axhline(1.0, color="black", linewidth=0.6)
    panel.set_xlabel("peak of memory, GiB")
    panel.set_ylabel("tokens/s, AdamW = 1")
    panel.grid(alpha=0.3)
    first = points[0][0]
    figure.suptitle(
        f"Llama {first['model'].upper()}, 1 × {first['seq']} tokens, bf16: {first['gpu']}, "
        f"torch {first['torch']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def short_names(cases: Sequence[Case]) -> list[str]:
    """Labels without what all of POET-X have in common, and without how often they turn.

    Where two of them differ in nothing else, they say that too.
    """
    ours = [case for case in cases if case.method == POETX]
    common = {"momentum": "float32", "gradients": "float32"}
    same: dict[str, Any] = {
        k: v for k, v in common.items() if len({getattr(o, k) for o in ours}) == 1
    }
    found = {}
    for case in cases:
        short = case if case.method != POETX else dataclasses.replace(case, **same)
        found[case] = dataclasses.replace(short, turn_every=1), short
    plain = [label(without) for without, _ in found.values()]
    return [label(short if plain.count(label(w)) > 1 else w) for w, short in found.values()]


def _kind(case: Case) -> str:
    dense, rival, ours, quantised = KINDS
    if case.method == POETX:
        return quantised if case.base == "int8" else ours
    return dense if case.method == DENSE and case.optimizer == "adamw" else rival


def curve(rows: Sequence[Row], path: Path) -> Path:
    """Draw the losses of runs of `examples/pretrain.py`, bits a byte, into `path`.

    Args:
        rows: of a file in ``benchmarks/results``; those that are no step are left alone.

    Raises:
        ValueError: no row is a step.
    """
    from matplotlib.figure import Figure

    runs: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("loss") is not None:
            runs.setdefault(row["run"], []).append(row)
    if not runs:
        raise ValueError("no row is a step of a run")
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    panel = figure.subplots()
    for number, (run, steps) in enumerate(runs.items()):
        _draw_run(panel, run, steps, f"C{number}", above=number == 0)
    for summary in (row for row in rows if row.get("killed_at")):
        panel.axvline(summary["killed_at"], color="tab:red", linestyle=":")
        text = f" killed; goes on\n from step {summary['checkpoint']}"
        panel.annotate(text, (summary["killed_at"], 0.05), color="tab:red", fontsize="small")
    panel.set_ylim(bottom=0)
    panel.set_xlabel("step")
    panel.set_ylabel("loss, bits a byte")
    panel.grid(alpha=0.3)
    panel.legend()
    first = next(iter(runs.values()))[0]
    tokens = f"{first['batch']} × {first['length']} tokens a step"
    figure.suptitle(f"{first['model']}, {tokens}: {first['gpu']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _draw_run(panel: Any, name: str, steps: Sequence[Row], color: str, above: bool) -> None:
    """Losses of training as a line, those of validation as points with some of their values."""
    styles: dict[str, dict[str, Any]] = {
        "loss": {"alpha": 0.4, "linewidth": 0.8},
        "val_loss": {"marker": "o", "markersize": 4, "label": f"{name}: validation"},
    }
    for field, style in styles.items():
        there = [row for row in steps if row[field] is not None]
        bits = [row[field] / math.log(2) for row in there]
        panel.plot([row["step"] for row in there], bits, color=color, **style)
        if field == "loss":
            continue
        every = -(-len(there) // 6)
        for row, value in list(zip(there, bits, strict=True))[::-1][::every]:
            panel.annotate(
                f"{value:.2f}", (row["step"], value), textcoords="offset points",
                xytext=(0, 9 if above else -16), ha="center", color=color,
            )  # fmt: skip
