"""Runs in processes of their own, several on each GPU, longest first; what is done is skipped."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.quality.settings import Settings
from benchmarks.rows import Row, read, write

ROOT = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "benchmarks.quality.worker")
POLL_S = 0.2
LOG_LINES = 15
COMPILING_S = 60.0
"""A run is taken to compile for so long."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What runs where.

    Args:
        gpus: values of CUDA_VISIBLE_DEVICES; none for the CPU.
        per_gpu: runs at once on each GPU, or on the CPU.
        stage, windows: of `training.Place`.
        folder: holds the corpus, rows, models, logs and compiler caches.
    """

    gpus: tuple[str, ...]
    per_gpu: int
    stage: str
    windows: tuple[int, int]
    folder: Path

    def slots(self) -> list[str]:
        """A GPU for each run at once, or ``""`` for the CPU."""
        return [gpu for _ in range(self.per_gpu) for gpu in self.gpus or ("",)]

    def environment(self, slot: str) -> dict[str, str]:
        """A worker's environment: one GPU, shared caches, its share of the cores."""
        share = max(1, (os.cpu_count() or 1) // (self.per_gpu * max(1, len(self.gpus))))
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "caches" / "inductor"),
            "TRITON_CACHE_DIR": str(self.folder / "caches" / "triton"),
        }
        threads = {
            "TORCHINDUCTOR_COMPILE_THREADS": str(min(4, share)),
            "OMP_NUM_THREADS": str(min(2, share)),
        }
        return caches | threads | os.environ | {"CUDA_VISIBLE_DEVICES": slot}


@dataclasses.dataclass
class Work:
    """A run under way."""

    settings: Settings
    slot: str
    process: subprocess.Popen[bytes]
    begun: float


class Queue:
    """The runs of some plans on a machine.

    Args:
        plans: the runs of each; what they start from comes first, then a plan after the other.
        machine: what runs where.
        known: rows of earlier runs with the same corpus; their runs are skipped.
        finished: called after each run with all rows so far, by the name of the run.
    """

    def __init__(
        self,
        plans: Sequence[Sequence[Settings]],
        machine: Machine,
        known: Iterable[Row] = (),
        finished: Callable[[dict[str, Row]], None] = lambda rows: None,
    ):
        self.machine, self.finished = machine, finished
        self.rows: dict[str, Row] = {row["run"]: row for row in known}
        self.errors: dict[str, Row] = {}
        wanted = {run.run: run for runs in plans for run in runs}
        self.starts = {b.run: b for run in wanted.values() for b in _before(run)}
        self.place: dict[str, int] = dict.fromkeys(self.starts, -1)
        for index, runs in enumerate(plans):
            for run in runs:
                self.place.setdefault(run.run, index)
        for name in [*self.starts, *wanted]:
            if (row := _saved(self._row_path(name))) is not None:
                self.rows[name] = row
        self.pending = [
            run
            for name, run in (self.starts | wanted).items()
            if (name in wanted and name not in self.rows)
            or (name in self.starts and not self._model(run).exists())
        ]
        self.total = len(self.pending)
        self.under_way: list[Work] = []
        self.times: list[tuple[float, float]] = []
        self.begun = time.monotonic()

    def run(self, limit_s: float | None = None) -> bool:
        """Do what is pending; True where all of it has a row. At the limit the rest is ended."""
        deadline = None if limit_s is None else self.begun + limit_s
        try:
            while self.pending or self.under_way:
                self._collect()
                self._start(deadline)
                if deadline is not None and time.monotonic() > deadline:
                    self._say(f"time is up: {self.left} runs are not finished")
                    break
                if not self.under_way:
                    if self.pending:
                        self._say(f"{len(self.pending)} runs were not started")
                    break
                time.sleep(POLL_S)
        finally:
            for work in self.under_way:
                _end(work.process)
        return not self.errors and not self.left

    @property
    def left(self) -> int:
        """Runs without a row."""
        return len(self.pending) + len(self.under_way)

    def _start(self, deadline: float | None) -> None:
        """Fill the free slots."""
        free = self.machine.slots()
        for work in self.under_way:
            free.remove(work.slot)
        for slot in free:
            settings = self._next(deadline)
            if settings is None:
                return
            self.pending.remove(settings)
            self.under_way.append(self._launch(settings, slot))

    def _next(self, deadline: float | None) -> Settings | None:
        """What to start: not what cannot end in time, rather not what compiles a graph that another
        run compiles just now; of the rest, of the first plan, what takes longest.
        """
        ready = [r for r in self.pending if all(self._model(b).exists() for b in _before(r))]
        if deadline is not None and self.times:
            setup, pace = map(statistics.median, zip(*self.times, strict=True))
            left = deadline - time.monotonic()
            ready = [r for r in ready if setup + r.cost() * pace <= left]
        if not ready:
            return None
        now = time.monotonic()
        compiling = {
            w.settings.compiled_alike for w in self.under_way if now - w.begun < COMPILING_S
        }
        apart = [r for r in ready if r.compiled_alike not in compiling] or ready
        return min(apart, key=lambda r: (self.place[r.run], -r.cost()))

    def _launch(self, settings: Settings, slot: str) -> Work:
        folder = self.machine.folder
        task = {
            "settings": settings.to_dict(),
            "device": "cuda" if slot else "cpu",
            "stage": self.machine.stage,
            "windows": list(self.machine.windows),
            "save": settings.run in self.starts,
        }
        log = self._log_path(settings.run)
        log.parent.mkdir(parents=True, exist_ok=True)
        asked = log.with_suffix(".json")
        asked.write_text(json.dumps(task), encoding="utf-8")
        command = [*WORKER, str(asked), str(folder)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.machine.environment(slot), stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        return Work(settings, slot, process, time.monotonic())

    def _collect(self) -> None:
        """Take the rows of the runs that have ended."""
        for work in [w for w in self.under_way if w.process.poll() is not None]:
            self.under_way.remove(work)
            name = work.settings.run
            row = _saved(self._row_path(name)) if work.process.returncode == 0 else None
            if row is None:
                self._fail(work)
                continue
            seconds = time.monotonic() - work.begun
            trained_s = row["seconds"] - row["first_step_s"]
            self.times.append((seconds - trained_s, trained_s / work.settings.cost()))
            self.rows[name] = row
            self.finished(self.rows)
            self._say(f"{summary(row)} in {seconds:.0f} s")

    def _fail(self, work: Work) -> None:
        """Keep what a run has said before it broke; it is tried again by the next queue."""
        name = work.settings.run
        lines = self._log_path(name).read_text(encoding="utf-8", errors="replace").splitlines()
        said = "\n".join(lines[-LOG_LINES:])
        row = work.settings.to_dict() | {"run": name, "error": said}
        self.errors[name] = row
        write(self.machine.folder / "errors" / f"{name}.json", [row])
        self._say(f"{label(work.settings.to_dict())}: failed, see {self._log_path(name)}\n{said}")

    def _say(self, text: str) -> None:
        done = self.total - self.left
        seconds = time.monotonic() - self.begun
        print(f"[{done}/{self.total}, {seconds:4.0f} s] {text}", file=sys.stderr, flush=True)

    def _row_path(self, name: str) -> Path:
        return self.machine.folder / "rows" / f"{name}.json"

    def _log_path(self, name: str) -> Path:
        return self.machine.folder / "logs" / f"{name}.log"

    def _model(self, settings: Settings) -> Path:
        return self.machine.folder / "models" / f"{settings.run}.pt"


def label(row: Row) -> str:
    """The settings that tell runs apart, on one line."""
    names = ("lr", "poetx_lr", "block_size", "rank", "width", "seed")
    parts = [f"{row['method']}-{row['optimizer']}", row["preset"]]
    parts += [f"{name}={row[name]}" for name in names if row.get(name) is not None]
    nested = [*row["config"].items(), *row["options"].items()]
    return " ".join([*parts, *(f"{name}={value}" for name, value in nested)])


def summary(row: Row) -> str:
    """A finished run on one line."""
    loss = "diverged" if row["diverged"] else f"{row['val_loss']:.4f}"
    return f"{label(row)}: {loss}"


def _before(settings: Settings) -> list[Settings]:
    """The runs that a run starts from, the earliest first."""
    before = settings.before
    return [] if before is None else [*_before(before), before]


def _saved(path: Path) -> Row | None:
    return read(path)[0] if path.exists() else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a worker and what it has started (compilers): they are a process group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
