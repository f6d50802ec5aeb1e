"""Figures of rows: loss against block size, against learning rate, curves, spectra."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.lines import Line, lines, name
from benchmarks.rows import Row

HIGHEST = 1.4
"""Times the lowest loss: what is higher in the figure of rates is a triangle at the top."""


def draw(rows: Sequence[Row], kind: str, path: Path, known: Sequence[Row] | None = None) -> Path:
    """Draw the figure `kind` (a key of `KINDS`) of `rows` into `path`.

    Args:
        known: rows among which AdamW is looked for; `rows` themselves where it is left out.

    Raises:
        ValueError: no row belongs into it.
    """
    from matplotlib.figure import Figure

    panels, paint = KINDS[kind]
    figure = Figure(figsize=(7.5 if panels == 1 else 11.0, 4.5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    paint(axes, rows, rows if known is None else known)
    if not axes[0].has_data():
        raise ValueError(f"no row for the figure {kind}")
    for panel in axes:
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    where = [" and ".join(sorted({row[key] for row in rows})) for key in ("gpu", "torch", "dtype")]
    figure.suptitle("{}, torch {}, {}".format(*where), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


BLOCK_AXES: dict[str, Callable[[Row], float]] = {
    "block size / width": lambda row: row["block_size"] / row["width"],
    "block size": lambda row: row["block_size"],
    "trained parameters / all, %": lambda row: 100 * row["trained"] / row["params"],
}


def _blocks(axes: Sequence[Any], rows: Sequence[Row], known: Sequence[Row]) -> None:
    """The lowest loss of each width, length and block size over AdamW's, three times.

    The title of a panel says how much of the variance a line over all widths explains.
    """
    references = lines(known)
    found: dict[tuple[float, int], dict[int, tuple[float, Row]]] = {}
    for line in lines(row for row in rows if row["method"] == "poetx"):
        row, over = line.row, line.over(references)
        if isinstance(row["block_size"], int) and over is not None:
            sizes = found.setdefault((row["tokens"], row["width"]), {})
            lowest, _ = sizes.get(row["block_size"], (over, row))
            if over <= lowest:
                sizes[row["block_size"]] = over, row
    for panel, (axis, key) in zip(axes, BLOCK_AXES.items(), strict=True):
        every: list[tuple[float, float]] = []
        for (tokens, width), sizes in sorted(found.items()):
            points = sorted((key(row), over) for over, row in sizes.values())
            label = f"d = {width}, {tokens / 1e6:.0f}M tokens"
            panel.plot(*zip(*points, strict=True), marker="o", label=label)
            every += points
        panel.axhline(0, color="tab:gray", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
        panel.set_xlabel(axis)
        if (share := _explained(every)) is not None:
            panel.set_title(f"R² of a line: {share:.2f}", fontsize=9)
    axes[0].set_ylabel("validation loss over tuned AdamW's, %")


def _rates(axes: Sequence[Any], rows: Sequence[Row], known: Sequence[Row]) -> None:
    """A line for each method: the loss against the rate, and both over the method's best.

    A triangle at the top is a loss beyond the panel, a cross is one that diverged.
    """
    losses = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    top = HIGHEST * min(losses, default=1.0)
    marks = "osD^vPX*<>"
    for number, label in enumerate(sorted({_label(row) for row in rows})):
        style = {"color": f"C{number}", "marker": marks[number % len(marks)], "label": label}
        line = lines(row for row in rows if _label(row) == label)
        points = _lowest(line, lambda row: row["lr"], lambda x: x.loss)
        if not points:
            continue
        best_lr, best = min(points, key=lambda point: point[1])
        scaled = [(lr / best_lr, 100 * (loss / best - 1)) for lr, loss in points]
        for panel, drawn, limit in ((axes[0], points, top), (axes[1], scaled, 100 * (HIGHEST - 1))):
            inside = [point for point in drawn if point[1] <= limit]
            panel.plot(*zip(*inside, strict=True), **style)
            beyond = [x for x, loss in drawn if loss > limit]
            panel.plot(beyond, [limit] * len(beyond), "^", color=style["color"], fillstyle="none")
        lost = [x.row["lr"] for x in line if x.loss is None]
        axes[0].plot(lost, [top] * len(lost), "x", color=style["color"])
    for panel in axes:
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
    axes[0].set_xlabel("learning rate (of all that is not rotated)")
    axes[0].set_ylabel("validation loss, nats a byte")
    axes[1].set_xlabel("learning rate / the method's best")
    axes[1].set_ylabel("loss over the method's lowest, %")


def _curves(axes: Sequence[Any], rows: Sequence[Row], known: Sequence[Row]) -> None:
    """The training loss of each row against the tokens."""
    for row in rows:
        a_step = row["batch_size"] * row["seq_len"]
        points = [(step * a_step / 1e6, loss) for step, loss in row["curve"]]
        axes[0].plot(*zip(*points, strict=True), label=f"{_label(row)}, lr {row['lr']:g}")
    axes[0].set_yscale("log")
    axes[0].set_xlabel("million tokens")
    axes[0].set_ylabel("training loss, nats a byte")


def _spectra(axes: Sequence[Any], rows: Sequence[Row], known: Sequence[Row]) -> None:
    """Singular values of the watched weights at the start (dashed) and the end of each row."""
    rows = [row for row in rows if row["spectra"]]
    for number, row in enumerate(rows):
        for panel, (weight, spectrum) in zip(axes, row["spectra"].items(), strict=True):
            share = [i / (len(spectrum["end"]) - 1) for i in range(len(spectrum["end"]))]
            panel.plot(share, spectrum["start"], color=f"C{number}", linestyle="--", linewidth=0.8)
            panel.plot(share, spectrum["end"], color=f"C{number}", label=_label(row))
            panel.set_title(weight, fontsize=9)
    for panel in axes:
        panel.set_yscale("log")
        panel.set_xlabel("rank of the singular value, share")
    axes[0].set_ylabel("singular value; dashed: at the start")


KINDS: dict[str, tuple[int, Callable[[Sequence[Any], Sequence[Row], Sequence[Row]], None]]] = {
    "blocks": (3, _blocks),
    "rates": (2, _rates),
    "curves": (1, _curves),
    "spectra": (2, _spectra),
}
"""Kind → the number of panels, and what paints them."""


def _lowest(
    given: Iterable[Line], key: Callable[[Row], float], loss: Callable[[Line], float | None]
) -> list[tuple[float, float]]:
    """(key, lowest loss there), ascending."""
    found: dict[float, float] = {}
    for line in given:
        if (here := loss(line)) is not None:
            found[key(line.row)] = min(here, found.get(key(line.row), here))
    return sorted(found.items())


def _explained(points: Sequence[tuple[float, float]]) -> float | None:
    """R² of a line through (log x, y); ``None`` for fewer than four points."""
    import numpy

    if len(points) < 4:
        return None
    x, y = numpy.log([p[0] for p in points]), numpy.array([p[1] for p in points])
    return float(numpy.corrcoef(x, y)[0, 1] ** 2)


def _label(row: Row) -> str:
    """What a line of the figure of rates shares."""
    block = "" if row["block_size"] is None else f" b={row['block_size']}"
    return f"{name(row)}{block}{'' if row['weights'] == 'float32' else ', bf16'}"
