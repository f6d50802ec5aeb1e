"""Runs that are killed with SIGKILL and resumed: ``python -m tests.helpers.kill FOLDER``.

Every run is a process of its own, forked here so that torch is imported once. `test_checkpoint`
compares what they leave behind, see `folders`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimisers import it, seconds that no run has to pay by itself

import llama
import poetx_compile as poetx
import pretrain
from poetx_compile.optim import merge as merge_module
from poetx_compile.optim.angle import AngleGuard
from poetx_compile.state import files
from pretraining.training import Training
from tests.helpers.models import TinyLM
from tests.helpers.training import train_step

STEPS, SAVE_EVERY, INTERVAL = 10, 2, 4
LAYERS = 7  # of the model: so many layers are merged at steps 4 and 8
FILE = "checkpoint.pt"


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How a run trains and saves, and the call in whose place it is killed."""

    train: Callable[[Path], Any]
    owner: Any
    function: str
    call: int

    def killed(self, folder: Path) -> None:
        """Train, and die at the call."""
        real, calls = getattr(self.owner, self.function), []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == self.call:
                if self.function == "save":  # half of the file is there
                    real(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(self.owner, self.function, counted)
        self.train(folder)


def build(optimizer_class: Any) -> Any:
    """(model, optimiser); every call draws other weights, which a checkpoint has to replace."""
    model = TinyLM(layers=1)
    config = poetx.POETXConfig(block_size=8, merge_interval=INTERVAL, redraw_interval=INTERVAL)
    return model, optimizer_class(model, lr=2e-3, config=config)


def by_helper(optimizer_class: Any) -> Callable[[Path], None]:
    """Training with `save_checkpoint` and `load_checkpoint`."""

    def train(folder: Path) -> None:
        resumes = (folder / FILE).exists()
        torch.manual_seed(2 if resumes else 1)
        model, optimizer = build(optimizer_class)
        done = 0
        if resumes:
            done = poetx.load_checkpoint(folder / FILE, model, optimizer)["step"]
        for step in range(done + 1, STEPS + 1):
            log(folder, step, train_step(model, optimizer, step).item())
            if step % SAVE_EVERY == 0:
                poetx.save_checkpoint(folder / FILE, model, optimizer, step=step)

    return train


def by_state_dicts(optimizer_class: Any) -> Callable[[Path], None]:
    """Training with `state_dict`, `torch.save` and ``torch.load(weights_only=True)`` alone."""

    def train(folder: Path) -> None:
        resumes = (folder / FILE).exists()
        torch.manual_seed(2 if resumes else 1)
        model, optimizer = build(optimizer_class)
        done = 0
        if resumes:
            done, weights, state = torch.load(folder / FILE, weights_only=True)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        for step in range(done + 1, STEPS + 1):
            log(folder, step, train_step(model, optimizer, step).item())
            if step % SAVE_EVERY == 0:
                state = [step, model.state_dict(), optimizer.state_dict()]
                torch.save(state, folder / "new")
                os.replace(folder / "new", folder / FILE)

    return train


def by_example(folder: Path) -> None:
    """Training with ``examples/pretrain.py``, and its ``--resume``."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 2}
    llama.PRESETS["tiny"] = shape
    pretrain.draw = lambda *_: None  # takes longer than the training
    if (folder / FILE).exists():
        assert pretrain.main(["--out", str(folder), "--resume"]) == 0
        return
    text = folder.parent / "text.txt"
    text.write_text(" ".join(f"word{i * i % 13}" for i in range(900)))
    arguments = "--device cpu --no-compile --seq-len 16 --batch-size 4 --block-size 8 --log-every 1"
    arguments += f" --steps {STEPS} --save-every {SAVE_EVERY} --merge-interval {INTERVAL}"
    arguments += f" --redraw-interval {INTERVAL}"
    arguments += " --eval-every 100 --eval-batches 1 --sample-tokens 0"
    arguments += " --tokenizer bpe --vocab-size 300"
    paths = ["--data", str(text), "--out", str(folder)]
    assert pretrain.main([*arguments.split(), *paths]) == 0


def log(folder: Path, step: int, loss: float) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": loss}) + "\n")


_MERGED = ("_merge_layer", LAYERS + 4)  # in the middle of the second merge, at step 8

TRAIN = {
    "muon": by_helper(poetx.POETXMuon),
    "adamw": by_helper(poetx.POETXAdamW),
    "muon, state_dict": by_state_dicts(poetx.POETXMuon),
    "adamw, state_dict": by_state_dicts(poetx.POETXAdamW),
    "example": by_example,
}
HERE = sys.modules[__name__]
SCENARIOS = {
    "muon, mid-interval": Scenario(TRAIN["muon"], HERE, "train_step", 6),
    "muon, mid-merge": Scenario(TRAIN["muon"], merge_module, *_MERGED),
    "muon, mid-write": Scenario(TRAIN["muon"], torch, "save", 3),
    "adamw, merged and not counted": Scenario(TRAIN["adamw"], AngleGuard, "merged", 2),
    "muon, state_dict, mid-merge": Scenario(TRAIN["muon, state_dict"], merge_module, *_MERGED),
    "adamw, state_dict, mid-interval": Scenario(TRAIN["adamw, state_dict"], HERE, "train_step", 8),
    "example, mid-interval": Scenario(TRAIN["example"], Training, "_step", 6),
    "example, mid-merge": Scenario(TRAIN["example"], merge_module, *_MERGED),
}


def folders(root: Path, name: str) -> tuple[Path, Path]:
    """Where a scenario's uninterrupted run is, shared by all that train alike, and its cut one."""
    (kind,) = (k for k, train in TRAIN.items() if train is SCENARIOS[name].train)
    return root / f"{kind}, whole", root / name


def forked(run: Callable[[Path], Any], folder: Path) -> int:
    """Call `run` in a process of its own; its exit code, or the negative signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            files._STARTED = time.time()  # as that of a process of its own
            random.seed(0)  # fork has seeded it anew
            run(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root: Path) -> None:
    codes: dict[str, list[int]] = {}
    finished: dict[Path, int] = {}
    for name, scenario in SCENARIOS.items():
        whole, cut = folders(root, name)
        if whole not in finished:
            whole.mkdir()
            finished[whole] = forked(scenario.train, whole)
        cut.mkdir()
        codes[name] = [finished[whole], forked(scenario.killed, cut), forked(scenario.train, cut)]
    (root / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
