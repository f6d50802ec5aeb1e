"""Tables of rows in Markdown, and as plain text for a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.memory.cases import DENSE, GIVES_UP, label, of_row
from benchmarks.page import NONE
from benchmarks.rows import Row
from benchmarks.rows import table as ascii_table

TITLES = {
    "name": "trained by", "model": "model", "seq": "sequence", "peak_gib": "peak, GiB",
    "ratio": "tokens/s, AdamW = 1", "tokens_per_s": "tokens/s", "ms": "ms a step",
    "gives_up": "gives up", "weights_gib": "weights", "gradients_gib": "gradients",
    "state_gib": "state", "activations_gib": "activations", "rest_gib": "peak less the three",
    "reserved_gib": "reserved", "prepare_peak_gib": "building", "forward_peak_gib": "forward",
    "backward_peak_gib": "backward", "step_peak_gib": "step", "merge_peak_gib": "merge",
    "save_peak_gib": "saving", "load_peak_gib": "resuming", "gpu": "GPU",
}  # fmt: skip
"""Column → its heading."""

COLUMNS = ("name", "peak_gib", "tokens_per_s", "ratio", "gives_up")


def key(row: Row) -> tuple[Any, ...]:
    """What tells the rows of one GPU apart."""
    return of_row(row).key()


def is_measured(row: Row) -> bool:
    """Whether a row came to its end, on a device that counts its memory."""
    return row["tokens_per_s"] is not None and row["peak_gib"] is not None


def ratio(row: Row, known: Sequence[Row]) -> float | None:
    """Tokens/s over those of AdamW in bf16, of the same model, sequence and GPU."""
    if row["tokens_per_s"] is None:
        return None
    alike = ("gpu", "torch", "model", "seq")
    for other in known:
        case = of_row(other)
        plain = case.method == DENSE and case.optimizer == "adamw" and case.weights == "bfloat16"
        plain = plain and not case.checkpointing and case.compile == row["compile"]
        if plain and other["tokens_per_s"] and all(other[k] == row[k] for k in alike):
            return row["tokens_per_s"] / other["tokens_per_s"]
    return None


def markdown(
    rows: Sequence[Row], columns: Sequence[str] = COLUMNS, known: Sequence[Row] | None = None
) -> str:
    """A Markdown table; what all rows share is said below it.

    Args:
        known: where AdamW is looked for; `rows` themselves where it is left out.
    """
    if not rows:
        return NONE
    cells = [_cells(row, columns, rows if known is None else known) for row in rows]
    used = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    lines = [[TITLES[columns[i]] for i in used], ["---"] * len(used)]
    lines += [[line[i] for i in used] for line in cells]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{_machine(rows)}"


def _machine(rows: Sequence[Row]) -> str:
    """What the rows were measured on."""
    found = dict.fromkeys(
        f"{row['gpu']}, torch {row['torch']}"
        + (f", triton {row['triton']}" if row["triton"] else "")
        + (f", at most {row['cap_gib']:.0f} GiB" if row["cap_gib"] else "")
        for row in rows
    )
    return f"{'; '.join(found)}."


def plain(rows: Sequence[Row]) -> str:
    """A table for the end of a run, in as few columns as say what came of it."""
    columns = ("case", "peak", "reserved", "rest", "tok/s", "ratio", "first_s")
    shown = [
        {
            "case": f"{row['model']} {row['seq']} {label(of_row(row))}",
            "peak": f"oom: {row['oom_in']}" if row["oom_in"] else row["peak_gib"],
            "reserved": row["reserved_gib"],
            "rest": row["rest_gib"],
            "tok/s": row["tokens_per_s"],
            "ratio": ratio(row, rows),
            "first_s": row["first_step_s"],
        }
        for row in rows
    ]
    return ascii_table(shown, columns)


def _cells(row: Row, columns: Sequence[str], known: Sequence[Row]) -> list[str]:
    return [_cell(row, column, known) for column in columns]


def _cell(row: Row, column: str, known: Sequence[Row]) -> str:
    special: dict[str, Callable[[], str]] = {
        "name": lambda: label(of_row(row)),
        "ratio": lambda: _number(ratio(row, known)),
        "gives_up": lambda: GIVES_UP if row["gives_up"] else "",
        "tokens_per_s": lambda: "" if row["oom_in"] else f"{row['tokens_per_s']:,.0f}",
        "peak_gib": lambda: "does not fit" if row["oom_in"] else _number(row["peak_gib"]),
    }
    if column in special:
        return special[column]()
    value = row[column]
    return _number(value) if isinstance(value, float) else "" if value is None else str(value)


def _number(value: float | None) -> str:
    """Two digits behind the point, of less than ten; else one."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 9.995 else f"{value:,.1f}"
