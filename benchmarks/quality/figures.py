"""Figures of rows: loss against block size, against learning rate, curves, spectra."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.results import shown
from benchmarks.rows import Row

_DENSE = "tab:gray"


def draw(rows: Sequence[Row], kind: str, path: Path) -> Path:
    """Draw the figure `kind` (a key of `KINDS`) of `rows` into `path`.

    Raises:
        ValueError: no row belongs into it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    KINDS[kind](axes, [row for row in rows if row["val_loss"] is not None or kind == "rates"])
    if not axes.has_data():
        raise ValueError(f"no row for the figure {kind}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.suptitle(f"{rows[0]['gpu']}, torch {rows[0]['torch']}, {rows[0]['dtype']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _blocks(axes: Any, rows: Sequence[Row]) -> None:
    """For each width the lowest loss at each b/d, over that of dense AdamW at this width."""
    for number, width in enumerate(sorted({row["width"] for row in rows})):
        here = [row for row in rows if row["width"] == width]
        dense = [r["val_loss"] for r in here if _name(r) == "dense adamw"]
        rotated = [r for r in here if r["method"] == "poetx" and isinstance(r["block_size"], int)]
        if not dense or not rotated:
            continue
        best = _lowest(rotated, lambda r: r["block_size"] / r["width"])
        losses = [100 * (loss / min(dense) - 1) for _, loss in best]
        colour = f"C{number}"
        axes.plot([x for x, _ in best], losses, marker="o", color=colour, label=f"d = {width}")
    axes.axhline(0, color=_DENSE, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("block size / width")
    axes.set_ylabel("validation loss over tuned AdamW's, %")


def _rates(axes: Any, rows: Sequence[Row]) -> None:
    """A line for each method: loss against the learning rate; a cross at the top: diverged."""
    finite = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    top = 1.02 * max(finite, default=1.0)
    for number, name in enumerate(sorted({_line(row) for row in rows})):
        line = [row for row in rows if _line(row) == name]
        best = _lowest([r for r in line if r["val_loss"] is not None], lambda r: r["lr"])
        colour = f"C{number}"
        axes.plot(*zip(*best, strict=True), marker="o", color=colour, label=name) if best else None
        lost = [row["lr"] for row in line if row["val_loss"] is None]
        axes.plot(lost, [top] * len(lost), marker="x", linestyle="", color=colour)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss, nats a byte")


def _curves(axes: Any, rows: Sequence[Row]) -> None:
    """The training loss of each row against the tokens."""
    for row in rows:
        a_step = row["batch_size"] * row["seq_len"]
        points = [(step * a_step / 1e6, loss) for step, loss in row["curve"]]
        axes.plot(*zip(*points, strict=True), label=_full(row))
    axes.set_yscale("log")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("training loss, nats a byte")


def _spectra(axes: Any, rows: Sequence[Row]) -> None:
    """Singular values of the first watched weight at the start (dashed) and the end of each row."""
    for number, row in enumerate(rows):
        _, spectrum = next(iter(row["spectra"].items()))
        share = [i / (len(spectrum["end"]) - 1) for i in range(len(spectrum["end"]))]
        colour = f"C{number}"
        axes.plot(share, spectrum["start"], color=colour, linestyle="--", linewidth=0.8)
        label = f"{_full(row)}: drift {spectrum['drift']:.1f} %"
        axes.plot(share, spectrum["end"], color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("rank of the singular value, share")
    axes.set_ylabel("singular value")


KINDS: dict[str, Callable[[Any, Sequence[Row]], None]] = {
    "blocks": _blocks,
    "rates": _rates,
    "curves": _curves,
    "spectra": _spectra,
}


def _lowest(rows: Iterable[Row], key: Callable[[Row], float]) -> list[tuple[float, float]]:
    """(key, lowest loss there), ascending."""
    found: dict[float, float] = {}
    for row in rows:
        found[key(row)] = min(row["val_loss"], found.get(key(row), float("inf")))
    return sorted(found.items())


def _name(row: Row) -> str:
    return f"{row['method']} {row['optimizer']}"


def _line(row: Row) -> str:
    """What a line of the figure of rates shares."""
    block = "" if row["block_size"] is None else f" b={row['block_size']}"
    weights = "" if row["weights"] == "float32" else f", {row['weights']}"
    return f"{_name(row)}{block}{weights}"


def _full(row: Row) -> str:
    cells = shown(row)
    block = f" b={cells['block_size']}" if cells["block_size"] else ""
    changes = f" ({cells['changes']})" if cells["changes"] else ""
    return f"{_name(row)}{block} lr {cells['lr']}{changes}: {cells['val_loss']}"
