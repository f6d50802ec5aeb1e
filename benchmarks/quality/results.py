"""Rows of plans in ``benchmarks/results/quality-<plan>.json``, and tables of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.quality.settings import Settings
from benchmarks.rows import RESULTS, Row, read, write

PREFIX = "quality-"

COLUMNS = (
    "method", "optimizer", "block_size", "width", "lr", "poetx_lr", "changes", "trained_share",
    "state_mib", "tokens_m", "seed", "val_loss", "spike",
)  # fmt: skip


def path(folder: Path, plan: str) -> Path:
    """Where the rows of a plan are."""
    return folder / f"{PREFIX}{Path(plan).stem}.json"


def all_rows(folders: Iterable[Path]) -> list[Row]:
    """The rows of every plan in some folders; of a run that is there twice, the last one."""
    files = (f for folder in folders for f in sorted(folder.glob(f"{PREFIX}*.json")))
    return list({row["run"]: row for file in files for row in read(file)}.values())


def save(folder: Path, plans: dict[str, list[Settings]], rows: dict[str, Row]) -> None:
    """Write the rows of each plan, in its order."""
    for plan, runs in plans.items():
        if found := [rows[run.run] for run in runs if run.run in rows]:
            write(path(folder, plan), found)


def load(plan: str, folder: Path = RESULTS) -> list[Row]:
    """The rows of a plan, or of a file of rows."""
    return read(Path(plan) if plan.endswith(".json") else path(folder, plan))


def shown(row: Row, reference: float | None = None) -> dict[str, str]:
    """What a table says of a row, each value as text; the loss over `reference` in per cent."""
    changes = [*row["config"].items(), *row["options"].items()]
    changes += [(n, row[n]) for n in ("rank", "restart", "layers") if row.get(n) is not None]
    changes += [("weights", row["weights"])] if row["weights"] != "float32" else []
    loss = "diverged" if row["diverged"] else f"{row['val_loss']:.4f}"
    if reference is not None and not row["diverged"]:
        loss += f" ({100 * (row['val_loss'] / reference - 1):+.1f} %)"
    b = row["block_size"]
    rates = row["peak_lr"].items()
    return {
        "method": row["method"],
        "optimizer": row["optimizer"],
        "block_size": "" if b is None else "×".join(map(str, b)) if isinstance(b, list) else str(b),
        "width": str(row["width"]),
        "lr": f"{row['lr']:g}",
        "poetx_lr": ", ".join(f"{rate:g}" for name, rate in rates if name.startswith("poetx")),
        "changes": ", ".join(f"{name} {value}" for name, value in changes),
        "trained_share": f"{100 * row['trained'] / row['params']:.0f} %",
        "state_mib": f"{row['state_bytes'] / 2**20:.1f}",
        "tokens_m": f"{row['tokens'] / 1e6:.0f}",
        "seed": str(row["seed"]),
        "val_loss": loss,
        "spike": "" if row["spike"] is None else f"{row['spike']:.2f}",
    }


def reference_loss(rows: Sequence[Row]) -> float | None:
    """The lowest loss of dense AdamW among the rows; ``None`` where it is not there."""
    losses = [
        row["val_loss"]
        for row in rows
        if (row["method"], row["optimizer"]) == ("dense", "adamw") and not row["diverged"]
    ]
    return min(losses, default=None)


def markdown(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """A Markdown table, best first; columns that are empty in every row are left out."""
    reference = reference_loss(rows)
    ordered = sorted(rows, key=lambda r: (r["diverged"], r["val_loss"] or 0.0))
    cells = [shown(row, reference) for row in ordered]
    kept = [c for c in columns if any(cell[c] for cell in cells)]
    lines = [
        "| " + " | ".join(c.replace("_", " ") for c in kept) + " |",
        "| --- " * len(kept) + "|",
    ]
    lines += ["| " + " | ".join(cell[c] for c in kept) + " |" for cell in cells]
    return "\n".join(lines)
