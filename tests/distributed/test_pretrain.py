"""examples/pretrain.py under torchrun: the run of one process, over two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import llama
import pretrain
from pretrain import main
from pretraining.checkpoint import load_checkpoint
from pretraining.failure import RunError
from pretraining.metrics import read_rows
from pretraining.processes import Processes
from pretraining.training import Training
from tests.distributed.processes import run

STEPS = 12
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
ARGUMENTS = (
    "--data text.txt --device cpu --seq-len 8 --batch-size 4 --block-size 32 --merge-interval 5 "
    f"--redraw-interval 5 --eval-every 6 --log-every 1 --save-every 4 --eval-batches 2 "
    f"--no-compile --sample-tokens 2 --steps {STEPS}"
).split()


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = " ".join(WORDS[(i * i + i // 7) % 10] for i in range(2000))
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(pretrain, "draw", lambda folder, other=None: None)


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", str(pretrain.__file__), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes share what is there
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def losses(out: str) -> tuple[list[int], torch.Tensor]:
    rows = read_rows(Path(out, "metrics.jsonl"))
    values = [(r["loss"], r["val_loss"] or 0.0, r["max_angle"] or 0.0) for r in rows]
    return [r["step"] for r in rows], torch.tensor(values, dtype=torch.float64)


def assert_same_run(out: str, expected: str) -> None:
    (steps, values), (steps_expected, values_expected) = losses(out), losses(expected)
    assert steps == steps_expected
    assert torch.allclose(values, values_expected, rtol=1e-4, atol=1e-5)


def test_two_processes_go_on_as_one_and_one_as_two(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main([*ARGUMENTS, "--out", "whole"]) == 0

    # One process, killed; two go on with sharded weights, and export.
    step = Training._step

    def killed(self: Training) -> torch.Tensor:
        if self.step == 6:
            raise MemoryError("killed")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", killed)
        with pytest.raises(MemoryError):
            main([*ARGUMENTS, "--out", "sharded"])
    run("going_on", tmp_path, grouped=False)
    assert_same_run("sharded", "whole")
    whole, exported = llama.load("whole/export"), llama.load("sharded/export")
    for (name, weight), other in zip(
        whole.state_dict().items(), exported.state_dict().values(), strict=True
    ):
        assert torch.allclose(weight, other, rtol=1e-3, atol=1e-4), name

    # Two processes from the start, interrupted; one goes on.
    two = torchrun(*ARGUMENTS, "--out", "copies")
    metrics = Path("copies/metrics.jsonl")
    while two.poll() is None and not (metrics.exists() and len(read_rows(metrics)) > 2):
        time.sleep(0.02)
    two.send_signal(signal.SIGINT)
    out, err = two.communicate(timeout=120)
    assert two.returncode != 0, err
    assert out.count("run folder:") == 1  # one process shows what happens
    stopped = load_checkpoint(Path("copies"))["step"]
    assert 3 <= stopped < STEPS
    assert f"stopped at step {stopped}; go on with --out copies --resume" in out
    assert main(["--out", "copies", "--resume"]) == 0
    assert_same_run("copies", "whole")


def test_a_batch_that_does_not_divide_is_refused() -> None:
    assert Processes(rank=1, count=2).part(6) == slice(3, 6)
    with pytest.raises(RunError, match="--batch-size 5 does not divide by 2 processes"):
        Processes(rank=1, count=2).part(5)
