"""One case in a process of its own (`benchmarks.memory.queue` starts it).

The row goes into the file that is named; running out of memory is a row as well.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import fcntl
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import poetx_compile as poetx
from benchmarks import gate
from benchmarks.memory.cases import Case, gives_up
from benchmarks.memory.methods import VOCABULARY, Trained, build, untrained
from benchmarks.rows import Row, environment, write

GIB = 2**30

LONG = 4096

TELL = signal.SIGUSR1
"""A worker that gets it writes where it is: into its log, for a case that does not end."""

MEASURED = (
    "peak_gib", "reserved_gib", "tokens_per_s", "ms", "step_ms", "merge_ms", "first_step_s",
    "weights_gib", "gradients_gib", "state_gib", "activations_gib", "rest_gib", "prepare_peak_gib",
    "forward_peak_gib", "backward_peak_gib", "step_peak_gib", "merge_peak_gib", "save_peak_gib",
    "load_peak_gib", "first_loss", "last_loss", "loss_error",
)  # fmt: skip
"""What a row holds beside its case and its machine; ``None`` where it has not come to that."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and how a case runs.

    Args:
        cap_gib: no more GPU memory than that; ``None`` for all there is.
        stage: of the compiler.
        warmup, steps: steps after the first that are not timed, and that are; of sequences beyond
            `LONG` one is timed.
        checkpoint: save and load a checkpoint as well, for their peaks.
        layers: of the model; ``None`` for all. A few compile what the whole one runs.
        lock: a file that is locked while the device is used: who waits for it has started already.
    """

    device: str = "cuda"
    cap_gib: float | None = 80.0
    stage: str = "inductor"
    warmup: int = 2
    steps: int = 4
    checkpoint: bool = False
    vocabulary: int = VOCABULARY
    layers: int | None = None
    lock: str | None = None


class Meter:
    """The allocator's counters; of a CPU there are none."""

    def __init__(self, device: torch.device):
        self.device, self.counts = device, device.type == "cuda"

    def wait(self) -> None:
        if self.counts:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> float | None:
        return torch.cuda.memory_allocated(self.device) / GIB if self.counts else None

    def restart(self) -> None:
        self.wait()
        if self.counts:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float | None:
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) / GIB if self.counts else None

    def give_back(self) -> None:
        """Let the allocator give memory that nothing is in back to the device."""
        self.wait()
        if self.counts:
            torch.cuda.empty_cache()

    def reserved(self) -> float | None:
        return torch.cuda.max_memory_reserved(self.device) / GIB if self.counts else None

    def seconds(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """What `function` returns, and the wall time until the device has done it."""
        self.wait()
        begun = time.perf_counter()
        result = function()
        self.wait()
        return result, time.perf_counter() - begun


def work(case: Case, place: Place) -> Row:
    """The row of a case. Raises `GateError` where something is computed wrongly."""
    device = torch.device("cpu") if place.device == "cpu" else torch.device(place.device, 0)
    row: Row = environment(device, getattr(torch, case.weights)) | dataclasses.asdict(case)
    row |= {"gives_up": gives_up(case), "cap_gib": None, "oom_in": None}
    row |= dict.fromkeys(MEASURED)
    meter = Meter(device)
    if meter.counts and place.cap_gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, place.cap_gib * GIB / total), device)
        row["cap_gib"] = min(place.cap_gib, total / GIB)
    run = _Run(case, place, meter, row)
    try:
        run.run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(error, file=sys.stderr)
        row |= dict.fromkeys(MEASURED) | {"oom_in": run.phase}
    return row


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU is full, whoever found out."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


@dataclasses.dataclass
class _Run:
    """The phases of a case; `phase` is the one it is in."""

    case: Case
    place: Place
    meter: Meter
    row: Row
    phase: str = "prepare"

    def run(self) -> None:
        torch.manual_seed(0)
        device, vocabulary = self.meter.device, self.place.vocabulary
        with device:
            model = untrained(self.case, vocabulary, self.place.layers)
        trained = build(self.case, model, self.place.stage)
        tokens = torch.randint(vocabulary, (1, self.case.seq + 1), device=device)
        self.row["prepare_peak_gib"] = self.meter.peak()
        batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

        def step() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            loss = trained.forward(*batch)
            loss.backward()
            trained.step()
            return loss.detach().clone()

        self.phase = "first step"
        first, self.row["first_step_s"] = self.meter.seconds(step)
        self.phase = "check"
        self.row["loss_error"] = self._checked(trained, batch)
        self.phase = "training"
        is_long, period = self.case.seq > LONG, self.case.turn_every
        for _ in range(0 if is_long else max(self.place.warmup, period)):
            step()
        if self.case.compile == "graphs":
            self.meter.give_back()  # what recording has left
        self.meter.restart()
        # Whole periods: each side has turned as often as the others.
        steps = 1 if is_long else -(-self.place.steps // period) * period
        # Without a wait between them, as in training: the host is ahead of the device.
        run, seconds = self.meter.seconds(lambda: [step() for _ in range(steps)])
        self.row |= {"peak_gib": self.meter.peak(), "reserved_gib": self.meter.reserved()}
        if self.case.compile == "graphs":  # what a replay uses is not counted as allocated
            self.row["peak_gib"] = self.row["reserved_gib"]
        self._times(trained, seconds / steps)
        losses = {"first_loss": first.item(), "last_loss": run[-1].item()}
        if not losses["last_loss"] < losses["first_loss"]:
            raise gate.GateError(f"the loss did not go down: {losses}")
        self.row |= losses
        self._parts(trained, batch)
        if self.place.checkpoint:
            self._checkpoint(trained)

    def _checked(self, trained: Trained, batch: tuple[Tensor, Tensor]) -> float:
        """The gate: the compiled loss is eager's, after a step, of rotations that bf16 resolves."""
        torch.compiler.cudagraph_mark_step_begin()
        with gate.turned(trained.model):
            compiled = trained.forward(*batch).detach()
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                eager = trained.forward(*batch)
        return gate.check(compiled, eager, torch.bfloat16, "loss of the compiled model")

    def _times(self, trained: Trained, seconds: float) -> None:
        """A merge is spread over its interval; it is timed after one that loads its kernels."""
        merge_s, peak = 0.0, None
        if trained.merge is not None:
            self.phase = "merge"
            trained.merge()
            self.meter.restart()
            _, merge_s = self.meter.seconds(trained.merge)
            peak = self.meter.peak()
        step_ms = 1e3 * seconds
        ms = step_ms + 1e3 * merge_s / (self.case.merge_interval or 1)
        self.row |= {
            "step_ms": step_ms,
            "merge_ms": 1e3 * merge_s,
            "ms": ms,
            "tokens_per_s": self.case.seq / (ms / 1e3),
            "merge_peak_gib": peak,
        }

    def _parts(self, trained: Trained, batch: tuple[Tensor, Tensor]) -> None:
        """One step, phase by phase: what is held, and the most that was allocated."""
        self.phase = "parts"
        meter, row = self.meter, self.row
        before = meter.allocated()
        meter.restart()
        torch.compiler.cudagraph_mark_step_begin()
        loss = trained.forward(*batch)
        held, row["forward_peak_gib"] = meter.allocated(), meter.peak()
        meter.restart()
        loss.backward()
        row["backward_peak_gib"] = meter.peak()
        model = trained.model
        row["weights_gib"] = _gib([*model.parameters(), *model.buffers()])
        row["gradients_gib"] = _gib([p.grad for p in model.parameters() if p.grad is not None])
        meter.restart()
        trained.step()
        row["step_peak_gib"] = meter.peak()
        row["state_gib"] = _gib(trained.states())
        if before is not None and held is not None:
            row["activations_gib"] = held - before
            parts = row["weights_gib"] + row["gradients_gib"] + row["state_gib"]
            row["rest_gib"] = row["peak_gib"] - parts

    def _checkpoint(self, trained: Trained) -> None:
        """The peaks of saving a run and of going on from it."""
        self.phase = "checkpoint"
        (optimizer,) = trained.optimizers
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            self.meter.restart()
            poetx.save_checkpoint(path, trained.model, optimizer)
            self.row["save_peak_gib"] = self.meter.peak()
            self.meter.restart()
            poetx.load_checkpoint(path, trained.model, optimizer)
            self.row["load_peak_gib"] = self.meter.peak()


def _gib(tensors: list[Tensor]) -> float:
    """Bytes of their storages, each once."""
    storages = {
        plain.untyped_storage().data_ptr(): plain.untyped_storage().nbytes()
        for tensor in tensors
        for plain in _plain(tensor)
    }
    return sum(storages.values()) / GIB


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors inside of a wrapper, such as an 8-bit state of torchao."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain(getattr(tensor, name))]


def main(task: str, output: str) -> None:
    """Run the task given as JSON, and write its row into `output`."""
    faulthandler.register(TELL)
    asked = json.loads(task)
    case, place = Case(**asked["case"]), Place(**asked["place"])

    held = None if place.lock is None else open(place.lock, "w", encoding="utf-8")  # noqa: SIM115
    if held is not None:  # until this process ends, and has given its memory back
        fcntl.flock(held, fcntl.LOCK_EX)
    write(Path(output), [work(case, place)])


if __name__ == "__main__":
    main(*sys.argv[1:])
