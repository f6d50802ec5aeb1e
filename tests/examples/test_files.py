"""examples/pretraining: metrics.jsonl, and the state of the generators."""

from __future__ import annotations

from pathlib import Path

import torch

from pretraining.checkpoint import random_state, set_random_state
from pretraining.metrics import MetricsFile, Row, read_rows


def test_random_state_repeats_the_draws():
    state = random_state()
    expected = torch.rand(4)
    set_random_state(state)
    assert torch.equal(torch.rand(4), expected)


def test_metrics_drop_the_rows_after_a_resumed_step_and_a_cut_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in (1, 2, 3):
        metrics.append(Row(step, 1.0, 1.0, float("nan"), {"dense": 0.1}, 5.0, 7.0))
    with path.open("a") as handle:
        handle.write('{"step": 4, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    assert [row["step"] for row in MetricsFile(path, 2).rows] == [1, 2]
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    assert read_rows(path)[0]["val_loss"] is None
