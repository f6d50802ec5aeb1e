"""loss.png and spectrum.png of a run folder, with another run beside it where one is given."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretraining.failure import RunError
from pretraining.files import read_json, write_atomically
from pretraining.metrics import read_rows

_COLOURS = ("tab:blue", "tab:orange")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What the plots read from a run folder.

    Attributes:
        label: the method.
        rows: the rows of metrics.jsonl.
        unigram_bpb: bits per byte without context.
        spectrum: ``layer``, ``before`` and ``after``, which are empty without figures.
    """

    label: str
    rows: list[dict[str, Any]]
    unigram_bpb: float
    spectrum: dict[str, Any]


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder; `RunError` where it is none, or not finished."""
    config, spectrum = read_json(folder / "config.json"), read_json(folder / "spectrum.json")
    rows = read_rows(folder / "metrics.jsonl")
    try:
        run = FinishedRun(config["label"], rows, config["corpus"]["unigram_bpb"], spectrum)
        finished = bool(rows) and rows[-1]["step"] >= config["options"]["steps"]
    except (KeyError, TypeError) as error:
        raise RunError(f"{folder} is no run folder of this script") from error
    if not finished:
        raise RunError(f"the run in {folder} is not finished")
    return run


def draw(folder: Path, other: Path | None = None) -> None:
    """Draw loss.png and spectrum.png into `folder`."""
    runs = [read_run(folder)]
    if other is not None:
        runs.append(read_run(other))
    _save(_loss_figure(runs), folder / "loss.png")
    runs = [run for run in runs if run.spectrum["after"]]  # not those without figures
    if runs:
        _save(_spectrum_figure(runs), folder / "spectrum.png")


def _loss_figure(runs: list[FinishedRun]) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for run, label, colour in zip(runs, _labels(runs), _COLOURS, strict=False):
        _curve(axes, run, "loss", color=colour, alpha=0.45, label=f"{label}: train")
        _curve(axes, run, "val_loss", color=colour, marker="o", label=f"{label}: validation")
    axes.axhline(
        runs[0].unigram_bpb, color="grey", linestyle="--", label="byte frequencies alone (unigram)"
    )
    axes.set(xlabel="optimiser step", ylabel="bits per byte", title="Loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _curve(axes: Axes, run: FinishedRun, field: str, **style: Any) -> None:
    rows = [row for row in run.rows if row[field] is not None]
    axes.plot([r["step"] for r in rows], [r[field] / math.log(2) for r in rows], **style)


def _spectrum_figure(runs: list[FinishedRun]) -> Figure:
    figure, row = plt.subplots(
        1, len(runs), figsize=(6.5 if len(runs) == 1 else 11, 4.5), squeeze=False
    )
    for axes, run, label, colour in zip(row[0], runs, _labels(runs), _COLOURS, strict=False):
        before, after = run.spectrum["before"], run.spectrum["after"]
        index = range(1, len(before) + 1)
        axes.plot(index, after, color=colour, linewidth=2.5, label="after training")
        axes.plot(index, before, color="black", linestyle="--", linewidth=1, label="before")
        drift = mean_drift(before, after)
        axes.set(
            xlabel="index, largest first",
            ylabel="singular value",
            title=f"{label}: mean change {drift:.2g} %",
        )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Singular values of {runs[0].spectrum['layer']}")
    return figure


def mean_drift(before: list[float], after: list[float]) -> float:
    """Σ|σ_after − σ_before| / Σσ_before of two descending spectra, in per cent."""
    return 100 * sum(abs(a - b) for a, b in zip(after, before, strict=True)) / sum(before)


def _labels(runs: list[FinishedRun]) -> list[str]:
    """The runs' methods, told apart where they are the same."""
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        labels = [
            f"{label}, {which}" for label, which in zip(labels, ("this", "other"), strict=True)
        ]
    return labels


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    plt.close(figure)
