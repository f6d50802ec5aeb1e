"""`benchmarks.step` at a tiny size on the CPU: rows, what it refuses, and what gets no row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    gate,
    rows,
    step,
    step_worker,
)
from tests.helpers.benchmarks import read_back, small_machine


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    small_machine(monkeypatch)


STEP = (
    *("--device", "cpu", "--presets", "tiny", "--vocabulary", "32", "--batch", "1"),
    *("--length", "8", "--block-sizes", "32", "--permutations", "random", "--variants", "fast"),
    *("--stage", "eager", "--warmup", "0", "--steps", "1", "--rounds", "1", "--lr", "1e-3"),
)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without a process of their own: seconds faster."""

    def run(case: step_worker.StepCase) -> rows.Row:
        torch._dynamo.reset()
        return step_worker.run(case)

    monkeypatch.setattr(step, "in_process", run)


@pytest.mark.usefixtures("in_this_process")
def test_step(tmp_path: Path) -> None:
    found = step.main([*STEP, "--output", str(tmp_path), "--merge-interval", "10"])
    keys = {"method", "tokens", "block_size", "variant", "formulation", "tokens_per_s"}
    keys |= {"linear_ms", "first_step_s", "weights_mib", "gradients_mib", "optimizer_mib"}
    keys |= {"activations_mib", "peak_mib", "merge_ms", "merge_share", "early_merges", "loss_error"}
    keys |= {"speed_ratio", "first_step_ratio", "peak_ratio"}
    read_back(tmp_path, "step", found, keys)
    dense, ours = found
    assert (dense["method"], dense["block_size"], dense["ratio"]) == ("dense", None, 1.0)
    assert (ours["method"], ours["block_size"]) == ("poetx", 32)
    assert ours["linear_ms"] == dense["ms"]
    assert ours["ms"] == pytest.approx(ours["step_ms"] + ours["merge_ms"] / 10)
    # Two blocks of 4 projections (128 → 128) and 3 of 128 and 384, embedding, head, 5 norms.
    weights = 2 * (4 * 128 * 128 + 3 * 128 * 384)
    rest = 2 * 32 * 128 + 5 * 128
    assert dense["gradients_mib"] == (weights + rest) * 4 / 2**20
    sides = 2 * (4 * (128 + 128) + 3 * (128 + 384)) // 32
    assert ours["gradients_mib"] == (sides * (32 * 31 // 2) + rest) * 4 / 2**20
    assert ours["optimizer_mib"] < 0.5 * dense["optimizer_mib"]


@pytest.mark.usefixtures("in_this_process")
def test_step_of_the_merged_form(tmp_path: Path) -> None:
    arguments = ["--merge-interval", "1", "--optimizers", "muon", "--gains", "rows"]
    arguments += ["--layers", "1", "--by-layer"]
    arguments += ["--turn-every", "1,2", "--output", str(tmp_path)]
    dense, ours, one = step.main([*STEP, *arguments])
    assert (dense["turn_every"], ours["turn_every"], one["turn_every"]) == (None, 1, 2)
    assert (dense["merge_interval"], ours["merge_interval"], ours["merge_ms"]) == (None, 1, 0)
    assert (dense["gains"], ours["gains"]) == (None, "rows")
    assert (ours["layers"], ours["by_layer"]) == (1, True)
    assert ours["ms"] == ours["step_ms"]
    assert ours["gradients_mib"] < 0.6 * dense["gradients_mib"]


@pytest.mark.usefixtures("in_this_process")
def test_step_accumulates_with_folded_weights_kept_or_not(tmp_path: Path) -> None:
    more = [
        "--layers",
        "1",
        "--formulations",
        "folded",
        "--accumulation",
        "2",
        "--keep-folded",
        "call,step",
    ]
    dense, made_anew, kept = step.main([*STEP, *more, "--output", str(tmp_path)])
    tokens = 2 * 8
    assert [row["tokens"] for row in (dense, made_anew, kept)] == [tokens] * 3
    assert [row["keep_folded"] for row in (dense, made_anew, kept)] == [None, "call", "step"]
    assert kept["tokens_per_s"] == pytest.approx(1e3 * tokens / kept["ms"])
    assert kept["last_loss"] == pytest.approx(made_anew["last_loss"], rel=1e-4)


@pytest.mark.usefixtures("in_this_process")
def test_step_has_a_row_for_each_memory_budget(tmp_path: Path) -> None:
    arguments = [*STEP, "--layers", "1", "--stage", "aot_eager", "--output", str(tmp_path)]
    rows = step.main([*arguments, "--memory-budgets", "0.8"])
    asked = [(row["variant"], row["memory_budget"]) for row in rows]
    assert asked == [(None, None), ("fast", None), ("fast", 0.8)]
    arguments += ["--variants", "mem,fast", "--memory-budgets", "0.9,0.8"]
    cases = [c for c in step.cases(step._parser().parse_args(arguments)) if c.method == "poetx"]
    asked = [(case.variant, case.memory_budget) for case in cases]
    assert asked == [("mem", None), ("fast", None), ("fast", 0.9), ("fast", 0.8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cuda-graphs"], "--cuda-graphs needs --stage inductor"),
        (["--optimizers", "sgd,muon"], "--optimizers sgd: use some of adamw,muon"),
        (["--turn-every", "2"], "--turn-every is of POETXMuon"),
        (["--keep-folded", "call,ever"], "--keep-folded ever: use some of call,step"),
        (["--memory-budgets", "0.5,2"], "argument --memory-budgets: invalid list of fraction"),
        (["--memory-budgets", "0.5", "--keep-folded", "step"], "--memory-budgets keep less"),
    ],
)
def test_step_refuses_options_that_cannot_be(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        step.main([*STEP, *arguments])
    assert message in capsys.readouterr().err


def test_a_worker_is_a_process_with_empty_caches(tmp_path: Path) -> None:
    case = step_worker.StepCase(
        method="dense", preset="tiny", vocabulary=8, batch=1, length=4, device="cpu",
        dtype="float32", stage="eager", warmup=0, steps=1, rounds=1, lr=1e-3,
    )  # fmt: skip
    row = step.in_process(case)
    assert row["method"] == "dense"
    assert row["tokens"] == 4


def test_step_has_no_row_where_training_does_not_lower_the_loss() -> None:
    case = step_worker.StepCase(
        method="dense", preset="tiny", vocabulary=8, batch=1, length=4, device="cpu",
        dtype="float32", stage="eager", warmup=0, steps=1, rounds=1, lr=0.0,
    )  # fmt: skip
    with pytest.raises(gate.GateError, match="the loss went from"):
        step_worker.run(case)


def test_step_has_no_row_where_the_compiled_model_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = step_worker.build

    def broken(*arguments: Any) -> step_worker.Trained:
        trained = build(*arguments)
        forward = trained.forward
        trained.forward = lambda *batch: 1.001 * forward(*batch)
        return trained

    monkeypatch.setattr(step_worker, "build", broken)
    case = step_worker.StepCase(
        method="dense", preset="tiny", vocabulary=8, batch=1, length=4, device="cpu",
        dtype="float32", stage="eager", warmup=0, steps=1, rounds=1, lr=1e-3,
    )  # fmt: skip
    with pytest.raises(gate.GateError, match="loss of the compiled model"):
        step_worker.run(case)
