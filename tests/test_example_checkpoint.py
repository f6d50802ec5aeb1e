"""examples/checkpoint.py and files.py: exact, tensors only, whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pretraining.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from pretraining.failure import RunError
from pretraining.files import write_atomically
from pretraining.metrics import MetricsFile, Row, read_rows


def test_a_nested_value_comes_back_exactly(tmp_path: Path):
    value = {
        "model": {
            "a.b": torch.randn(3, 2).t(),
            "scalar": torch.tensor(1.5),
            "empty": torch.empty(0),
        },
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 7: {"step": torch.tensor(4.0)}},
            "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.95), "fused": None}],
        },
        "step": 12,
        "flag": True,
    }
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, value)
    got = load_checkpoint(path)
    assert list(got) == list(value)
    assert got["optimizer"]["param_groups"] == value["optimizer"]["param_groups"]
    assert list(got["optimizer"]["state"]) == [0, 7]
    assert got["step"] == 12
    assert got["flag"] is True
    for name, tensor in value["model"].items():
        assert torch.equal(got["model"][name], tensor)


def test_what_is_no_tensor_and_no_json_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match=r"cannot hold the function at a\.0"):
        save_checkpoint(tmp_path / "c.safetensors", {"a": [lambda: None]})
    assert list(tmp_path.iterdir()) == []


def test_random_state_repeats_the_draws(tmp_path: Path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"random": random_state()})
    expected = torch.rand(4)
    set_random_state(load_checkpoint(path)["random"])
    assert torch.equal(torch.rand(4), expected)


def test_missing_cut_and_foreign_files_are_told_apart(tmp_path: Path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(RunError, match="no checkpoint at"):
        load_checkpoint(path)
    save_checkpoint(path, {"a": torch.ones(100)})
    whole = path.read_bytes()
    for part in (whole[:-8], whole[:20], b""):
        path.write_bytes(part)
        with pytest.raises(RunError, match="is broken"):
            load_checkpoint(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(RunError, match="no checkpoint of this script"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_drop_the_rows_after_a_resumed_step_and_a_cut_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in (1, 2, 3):
        metrics.append(Row(step, 1.0, float("nan"), {"dense": 0.1}, 5.0, 7.0))
    with path.open("a") as handle:
        handle.write('{"step": 4, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    assert [row["step"] for row in MetricsFile(path, 2).rows] == [1, 2]
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    assert read_rows(path)[0]["val_loss"] is None
