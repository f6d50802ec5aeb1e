"""Figures of the results of `benchmarks.layers`: the ratio over a trained `nn.Linear`.

``<results>-tokens.png`` shows it against the number of tokens, ``<results>-blocks.png`` against the
block size, a panel for each shape. Dotted: the floor of the schedule over that of `nn.Linear`, at
the ceilings measured in the run. Dashed grey: FLOPs alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import positive
from benchmarks.rows import Row, read

_LINE = ("variant", "formulation", "permutation")
_SHAPE = ("in_features", "out_features")


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Draw both figures of a file of results; returns where they are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path, help="benchmarks/results/layers-<gpu>.json")
    parser.add_argument("--output", type=Path, help="folder; default that of the results")
    parser.add_argument("--block-size", type=positive, default=256, help="of the first figure")
    parser.add_argument("--tokens", type=positive, default=8192, help="of the second figure")
    args = parser.parse_args(arguments)
    rows = read(args.results)
    folder = args.output or args.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "tokens": ratio_figure(rows, "tokens", "block_size", args.block_size),
        "blocks": ratio_figure(rows, "block_size", "tokens", args.tokens),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{args.results.stem}-{name}.png")
        figure.savefig(paths[-1], dpi=130)
        print(paths[-1])
    return paths


def ratio_figure(rows: Sequence[Row], axis: str, fixed: str, value: int) -> Any:
    """Ratio over the column `axis` where the column `fixed` has `value`; a panel for each shape.

    Where some shapes were measured at several values of `axis`, the others are left out.

    Raises:
        ValueError: no row has that value.
    """
    from matplotlib.figure import Figure

    chosen = [row for row in rows if row[fixed] == value]
    if not chosen:
        there = sorted({row[fixed] for row in rows})
        raise ValueError(f"no row with {fixed} = {value}; there are {there}")
    measured: dict[tuple[Any, ...], set[Any]] = {}
    for row in chosen:
        measured.setdefault(_key(row, _SHAPE), set()).add(row[axis])
    shapes = sorted(shape for shape, at in measured.items() if len(at) > 1) or sorted(measured)
    chosen = [row for row in chosen if _key(row, _SHAPE) in shapes]
    figure = Figure(figsize=(4.5 * len(shapes), 4.2), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
    lines = sorted({_key(row, _LINE) for row in chosen})
    for panel, shape in zip(panels, shapes, strict=True):
        _draw(panel, [row for row in chosen if _key(row, _SHAPE) == shape], axis, lines)
        panel.set_title(f"{shape[0]} → {shape[1]}")
        panel.set_xlabel(axis.replace("_", " "))
    panels[0].set_ylabel("forward + backward, nn.Linear = 1")
    # The axis is shared: its upper end is that of all panels.
    panels[0].set_ylim(0, 1.05 * max(1.0, *(row["ratio"] for row in chosen)))
    labels = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    panels[0].legend(labels.values(), labels.keys(), fontsize="small")
    first = chosen[0]
    graphs = ", CUDA graphs" if first["cuda_graphs"] else ""
    figure.suptitle(
        f"{first['gpu']}, torch {first['torch']}, {first['dtype']}, "
        f"{fixed.replace('_', ' ')} {value}{graphs}"
    )
    return figure


def _draw(panel: Any, rows: Sequence[Row], axis: str, lines: Sequence[tuple[Any, ...]]) -> None:
    """One line for each (variant, formulation, permutation), its floor in the same colour."""
    for key in sorted({_key(row, _LINE) for row in rows}):
        line = sorted((r for r in rows if _key(r, _LINE) == key), key=lambda r: r[axis])
        x, colour = [row[axis] for row in line], f"C{lines.index(key)}"
        panel.plot(x, [r["ratio"] for r in line], color=colour, marker="o", label=", ".join(key))
        if all("floor_ratio" in row for row in line):  # a peer's rows have no floor
            panel.plot(x, [r["floor_ratio"] for r in line], color=colour, linestyle=":")
            panel.plot(x, [r["flop_ratio"] for r in line], color="grey", linestyle="--", lw=0.8)
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set_xscale("log", base=2)
    ticks = sorted({row[axis] for row in rows})
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def _key(row: Row, columns: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[column] for column in columns)


if __name__ == "__main__":
    main()
