"""The table of what happened to each weight, shared by `prepare` and `explain`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Iterable, Iterator, Sequence

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""A number that is a whole segment of a module's name."""


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One `nn.Linear`, or another weight that is not rotated.

    Attributes:
        name: of the layer; of another weight, its parameter's.
        shape: [out, in] of a layer.
        blocks: number of blocks and their size, of either side.
        status: ``"prepared"`` or ``"skipped"``; of another weight ``"dense"`` or, where it takes no
            gradient, ``"frozen"``.
        reason: of the status.
        is_linear: whether this is an `nn.Linear`.
    """

    name: str
    shape: tuple[int, ...]
    blocks: str
    status: str
    reason: str
    is_linear: bool = True


class PrepareReport:
    """What `prepare` did: iterable rows, and a table when printed.

    Attributes:
        rows: one `LayerRow` for each `nn.Linear`, and for every other weight of two dimensions or
            more, in the model's order.
        trainable: number of trainable parameters after `prepare`, rotations included.
        total: number of parameters of the plain model.
    """

    def __init__(self, rows: Iterable[LayerRow], trainable: int, total: int):
        self.rows = list(rows)
        self.trainable, self.total = trainable, total

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [
            (r.name or "(root)", "x".join(map(str, r.shape)), r.blocks, r.status, r.reason)
            for r in self.rows
        ]
        linears = [r for r in self.rows if r.is_linear]
        prepared = sum(r.status == "prepared" for r in linears)
        others = len(self.rows) - len(linears)
        summary = (
            f"{prepared} of {len(linears)} nn.Linear prepared; "
            + (f"{others} other weight{'s' * (others > 1)}; " if others else "")
            + f"{self.trainable:,} trainable parameters, "
            f"{100 * self.trainable / max(self.total, 1):.1f} % of the plain model's {self.total:,}"
        )
        return (
            format_table(("layer", "shape", "blocks in|out", "status", "reason"), cells)
            + "\n"
            + summary
        )


def format_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Container[int] = ()
) -> str:
    """Columns with a rule under the header; no trailing blanks, plain ASCII.

    Left-aligned, but for those whose numbers are in `right`.
    """
    table = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    table.insert(1, ["-" * width for width in widths])

    def aligned(column: int, cell: str) -> str:
        return cell.rjust(widths[column]) if column in right else cell.ljust(widths[column])

    return "\n".join("  ".join(map(aligned, range(len(row)), row)).rstrip() for row in table)


def compact(names: Iterable[str]) -> list[str]:
    """Names with the numbers of equal ones joined: ``layers.0-3.mlp.up``, ``layers.7.mlp.up``."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        found = _NUMBER.search(name)
        key = (name[: found.start()], name[found.end() :]) if found else (name, "")
        numbers.setdefault(key, set()).update([int(found.group())] if found else [])
    return [f"{start}{_ranges(found)}{rest}" for (start, rest), found in numbers.items()]


def _ranges(numbers: set[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
