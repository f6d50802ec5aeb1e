"""Tables of rows in Markdown; runs that differ in the seed alone are one line (`lines`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.page import NONE
from benchmarks.quality.lines import Line, best, lines, name
from benchmarks.rows import Row

TITLES = {
    "name": "method", "block_size": "b", "width": "d", "share": "b/d", "lr": "lr",
    "poetx_lr": "of rotations", "changes": "other than the rest", "trained_share": "trained",
    "planes": "planes", "plane_bytes": "bytes a plane", "rotation_mib": "rotations in all, MiB",
    "gradient_mib": "gradients, MiB", "state_mib": "state, MiB", "tokens_m": "M tokens",
    "seeds": "seeds", "start_loss": "loss at step 0", "val_loss": "loss", "over": "over AdamW",
    "spike": "largest spike", "drift": "spectrum moved",
}  # fmt: skip
"""Column → its heading."""

COLUMNS = (
    "name", "block_size", "lr", "poetx_lr", "changes", "trained_share", "gradient_mib",
    "state_mib", "seeds", "val_loss", "over",
)  # fmt: skip


def changes(row: Row) -> dict[str, Any]:
    """What a run has of its own beside the columns of a table."""
    found = row["config"] | row["options"]
    found |= {key: row[key] for key in ("rank", "restart") if row.get(key) is not None}
    narrow = {key: row.get(key, "float32") for key in ("weights", "gradients")}
    return found | {key: value for key, value in narrow.items() if value != "float32"}


def usual(rows: Iterable[Row]) -> dict[str, Any]:
    """What most runs of `POETXMuon` and `POETXAdamW` among `rows` have: a table says it once."""
    rotated = [row["config"] | row["options"] for row in rows if row["method"] == "poetx"]
    count = Counter((key, json.dumps(value)) for row in rotated for key, value in row.items())
    return {k: json.loads(v) for (k, v), n in count.items() if 2 * n > len(rotated)}


def shown(line: Line, known: Iterable[Line] = (), rest: dict[str, Any] | None = None) -> Row:
    """What a table says of a line, each value as text; `rest` is what `usual` said."""
    row = line.row
    b = row["block_size"]
    over = line.over(known)
    own = changes(row)
    if row["method"] == "poetx":  # what it has not set, where the rest has, is its default
        own = {k: v for k, v in (row.get("resolved") or {}).items() if k in (rest or {})} | own
    unusual = {k: v for k, v in own.items() if (rest or {}).get(k, ()) != v}
    planes = row.get("planes") or None
    a_plane = row.get("plane_bytes")
    spectra = [s["drift"] for s in (row.get("spectra") or {}).values()]
    spikes = [r["spike"] for r in line.rows if r["spike"] is not None]
    return {
        "name": name(row),
        "block_size": "" if b is None else "×".join(map(str, b)) if isinstance(b, list) else str(b),
        "width": str(row["width"]),
        "share": _ratio(b, row["width"]) if isinstance(b, int) else "",
        "lr": f"{row['lr']:g}",
        "poetx_lr": poetx_lr(row),
        "changes": ", ".join(f"{key} {_plain(value)}" for key, value in unusual.items()),
        "trained_share": f"{100 * row['trained'] / row['params']:.0f} %",
        "planes": "" if planes is None else f"{planes:,}",
        "plane_bytes": "" if a_plane is None else f"{a_plane:.1f}",
        "rotation_mib": f"{planes * a_plane / 2**20:.1f}" if planes and a_plane else "",
        "gradient_mib": _mib(row.get("gradient_bytes")),
        "state_mib": _mib(row["state_bytes"]),
        "tokens_m": f"{row['tokens'] / 1e6:.0f}",
        "seeds": ", ".join(map(str, line.seeds)),
        "start_loss": f"{row['validation'][0][1]:.4f}" if row.get("validation") else "",
        "val_loss": "diverged" if line.loss is None else f"{line.loss:.4f}",
        "over": "" if over is None else f"{over + 0.0:+.1f} %",
        "spike": f"{max(spikes):.2f}" if spikes else "",
        "drift": f"{max(spectra):.1f} %" if spectra else "",
    }


def poetx_lr(row: Row) -> str:
    """The peak rate of the rotations; of several, all."""
    rates = {rate: None for group, rate in row["peak_lr"].items() if group.startswith("poetx")}
    return ", ".join(f"{rate:g}" for rate in rates)


ORDERS: dict[str, Callable[[Line], Any]] = {
    "loss": lambda line: (line.loss is None, line.row["width"], line.loss or 0.0),
    "block": lambda line: (*_sizes(line.row), line.loss is None, line.loss or 0.0),
    "plan": lambda line: 0,
}
"""What the lines of a table are sorted by: best first, best of each block size first, as given."""


def markdown(
    rows: Sequence[Row],
    columns: Sequence[str] = COLUMNS,
    known: Sequence[Row] | None = None,
    only_best: bool = False,
    order: str = "loss",
) -> str:
    """A Markdown table; columns that are empty in every line are left out.

    Args:
        known: where AdamW is looked for; `rows` themselves where it is left out.
        only_best: see `best`.
        order: a key of `ORDERS`.
    """
    if not rows:
        return NONE
    references = lines(rows if known is None else known)
    chosen = best(lines(rows)) if only_best else lines(rows)
    rest = usual(line.row for line in chosen)
    chosen.sort(key=ORDERS[order])
    cells = [shown(line, references, rest) for line in chosen]
    kept = [c for c in columns if any(cell[c] for cell in cells)]
    out = ["| " + " | ".join(TITLES[c] for c in kept) + " |", "| --- " * len(kept) + "|"]
    out += ["| " + " | ".join(cell[c] for c in kept) + " |" for cell in cells]
    if rest and "changes" in columns:
        told = ", ".join(f"`{key}={_plain(value)}`" for key, value in rest.items())
        out += ["", f"The rest, of all that rotate: {told}."]
    return "\n".join(out)


def _sizes(row: Row) -> tuple[bool, list[int]]:
    """The block sizes; pairs come last."""
    b = row["block_size"]
    return isinstance(b, list), b if isinstance(b, list) else [b or 0]


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f}"


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _ratio(b: int, width: int) -> str:
    return f"1/{width / b:g}" if b < width else f"{b / width:g}"
