"""What the tests of the benchmarks share: tiny settings, and the check of a file of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import machine, rows

CPU = torch.device("cpu")
FAST = ("--warmup-ms", "0", "--rep-ms", "1", "--rounds", "1")
_ENVIRONMENT = {"gpu", "torch", "triton", "dtype"}


def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ceilings of the CPU be measured by little work."""
    monkeypatch.setitem(machine._COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(machine._PRODUCT_SIZE, "cpu", 32)


def read_back(folder: Path, name: str, found: list[rows.Row], keys: set[str]) -> None:
    """The rows are what the file holds, and have the keys, with times that are times."""
    assert rows.read(folder / f"{name}-cpu.json") == found
    for row in found:
        assert _ENVIRONMENT | keys <= set(row)
        assert row["ms"] > 0
        assert row["ratio"] > 0
