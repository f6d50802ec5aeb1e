"""The table of what happened to each `nn.Linear`, shared by `prepare` and `explain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One `nn.Linear`: its name, shape [out, in], blocks, status and the reason of the status."""

    name: str
    shape: tuple[int, int]
    blocks: str
    status: str
    reason: str


class PrepareReport:
    """What `prepare` did: iterable rows, and a table when printed.

    Attributes:
        rows: one `LayerRow` for each `nn.Linear`, in the model's order.
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
            (r.name or "(root)", f"{r.shape[0]}x{r.shape[1]}", r.blocks, r.status, r.reason)
            for r in self.rows
        ]
        prepared = sum(r.status == "prepared" for r in self.rows)
        summary = (
            f"{prepared} of {len(self.rows)} nn.Linear prepared; "
            f"{self.trainable:,} trainable parameters, "
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
