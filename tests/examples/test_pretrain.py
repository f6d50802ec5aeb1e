"""examples/pretrain.py end to end, on a model small enough for a test: eager or AOT eager."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llama
import poetx_compile
import pretrain
from pretrain import INTERRUPTED, main
from pretraining.metrics import read_rows
from pretraining.plots import read_run
from pretraining.progress import telling
from pretraining.training import Training

FINAL = re.compile(
    r"final step=(\d+) val_loss=(\d+\.\d{4}) val_bpb=(\d+\.\d{4}) unigram_bpb=(\d+\.\d{4}) "
    r"tokens_per_s=(\d+) trainable=(\d+\.\d)%"
)
FIELDS = {
    "step",
    "last_merge",
    "loss",
    "loss_per_token",
    "val_loss",
    "lr",
    "tokens_per_s",
    "peak_memory_mib",
    "max_angle",
    "orthogonality_error",
}
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 2}
    monkeypatch.setitem(llama.PRESETS, "tiny", shape)
    monkeypatch.chdir(tmp_path)
    text = " ".join(WORDS[(i * i + i // 7) % 10] for i in range(2000))
    (tmp_path / "text.txt").write_text(text)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr(pretrain, "draw", lambda folder, other=None: None)


quick = pytest.mark.usefixtures("no_plots")


def run(out: str, *more: str, code: int = 0, steps: int = 8) -> None:
    arguments = ["--data", "text.txt", "--out", out, "--device", "cpu", "--seq-len", "16"]
    arguments += ["--batch-size", "4", "--block-size", "8", "--steps", str(steps)]
    arguments += ["--eval-every", "4", "--log-every", "1", "--save-every", "4"]
    arguments += ["--eval-batches", "2", "--sample-tokens", "4"]
    if "--stage" not in more:
        arguments.append("--no-compile")
    assert main([*arguments, *more]) == code


def losses(out: str) -> list[tuple[int, float, float | None]]:
    return [(r["step"], r["loss"], r["val_loss"]) for r in read_rows(Path(out, "metrics.jsonl"))]


@pytest.mark.parametrize(
    ("more", "groups"),
    [
        ((), {"dense", "dense no decay", "poetx b=8"}),
        (("--optimizer", "adamw"), {"dense", "dense no decay", "poetx b=8"}),
        (("--method", "adamw"), {"dense"}),
    ],
)
def test_a_run_leaves_a_complete_folder(more: tuple[str, ...], groups: set[str], capsys):
    run("out", *more)
    dense = "--method" in more
    match = FINAL.fullmatch(capsys.readouterr().out.splitlines()[-1])
    assert match is not None
    assert match[1] == "8"
    assert float(match[3]) == pytest.approx(float(match[2]) / 0.693147, abs=2e-4)
    assert (match[6] == "100.0") == dense

    names = {p.name for p in Path("out").iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "spectrum.json",
        "loss.png",
        "spectrum.png",
        "sample.txt",
        "export",
    }
    rows = read_rows(Path("out/metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert set(row) == FIELDS
        assert set(row["lr"]) == groups
        assert row["loss_per_token"] == row["loss"]  # tokens are bytes
        assert row["tokens_per_s"] > 0
        assert row["peak_memory_mib"] > 0
        evaluated = row["step"] % 4 == 0
        assert (row["val_loss"] is not None) == evaluated
        assert (row["last_merge"] is None) == dense
        assert (row["max_angle"] is not None) == (evaluated and not dense)
        assert (row["orthogonality_error"] is not None) == (evaluated and not dense)
    assert rows[-1]["lr"]["dense"] == pytest.approx(3e-5)
    if not dense:
        assert 0 < rows[-1]["max_angle"] < 0.25
        assert 0 <= rows[-1]["orthogonality_error"] < 0.01
    for picture in ("loss.png", "spectrum.png"):
        assert Path("out", picture).read_bytes().startswith(b"\x89PNG")


@quick
def test_the_loss_falls_below_the_unigram_entropy(capsys):
    run("out", steps=80)
    out = capsys.readouterr().out
    match = FINAL.fullmatch(out.splitlines()[-1])
    assert match is not None
    assert float(match[3]) < 0.9 * float(match[4])
    assert "% below" in out.splitlines()[-2]


def test_poetx_keeps_the_spectrum_and_dense_training_does_not():
    run("poetx", steps=30)
    run("dense", "--method", "adamw", "--compare", "poetx", steps=30)
    moved = {}
    for name in ("poetx", "dense"):
        spectrum = json.loads(Path(name, "spectrum.json").read_text())
        before, after = torch.tensor(spectrum["before"]), torch.tensor(spectrum["after"])
        moved[name] = float((after - before).abs().sum() / before.sum())
    # Until it is merged a rotation of order 3 shrinks a plane by θ⁴, here at most 0.25⁴ a side.
    assert moved["poetx"] < 0.01
    assert moved["dense"] > 0.05


AS_8B = "--tokenizer bpe --vocab-size 300 --dtype bfloat16 --merge-interval 1 --momentum-dtype int8"
AS_8B += " --loss-chunk 20 --deterministic --no-figures"


@quick
@pytest.mark.parametrize(
    "options",
    [
        "--merge-interval 3",
        "--merge-interval 3 --optimizer adamw",
        "--method adamw",
        AS_8B,
    ],
)
def test_resume_continues_bit_for_bit(options: str, monkeypatch: pytest.MonkeyPatch):
    more = options.split()
    run("whole", *more, steps=12)

    step = Training._step

    def killed(self: Training) -> torch.Tensor:
        if self.step == 6:
            raise MemoryError("killed")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", killed)
        with pytest.raises(MemoryError):
            run("cut", *more, steps=12)
    assert losses("cut")[-1][0] == 6  # two rows past the checkpoint of step 4
    assert main(["--out", "cut", "--resume"]) == 0
    assert losses("cut") == losses("whole")
    whole, cut = (torch.load(Path(n, "checkpoint.pt"), weights_only=True) for n in ("whole", "cut"))
    assert whole["extra"]["position"] == cut["extra"]["position"] == 12 * 4
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, cut["model"][name]), name
    kept = ["sample.txt", *(["tokenizer.json"] if "bpe" in more else [])]
    for name in kept:
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes()


@quick
def test_a_tokenizer_is_trained_once_and_losses_per_byte_compare(monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoTokenizer

    run("out", "--tokenizer", "bpe", "--vocab-size", "400", "--seq-len", "8")
    rows = read_rows(Path("out/metrics.jsonl"))
    ratios = [row["loss_per_token"] / row["loss"] for row in rows]  # bytes a token
    assert min(ratios) > 2
    assert max(ratios) < 8
    assert rows[-1]["val_loss"] < 0.6 * rows[-1]["loss_per_token"]
    tokenizer = AutoTokenizer.from_pretrained("out/export")
    text = "alpha βeta\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    monkeypatch.setattr(pretrain, "train_bpe", None)
    assert main(["--out", "out", "--resume", "--steps", "9"]) == 0
    Path("out/tokenizer.json").write_text("{}")
    assert main(["--out", "out", "--resume", "--steps", "10"]) == 2


@quick
def test_what_is_saved_is_the_model_and_no_copy_of_it(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}
    monkeypatch.setattr(pretrain, "save_checkpoint", lambda _, state: seen.update(state))
    window = Training._window

    def spy(self: Training, *rest: Any) -> Any:
        seen["training"] = self
        return window(self, *rest)

    monkeypatch.setattr(Training, "_window", spy)
    run("out", steps=1)
    model = seen["training"].method.model
    held = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert {t.data_ptr() for t in seen["model"].values()} <= held


@quick
def test_out_of_memory_is_told_with_what_is_needed(monkeypatch: pytest.MonkeyPatch, capsys):
    def full(self: Training) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(Training, "_step", full)
    run("out", "--method", "adamw", code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory in step 1: AdamW needs " in error
    assert "use a smaller --batch-size" in error
    failure = json.loads(Path("out/failure.json").read_text())
    assert failure["step"] == 0
    weights, gradients, state = (failure[f"{n}_gib"] for n in ("weights", "gradients", "state"))
    assert gradients < weights < 1.1 * gradients  # and the rotary table
    assert state == 2 * gradients


@quick
def test_interrupt_saves_and_resume_goes_on(monkeypatch: pytest.MonkeyPatch, capsys):
    run("whole")
    step = Training._step

    def interrupted(self: Training) -> torch.Tensor:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", interrupted)
        run("cut", code=INTERRUPTED)
    assert "stopped at step 3; go on with --out cut --resume" in capsys.readouterr().out
    assert main(["--out", "cut", "--resume"]) == 0
    assert losses("cut") == losses("whole")


@quick
def test_interrupted_while_it_compiles_it_leaves_nothing_half_made(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
):
    run("whole", "--stage", "eager", steps=4)
    before = snapshot(".")
    resume = ["--out", "whole", "--resume", "--steps", "8"]
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_loss", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        run("cut", "--stage", "eager", code=INTERRUPTED)
        assert main(resume) == INTERRUPTED
    assert "nothing was trained: cut is gone again" in capsys.readouterr().err
    assert not Path("cut").exists()
    assert snapshot(".") == before


def test_both_methods_by_one_command_in_one_picture(monkeypatch: pytest.MonkeyPatch, capsys):
    drawn: list[tuple[str, str | None]] = []
    monkeypatch.setattr(
        pretrain, "draw", lambda at, other=None: drawn.append((str(at), other and str(other)))
    )
    run("out", "--method", "both", steps=4)
    assert drawn == [("out/adamw", None), ("out/poetx", "out/adamw")]
    assert read_run(Path("out/poetx")).label != read_run(Path("out/adamw")).label
    run("out", "--method", "both", "--resume", code=2)
    assert "--resume and --compare go with one of its two runs" in capsys.readouterr().err


@quick
def test_tensorboard_has_the_rows_of_the_metrics():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("out", "--tensorboard", steps=6)
    assert main(["--out", "out", "--resume", "--steps", "8"]) == 0
    board = EventAccumulator("out/tensorboard").Reload()
    rows = read_rows(Path("out/metrics.jsonl"))
    seen = [(event.step, event.value) for event in board.Scalars("loss")]
    assert seen == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    assert [e.step for e in board.Scalars("val_loss")] == [4, 6, 8]
    assert {"lr/dense", "lr/poetx b=8", "tokens_per_s"} <= set(board.Tags()["scalars"])


def test_a_line_tells_how_long_it_has_been_going_on(capsys):
    with telling("compiling", every=0.01):
        time.sleep(0.1)
    assert capsys.readouterr().err.startswith("compiling: 0 s\ncompiling: 0 s\n")


@quick
def test_compiled_through_the_backend_as_in_eager(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(llama.PRESETS["tiny"], "num_layers", 2)
    run("eager", "--permutation", "chunked")
    run("compiled", "--stage", "aot_eager", "--permutation", "chunked")
    run("blocks", "--stage", "aot_eager", "--permutation", "chunked", "--compile-by", "block")
    for compiled in ("compiled", "blocks"):
        for (_, a, _), (_, b, _) in zip(losses("eager"), losses(compiled), strict=True):
            assert a == pytest.approx(b, rel=1e-4)


@quick
def test_activation_checkpointing_and_mem_variant_train_alike():
    run("plain")
    run("mem", "--stage", "aot_eager", "--variant", "mem", "--activation-checkpointing")
    for (_, a, _), (_, b, _) in zip(losses("plain"), losses("mem"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@quick
@pytest.mark.parametrize("options", ["autocast", "bfloat16", "bfloat16 --base int8"])
def test_bfloat16_trains_and_resumes(options: str):
    run("out", *f"--dtype {options}".split())
    assert losses("out")[-1][1] < losses("out")[0][1]
    assert main(["--out", "out", "--resume", "--steps", "10"]) == 0
    assert losses("out")[-1][0] == 10


@quick
@pytest.mark.parametrize("method", ["poetx", "adamw"])
def test_export_is_a_plain_model_with_the_same_loss(method: str, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}
    evaluate = Training.evaluate

    def spy(self: Training) -> float:
        seen["training"] = self
        return evaluate(self)

    monkeypatch.setattr(Training, "evaluate", spy)
    run("out", "--method", method, "--merge-interval", "3")
    training = seen["training"]
    trained = training.val_loss

    model = llama.load("out/export")
    names = set(llama.Llama(model.config).state_dict())
    assert set(model.state_dict()) == names
    assert not any("parametrizations" in name or "_orig_mod" in name for name in names)
    training.method = type(training.method)("", model, model, training.method.optimizer, 100.0)
    assert evaluate(training) == pytest.approx(trained, rel=1e-5)


@quick
def test_the_export_loads_without_the_package():
    run("out", steps=2)
    script = (
        "import sys; sys.modules['poetx_compile'] = None\n"
        "import llama, torch\n"
        "model = llama.load('out/export')\n"
        "assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 256)\n"
    )
    path = os.path.dirname(llama.__file__)
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def snapshot(folder: str) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0: use a whole number of at least 1"),
        (["--lr", "nan"], "--lr nan: use a number above 0"),
        (["--block-size", "1"], "--block-size 1: use a whole number of at least 2"),
        (["--vocab-size", "100"], "--vocab-size 100: use a whole number of at least 256"),
        (["--device", "toaster"], "--device toaster"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--gpu-memory", "much"], "gpu_memory = 'much' is not allowed: use a size such as"),
        (["--cuda-graphs", "--device", "cpu"], "--cuda-graphs needs a CUDA device"),
        (["--gpu-memory", "80GB", "--device", "cpu"], "--gpu-memory caps a CUDA device"),
        (["--data", "text.txt", "--tokenizer", "bpe", "--vocab-size", "256"], "at least 258"),
        (["--optimizer", "adamw", "--momentum-dtype", "int8"], "--momentum-dtype is of"),
        (["--optimizer", "adamw", "--turn-every", "2"], "--turn-every is of"),
        (["--data", "gone.txt"], "cannot read gone.txt"),
        (["--data", "empty.txt"], "empty.txt is empty"),
        (["--data", "text.txt", "--seq-len", "100000"], "smaller --seq-len"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "gone"], "cannot read gone/config.json"),
        (["--compare", "gone"], "cannot read gone/config.json"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(
    arguments: list[str], message: str, capsys, tmp_path: Path
):
    Path("empty.txt").touch()
    before = snapshot(".")
    assert main([*arguments, "--no-compile"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert snapshot(".") == before
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} <= {"inductor", "triton"}


@pytest.mark.parametrize(
    "arguments", [["--steps", "many"], ["--preset", "huge"], ["--unknown"], ["--method", "sgd"]]
)
def test_the_parser_refuses_in_one_line(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@quick
def test_an_existing_run_is_never_overwritten(capsys):
    run("out")
    before = snapshot("out")
    run("out", code=2)
    assert "out exists already: --resume goes on with it" in capsys.readouterr().err
    assert main(["--out", "out", "--resume"]) == 2
    assert "finished at step 8: give a larger --steps" in capsys.readouterr().err
    assert main(["--out", "out", "--resume", "--steps", "9", "--lr", "1"]) == 2
    assert "started with --lr 0.003, not 1.0" in capsys.readouterr().err
    assert snapshot("out") == before


@quick
def test_resume_refuses_a_broken_checkpoint_and_other_data(capsys):
    run("out")
    path = Path("out/checkpoint.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    before = snapshot("out")
    assert main(["--out", "out", "--resume", "--steps", "9"]) == 2
    assert "checkpoint.pt is broken" in capsys.readouterr().err
    assert snapshot("out") == before

    path.write_bytes(whole)
    Path("text.txt").write_text("something else entirely " * 200)
    before = snapshot("out")
    assert main(["--out", "out", "--resume", "--steps", "9"]) == 2
    assert "the data is not the data" in capsys.readouterr().err
    assert snapshot("out") == before


def test_a_diverged_run_stops_and_keeps_its_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys):
    step = Training._step
    monkeypatch.setattr(
        Training, "_step", lambda self: step(self) * (float("nan") if self.step > 5 else 1.0)
    )
    run("out", code=2)
    assert "the loss is not finite at step 6" in capsys.readouterr().err
    assert poetx_compile.load_checkpoint("out/checkpoint.pt")["step"] == 4
    rows = read_rows(Path("out/metrics.jsonl"))
    assert rows[-1]["loss"] is None


def test_the_default_folder_is_new_each_time():
    arguments = ["--data", "text.txt", "--seq-len", "16", "--steps", "1", "--no-compile"]
    arguments += ["--device", "cpu", "--method", "adamw"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_the_public_names_are_what_the_example_uses():
    for name in ("prepare", "poetx_backend", "POETXMuon", "POETXAdamW", "merge_and_unload"):
        assert hasattr(poetx_compile, name)
