"""`save_checkpoint` and `load_checkpoint`, and runs that are killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.errors import CheckpointError, IncompatibleStateError
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.state import files
from poetx_compile.state.files import write_atomically
from tests.helpers import kill
from tests.helpers.models import MLP, TinyLM
from tests.helpers.training import train_step

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where every scenario of `tests.helpers.kill` has been run, killed and resumed."""
    root = tmp_path_factory.mktemp("kill")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "examples")}
    command = [sys.executable, "-m", "tests.helpers.kill", str(root)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


def rows(folder: Path) -> dict[int, set[float]]:
    """Every loss that was noted for a step; a resumed run notes some steps again."""
    losses: dict[int, set[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        losses.setdefault(row["step"], set()).add(row["loss"])
    return losses


def assert_same(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}.{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize("name", kill.SCENARIOS)
def test_killed_and_resumed_is_the_uninterrupted_run_bit_for_bit(runs: Path, name: str) -> None:
    codes = json.loads((runs / "codes.json").read_text())[name]
    assert codes == [0, -signal.SIGKILL, 0]
    whole, cut = kill.folders(runs, name)
    assert rows(cut) == rows(whole)
    assert list(rows(whole)) == list(range(1, kill.STEPS + 1))
    saved = [torch.load(folder / kill.FILE, weights_only=True) for folder in (whole, cut)]
    assert_same(*saved)
    assert ".tmp" not in "".join(os.listdir(cut))


def test_the_scenarios_are_what_they_say(runs: Path) -> None:
    """Merges happen before and after the kill, and the state compared has them behind it."""
    for name, scenario in kill.SCENARIOS.items():
        state = torch.load(kill.folders(runs, name)[0] / kill.FILE, weights_only=True)
        weights = state[1] if isinstance(state, list) else state["model"]
        draws = {int(v[2]) for k, v in weights.items() if k.endswith("layout")}
        assert draws == {3}, name
        assert sum(k.endswith("layout") for k in weights) == kill.LAYERS, name
        assert scenario.call > 1


# The helper


def trained(block_size: int = 4, optimizer_class: Any = poetx.POETXAdamW) -> tuple[nn.Module, Any]:
    model = MLP()
    config = poetx.POETXConfig(block_size=block_size, merge_interval=2, redraw_interval=2)
    optimizer = optimizer_class(model, lr=1e-3, poetx_lr=1e-3, config=config)
    for _ in range(3):
        model(torch.randn(5, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_everything_comes_back_exactly(tmp_path: Path) -> None:
    model, optimizer = trained()
    extra = {
        "step": 3,
        "rate": 0.1 + 0.2,
        "flag": True,
        "nothing": None,
        "rng": torch.get_rng_state(),
        "nested": {"list": [1, (2.0, "three")], 7: torch.randn(3, 2).t()},
    }
    poetx.save_checkpoint(
        tmp_path / "c.pt", torch.compile(model, backend="eager"), optimizer, **extra
    )
    other, other_optimizer = trained()
    assert_same(poetx.load_checkpoint(tmp_path / "c.pt", other, other_optimizer), extra)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert_same(other_optimizer.state_dict(), optimizer.state_dict())
    assert_same(poetx.load_checkpoint(tmp_path / "c.pt"), extra)
    assert os.listdir(tmp_path) == ["c.pt"]
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert not any("_orig_mod" in key for key in saved["model"])


def test_what_is_no_tensor_and_no_plain_value_is_refused(tmp_path: Path) -> None:
    model, _ = trained()
    with pytest.raises(TypeError, match=r"cannot hold the function at extra\.a\.0"):
        poetx.save_checkpoint(tmp_path / "c.pt", model, a=[lambda: None])
    with pytest.raises(TypeError, match=r"cannot hold the key \(1,\) at extra\.a"):
        poetx.save_checkpoint(tmp_path / "c.pt", model, a={(1,): 0})
    assert not os.listdir(tmp_path)


def test_missing_cut_and_foreign_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    model, optimizer = trained()
    with pytest.raises(FileNotFoundError):
        poetx.load_checkpoint(path, model)
    poetx.save_checkpoint(path, model)
    with pytest.raises(CheckpointError, match="holds no state of an optimiser"):
        poetx.load_checkpoint(path, model, optimizer)
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:20], b""):
        path.write_bytes(part)
        with pytest.raises(CheckpointError, match="is broken, or no checkpoint"):
            poetx.load_checkpoint(path, model)
    torch.save(model.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"was not written by poetx_compile\.save_checkpoint"):
        poetx.load_checkpoint(path, model)


@pytest.mark.parametrize("part", [0.3, 0.5, 0.9, 0.999])
def test_a_file_cut_off_anywhere_is_a_broken_checkpoint(tmp_path: Path, part: float) -> None:
    path = tmp_path / "checkpoint.pt"
    poetx.save_checkpoint(path, nn.Linear(64, 64))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(CheckpointError, match="is broken, or no checkpoint"):
        poetx.load_checkpoint(path)


def test_a_checkpoint_of_another_block_size_is_refused_and_nothing_is_loaded(
    tmp_path: Path,
) -> None:
    saved, optimizer = trained(block_size=8)
    poetx.save_checkpoint(tmp_path / "c.pt", saved, optimizer)
    model, other = trained(block_size=4)
    before, state = [p.clone() for p in model.parameters()], other.state_dict()
    message = r"block_size \(8, 8\) was saved, the model has \(4, 4\)"
    with pytest.raises(IncompatibleStateError, match=message):
        poetx.load_checkpoint(tmp_path / "c.pt", model, other)
    with pytest.raises(IncompatibleStateError, match="saved at block size 8, group 'poetx b=4'"):
        other.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, model.parameters(), before))
    assert_same(other.state_dict(), state)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_killed_runs_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".file.1.tmp", tmp_path / ".file.2.tmp"
    for path in (dead, alive):
        path.touch()
    os.utime(dead, (files._STARTED - 60,) * 2)
    write_atomically(tmp_path / "file", lambda temporary: temporary.write_text("new"))
    assert sorted(os.listdir(tmp_path)) == [".file.2.tmp", "file"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_files_resume_in_one_process(tmp_path: Path) -> None:
    """torch.distributed.checkpoint to disk and back, from another model and optimiser."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def build(seed: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(seed)
        model = TinyLM(layers=1)
        config = poetx.POETXConfig(block_size=8, merge_interval=3, redraw_interval=3)
        return model, poetx.POETXMuon(model, lr=1e-3, config=config)

    stop = 4
    model, optimizer = build(1)
    for i in range(stop):
        train_step(model, optimizer, i)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)

    resumed, other = build(2)
    weights, state = get_state_dict(resumed, other)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=tmp_path)
    # It has read the file into the model's own tensors: the model knows that this is not all.
    with pytest.raises(IncompatibleStateError, match=r"has to be given to model\.load_state_dict"):
        resumed(torch.zeros(1, 2, dtype=torch.int64))
    set_state_dict(
        resumed, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    for i in range(stop, 7):
        assert train_step(resumed, other, i) == train_step(model, optimizer, i)
    assert {e.draw for _, _, e in prepared_linears(resumed)} == {3}
    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))
