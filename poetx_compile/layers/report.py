"""The table of what happened to each weight, shared by `prepare` and `explain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from poetx_compile.layers.tables import (
    folded_rows,
    format_table,
    html_table,
    wrapped_lines,
    wrapped_table,
)
from poetx_compile.layers.trained import Trained


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

    Printed, it has the share that trains through rotations first, and one row for all layers that
    are alike (``layers.0-31.mlp.up_proj``); `text` has every layer.

    Attributes:
        rows: one `LayerRow` for each `nn.Linear`, and for every other weight of two dimensions or
            more, in the model's order.
        trained: a `Trained`: how much of the model trains, and how.
        merged: whether the layers have the merged form (``merge_interval=1``).
        stored_bytes: that an int8 weight takes on average, and a dense one would
            (``base="int8"``); ``None`` where the weights are dense.
    """

    def __init__(
        self,
        rows: Iterable[LayerRow],
        trained: Trained,
        merged: bool = False,
        stored_bytes: tuple[float, float] | None = None,
    ):
        self.rows = list(rows)
        self.trained = trained
        self.merged = merged
        self.stored_bytes = stored_bytes

    @property
    def trainable(self) -> int:
        """The number of trainable parameters after `prepare`, rotations included."""
        return self.trained.trainable

    @property
    def total(self) -> int:
        """The number of parameters of the plain model."""
        return self.trained.total

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        t = self.trained
        return (
            f"<PrepareReport: {t.layers} of {t.linears} nn.Linear, {t.share:.1f} % of {t.total:,}>"
        )

    def _repr_html_(self) -> str:
        return html_table(self._summary(), _HEADER, self._folded())

    def text(self, verbose: bool = False) -> str:
        """The table that `print` shows; with `verbose` every layer has a row."""
        if not verbose:
            lead = wrapped_lines(self._summary())
            return f"{lead}\n{wrapped_table(_HEADER, self._folded())}"
        cells = [
            (r.name or "(root)", _sizes(r.shape), r.blocks, r.status, r.reason) for r in self.rows
        ]
        header = ("layer", "shape", "blocks in|out", "status", "reason")
        return f"{self._summary()}\n{format_table(header, cells)}"

    def _summary(self) -> str:
        lines = [str(self.trained), *([_MERGED] if self.merged else [])]
        if self.stored_bytes is not None:
            int8, dense = self.stored_bytes
            lines.append(
                f"base='int8': a frozen weight takes {int8:.2f} bytes in place of {dense:g}"
            )
        return "\n".join(lines)

    def _folded(self) -> list[tuple[str, ...]]:
        cells = [(r.name or "(root)", _sizes(r.shape), _what(r)) for r in self.rows]
        return folded_rows(cells)


_MERGED = "merge_interval=1: the weights stay plain, and each step turns them"
_HEADER = ("layer", "shape", "blocks in|out, or why not")


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _what(row: LayerRow) -> str:
    """The blocks of a layer that is prepared, the reason of any other."""
    if row.status != "prepared":
        return row.reason or row.status
    return f"{row.blocks}; {row.reason}" if row.reason else row.blocks
