"""`benchmarks.memory` at a tiny size on the CPU: rows, the queue, tables, the page."""

from __future__ import annotations

import dataclasses
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llama
from benchmarks.gate import GateError
from benchmarks.memory import __main__ as command
from benchmarks.memory import estimates, figures, goals, methods, queue, results, tables, worker
from benchmarks.memory.cases import IN_BACKWARD, Case, of_row
from benchmarks.memory.methods import Trained
from benchmarks.memory.plans import ADAMW, LEAN, PLANS, at, merged, stored
from benchmarks.options import end_cleanly
from benchmarks.rows import Row, write

PLACE = worker.Place(device="cpu", stage="eager", warmup=0, steps=1, vocabulary=32)


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llama.PRESETS, "tiny", llama._shape(32, 48, 2, 2))


def tiny(case: Case, **fields: Any) -> Case:
    (small,) = at([case], model="tiny", seq=8, **fields)
    return small


def row_of(case: Case, **values: Any) -> Row:
    """A row as a worker writes it."""
    row: Row = {"gpu": "A card", "torch": "2", "triton": None, "dtype": "bfloat16"}
    row |= dataclasses.asdict(case) | dict.fromkeys(worker.MEASURED)
    row |= {"cap_gib": 80.0, "oom_in": None, "gives_up": ""}
    return row | values


# --- one case -------------------------------------------------------------------------------------


def test_a_row_says_what_was_trained_and_its_bytes() -> None:
    torch._dynamo.reset()
    case = tiny(merged(8, variant="mem", turn_every=2), checkpointing=True, loss_chunk=3)
    row = worker.work(case, dataclasses.replace(PLACE, checkpoint=True))
    assert of_row(row) == case
    assert set(worker.MEASURED) < set(row)
    assert row["tokens_per_s"] == pytest.approx(8e3 / row["ms"])
    assert row["last_loss"] < row["first_loss"]
    planes = 2 * ((4 * 8 + 3 * 4 + 3 * 6) * 28)  # blocks of 8: 28 planes
    dense = 2 * 32 * 32 + 5 * 32
    assert row["gradients_gib"] == 2 * (planes + dense) / 2**30
    scales = 4 * 2 * (4 * 8 + 3 * 4 + 3 * 6)  # a byte a plane, and one scale a block
    counters = 4 * 7
    assert row["state_gib"] == (planes + scales + 2 * 2 * dense + counters) / 2**30


def test_a_step_in_the_backward_leaves_no_gradient() -> None:
    torch._dynamo.reset()
    row = worker.work(tiny(ADAMW, method=IN_BACKWARD), PLACE)
    assert (row["gradients_gib"], row["merge_ms"]) == (0, 0)
    assert row["gives_up"] == "accumulation, clipping, DDP"
    assert row["last_loss"] < row["first_loss"]


def test_there_is_no_row_where_compiled_code_ignores_rotations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    built: list[Trained] = []

    def build(*arguments: Any) -> Trained:
        trained = methods.build(*arguments)
        forward, built[:] = trained.forward, [trained]
        # Of a width of 32: so that what the layers do shows in the loss, as it does of 4096.
        trained.model.embed_tokens.weight.data.mul_(0.02)
        trained.model.lm_head.weight.data.mul_(30)

        def without_rotations(*batch: Tensor) -> Tensor:
            stored = [p.data for n, p in trained.model.named_parameters() if "skew" in n]
            shown = [skew.clone() for skew in stored]
            if max(float(skew.abs().max()) for skew in shown) < 0.02 or not torch.is_grad_enabled():
                return forward(*batch)
            torch._foreach_zero_(stored)
            loss = forward(*batch)
            torch._foreach_copy_(stored, shown)
            return loss

        trained.forward = without_rotations
        return trained

    monkeypatch.setattr(worker, "build", build)
    with pytest.raises(GateError, match="compiled model"):
        worker.work(tiny(stored(8)), PLACE)
    skews = [p for n, p in built[0].model.named_parameters() if "skew" in n]
    assert not any(skew.any() for skew in skews)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_a_full_gpu_is_a_row_and_no_other_error_is(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(worker, "build", full)
    row = worker.work(tiny(ADAMW), PLACE)
    assert (row["oom_in"], row["peak_gib"], row["tokens_per_s"]) == ("prepare", None, None)
    error.args = ("something else",)
    if not isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(RuntimeError, match="something else"):
            worker.work(tiny(ADAMW), PLACE)


# --- the queue ------------------------------------------------------------------------------------

FAKE = """
    import faulthandler, json, signal, sys, time
    faulthandler.register(signal.SIGUSR1)
    task = json.loads(sys.argv[1])
    case = task["case"]
    if case["optimizer"] == "adafactor":
        sys.exit("it broke")
    if case["optimizer"] == "muon" and case["method"] == "dense":
        time.sleep(60)
    row = case | {"oom_in": None, "peak_gib": 1.0, "tokens_per_s": 2.0, "gpu": "A card"}
    row["layers"] = task["place"]["layers"]
    with open(sys.argv[2], "w") as output:
        json.dump([row], output)
"""


def test_the_queue_skips_what_is_known_and_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE), encoding="utf-8")
    monkeypatch.setattr(queue, "WORKER", (sys.executable, "-S", str(script)))
    monkeypatch.setattr(queue, "POLL_S", 0.01)
    broken = dataclasses.replace(ADAMW, optimizer="adafactor")
    endless = dataclasses.replace(ADAMW, optimizer="muon")
    cases = [ADAMW, broken, merged(256), merged(256), endless]
    found: list[Row] = []
    known = [row_of(ADAMW)]
    made = queue.Queue(cases, PLACE, ("",), tmp_path / "work", known, found.append, case_s=1.0)
    made.compile(limit_s=0.2)
    assert not made.run()
    assert [of_row(row) for row in found] == [merged(256)]
    assert found[0]["layers"] is None
    assert made.failed == [broken, endless]
    said = capsys.readouterr().err
    assert "compiled for" in said
    assert "did not compile\nit broke" in said
    assert "it broke" in said.split("compiled for")[1]
    assert "most recent call first" in said  # where the endless one was
    late = queue.Queue([endless], PLACE, ("",), tmp_path / "work")
    assert not late.run(limit_s=0.05)
    assert "time is up: 1 to do" in capsys.readouterr().err


def test_sigterm_ends_a_queue_as_an_interrupt_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        end_cleanly()
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_rows_of_one_gpu_replace_those_of_the_same_case(tmp_path: Path) -> None:
    for peak in (1.0, 2.0):
        results.save(tmp_path, row_of(ADAMW, peak_gib=peak))
    results.save(tmp_path, row_of(merged(256), peak_gib=3.0))
    rows = results.all_rows(tmp_path)
    assert [row["peak_gib"] for row in rows] == [2.0, 3.0]
    assert results.selected(rows, ["targets", "forms"], "8b", 1024) == rows
    assert results.selected(rows, ["targets"], "3b") == []


def test_no_plan_has_a_case_twice() -> None:
    for name, cases in PLANS.items():
        assert len(set(cases)) == len(cases), name
        assert len({queue.named(case) for case in cases}) == len(cases), name


# --- tables, the figure, the page, estimates ------------------------------------------------------


def test_a_table_compares_with_adamw_and_says_what_does_not_fit(tmp_path: Path) -> None:
    rows = [
        row_of(ADAMW, peak_gib=60.5, tokens_per_s=8000.0),
        row_of(merged(256), peak_gib=21.25, tokens_per_s=8800.0),
        row_of(dataclasses.replace(ADAMW, weights="float32"), oom_in="first step"),
    ]
    text = tables.markdown(rows)
    assert "| POET-X merged, b = 256, int8 momentum, bf16 gradients | 21.2 | 8,800 | 1.10 |" in text
    assert "| AdamW, fp32 | does not fit |  |  |" in text
    assert text.endswith("A card, torch 2, at most 80 GiB.")
    assert tables.markdown([]) == tables.NONE
    assert "oom: first step" in tables.plain(rows)
    assert figures.draw(rows, rows, tmp_path / "memory.png").stat().st_size > 0
    with pytest.raises(ValueError, match="no row"):
        figures.draw(rows[2:], rows, tmp_path / "none.png")


def test_goals_are_met_or_missed_by_the_rows() -> None:
    cases = [merged(256), merged(512), merged(1024)]
    rows = [row_of(ADAMW, peak_gib=60.5, tokens_per_s=100.0)]
    rows += [row_of(case, peak_gib=22.0, tokens_per_s=90.0) for case in cases[:2]]
    asked = [(cases[0], 22.0, 0.9), (cases[0], 21.9, 0.91), (cases[1], 22.5, None)]
    asked += [(cases[2], 22.0, None), (cases[1], 22.0, 0.9)]
    rows[2]["tokens_per_s"] = 89.9
    text = goals.markdown(rows, [goals.Goal("it", *one) for one in asked])
    assert text.splitlines()[2:] == [
        "| it | ≤ 22 GiB, ≥ 0.9 | 22.00 GiB, 0.90 | met |",
        "| it | ≤ 21.9 GiB, ≥ 0.91 | 22.00 GiB, 0.90 | missed: memory, speed |",
        "| it | ≤ 22.5 GiB | 22.00 GiB, 0.90 | met |",
        "| it | ≤ 22 GiB | | not measured |",
        "| it | ≤ 22 GiB, ≥ 0.9 | 22.00 GiB, 0.899 | missed: speed |",
    ]


def test_names_in_the_figure_leave_out_what_all_have() -> None:
    cases = [ADAMW, merged(256, turn_every=2), stored(256, "mem", **LEAN)]
    names = ["AdamW", "POET-X merged, b = 256", "POET-X mem, b = 256"]
    assert figures.short_names(cases) == names
    told_apart = figures.short_names([*cases, merged(256, "float32")])
    assert told_apart[1] == "POET-X merged, b = 256, int8 momentum"
    told_apart = figures.short_names([*cases, merged(256, turn_every=4)])
    assert told_apart[1] == "POET-X merged, b = 256, turned every 2 steps"


def test_the_losses_of_a_run_are_drawn(tmp_path: Path) -> None:
    run = {"gpu": "A card", "model": "Llama", "run": "poetx", "batch": 1, "length": 8}
    rows: list[Row] = [
        run | {"killed_at": 2, "checkpoint": 1},
        *(run | {"step": i, "loss": 1.0, "val_loss": 2.0 if i == 2 else None} for i in (1, 2)),
    ]
    write(tmp_path / "run.json", rows)
    picture = tmp_path / "loss.png"
    assert command.main(["curve", str(tmp_path / "run.json"), "--output", str(picture)]) == 0
    assert picture.stat().st_size > 0
    with pytest.raises(ValueError, match="no row"):
        figures.curve(rows[:1], picture)


def test_the_commands_read_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = row_of(ADAMW, peak_gib=60.5, tokens_per_s=8000.0)
    write(tmp_path / "memory-a-card.json", [row])
    folder = ["--results", str(tmp_path)]
    assert command.main(["plan", "targets", *folder]) == 0
    assert "8b x 1024, AdamW: 60.50 GiB, 8000 tokens/s" in capsys.readouterr().out
    assert command.main(["table", "targets", "--columns", "name,peak_gib", *folder]) == 0
    assert "| AdamW | 60.5 |" in capsys.readouterr().out


def test_estimates_are_held_to_the_measured_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30

    @dataclasses.dataclass
    class Estimated:
        weights: int = 15 * gib
        gradients: int = gib
        optimizer_state: int = gib
        activations: int = 5 * gib
        peak: int = 21 * gib

    monkeypatch.setattr(estimates, "estimated", lambda case: Estimated())
    parts = {"weights_gib": 15.0, "gradients_gib": 1.0, "state_gib": 1.0, "activations_gib": 5.0}
    cases = [merged(256), merged(512)]
    rows = [
        row_of(case, **parts, peak_gib=peak, tokens_per_s=1.0)
        for case, peak in zip(cases, (20.5, 24.0), strict=True)
    ]
    other = dataclasses.replace(ADAMW, optimizer="muon")
    rows.append(row_of(other, peak_gib=1.0, tokens_per_s=1.0))
    lines = estimates.compared([*cases, merged(1024), other], rows)
    errors = [line["error, %"] for line in lines]
    assert errors == [pytest.approx(100 / 41), pytest.approx(-12.5), None]
    assert estimates.missed(lines) == lines[1:2]
    assert "POET-X merged" in estimates.table(lines)
    assert not estimates.estimable(dataclasses.replace(ADAMW, method=IN_BACKWARD))
    assert estimates.estimable(stored(256, **LEAN))
    assert not estimates.estimable(dataclasses.replace(ADAMW, compile="graphs"))


def test_the_page_of_memory_has_the_tables_of_the_rows() -> None:
    text = command.PAGE.path.read_text(encoding="utf-8")
    assert command.PAGE.filled(text) == text, "run python -m benchmarks.memory page"
    assert command.PAGE.commands(text)
