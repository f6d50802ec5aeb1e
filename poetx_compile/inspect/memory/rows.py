"""What `estimate` gives back: a row for each way to train, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from poetx_compile.config import POETXConfig
from poetx_compile.inspect.memory.fit import Batches, Peak, budget_for, in_units, usable
from poetx_compile.layers.tables import format_table, html_table


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One way to train the model; all sizes in bytes.

    Attributes:
        method: ``"nn.Linear"``, or ``"POET-X fast"`` and the like.
        optimizer: name of its class.
        trained: number of trained parameters.
        weights: parameters, trained or frozen, and buffers.
        gradients: of the trained parameters.
        optimizer_state: moments and step counters.
        activations: what the forward keeps for the backward.
        peak: the most that is allocated at any time of a step.
        peak_in: ``"forward"``, ``"backward"`` or ``"optimizer step"``.
        fits: whether the peak is within what a GPU has for tensors, where its memory was given.
        largest_batch: the largest batch that is, where the inputs were made here.
    """

    method: str
    optimizer: str
    trained: int
    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    peak: int
    peak_in: str
    fits: bool | None = None
    largest_batch: int | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Estimate:
    """What `estimate` found; prints as a table.

    Attributes:
        model: name of the model's class.
        inputs: shapes and dtypes of the example inputs.
        rows: plain AdamW first, then a row for each variant.
        traced: how the activations were found: the whole model, or fewer layers of it.
        config: the configuration of POET-X.
        gpu_memory: of the GPU it is to fit on, in bytes, where it was given.
        advice: what to do where it does not.
    """

    model: str
    inputs: tuple[str, ...]
    rows: tuple[MemoryRow, ...]
    traced: str
    config: POETXConfig
    gpu_memory: int | None = None
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, sizes in bytes."""
        return dataclasses.asdict(self) | {"config": self.config.to_dict()}

    def __repr__(self) -> str:
        peaks = ", ".join(f"{row.method} {_size(row.peak)}" for row in self.rows)
        return f"<Estimate of {self.model}: {peaks}>"

    def _repr_html_(self) -> str:
        header, cells = self._table()
        return html_table("\n".join([self._title(), *self._verdict()]), header, cells)

    def __str__(self) -> str:
        header, cells = self._table()
        table = format_table(header, cells, right=range(1, len(header)))
        return "\n".join([self._title(), table, *self._verdict(), f"activations: {self.traced}"])

    def _title(self) -> str:
        return f"{self.model}, {', '.join(self.inputs)}, block size {self.config.block_size}"

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        names = ("weights", "gradients", "optimizer_state", "activations", "peak")
        sizes = [getattr(row, name) for name in names for row in self.rows]
        unit, numbers = in_units(sizes)
        cells = [("optimizer", *(row.optimizer for row in self.rows))]
        for i, name in enumerate(names):
            of_rows = numbers[i * len(self.rows) : (i + 1) * len(self.rows)]
            cells.append((name.replace("_", " "), *of_rows))
        cells.append(("peak in", *(row.peak_in for row in self.rows)))
        dense = self.rows[0].peak
        cells.append(("peak / dense", *(f"{row.peak / dense:.2f}" for row in self.rows)))
        cells.append(("trained", *(f"{row.trained:,}" for row in self.rows)))
        if self.gpu_memory is not None:
            cells.append(("fits", *("yes" if row.fits else "no" for row in self.rows)))
            if all(row.largest_batch is not None for row in self.rows):
                cells.append(("largest batch", *(f"{row.largest_batch:,}" for row in self.rows)))
        return (unit, *(row.method for row in self.rows)), cells

    def _verdict(self) -> list[str]:
        if self.gpu_memory is None:
            return []
        limit = usable(self.gpu_memory)
        return [
            f"fits: {_size(limit)} of the GPU's {_size(self.gpu_memory)}, less its context and "
            f"fragments. {self.advice}".rstrip()
        ]


def _size(size: int) -> str:
    unit, (text,) = in_units([size])
    return f"{text} {unit}"


def judged(
    found: Estimate,
    peaks: list[Peak],
    batch: int | None,
    at: Callable[[int], list[Peak]],
    checkpointing: bool,
) -> Estimate:
    """With what fits: the rows, and what to do. A batch of ``None``: no other can be tried."""
    assert found.gpu_memory is not None
    limit = usable(found.gpu_memory)
    rows = [dataclasses.replace(row, fits=row.peak <= limit) for row in found.rows]
    if batch is not None:
        sizes = [Batches({batch: peak}) for peak in peaks]
        # Where it is to go, folds and rotations do not grow as activations do: look there.
        there = max((size.largest(limit) for size in sizes[1:]), default=0)
        if 0 < there != batch:
            for size, peak in zip(sizes[1:], at(there), strict=True):
                size.measured = dict(sorted((size.measured | {there: peak}).items()))
        rows = [
            dataclasses.replace(row, largest_batch=size.largest(limit))
            for row, size in zip(rows, sizes, strict=True)
        ]
    advice = _advice(rows, peaks, limit, checkpointing)
    return dataclasses.replace(found, rows=tuple(rows), advice=advice)


def _advice(rows: list[MemoryRow], peaks: list[Peak], limit: int, checkpointing: bool) -> str:
    ours = dict(zip((row.method for row in rows[1:]), peaks[1:], strict=True))
    fast, mem = ours.get("POET-X fast"), ours.get("POET-X mem")
    if all(row.fits for row in rows[1:]):
        return ""
    if fast is not None and mem is not None and (budget := budget_for(limit, fast, mem)):
        return f"As asked it needs memory_budget={budget:g}, or variant='mem'."
    if fitting := [row for row in rows[1:] if row.fits]:
        return f"As asked it needs {fitting[0].method}."
    smaller = max((row.largest_batch or 0 for row in rows), default=0)
    hints = [f"a batch of {smaller}"] if smaller else []
    hints += [] if checkpointing else ["checkpointing=True (--checkpointing)"]
    hints.append("a smaller block_size, or more GPUs with FSDP2")
    return f"As asked it does not: use {', '.join(hints)}."
