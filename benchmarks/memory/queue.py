"""Cases in processes of their own, one at a time on each GPU; what has a row is skipped.

Two things save time on a machine that is paid for. What is to be compiled is compiled first, by
models of two layers, as many at once as the machine has cores for: compiled block by block, a model
of any depth runs the same code. And the next case of a GPU starts while the one before it is
measured, and waits for the device.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.memory import worker
from benchmarks.memory.cases import Case, compiled_alike, label, of_row
from benchmarks.memory.worker import Place
from benchmarks.rows import Row, read

ROOT = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "benchmarks.memory.worker")
POLL_S = 0.1
LOG_LINES = 60
SHORT = 4096
"""Tokens up to which several models fit beside each other while they compile."""

MOST_AT_ONCE = 16
"""Of models that compile: each takes a core, and some GiB of its GPU."""


@dataclasses.dataclass
class _Work:
    case: Case
    gpu: str
    process: subprocess.Popen[bytes]
    begun: float
    files: Path

    @property
    def row(self) -> Path:
        return self.files / "row.json"

    @property
    def log(self) -> Path:
        return self.files / "log"

    def said(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES:])

    def tell(self) -> None:
        """Have it write into its log where it is."""
        if self.process.poll() is None:
            self.process.send_signal(worker.TELL)
            time.sleep(POLL_S)

    def end(self) -> None:
        """Kill it, and the compilers that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Queue:
    """The cases of some plans.

    Args:
        cases: in their order.
        place: where and how they run.
        gpus: values of CUDA_VISIBLE_DEVICES; ``("",)`` for a CPU.
        folder: holds compiled code, which all cases share, locks, logs and rows.
        known: rows of earlier runs.
        finished: called with each new row.
        case_s: a case that takes longer is ended and counts as failed.
    """

    def __init__(
        self,
        cases: Iterable[Case],
        place: Place,
        gpus: Sequence[str],
        folder: Path,
        known: Sequence[Row] = (),
        finished: Callable[[Row], None] = lambda row: None,
        case_s: float = 600.0,
    ):
        self.place, self.gpus, self.folder, self.finished = place, gpus, folder, finished
        self.case_s = case_s
        done = {of_row(row).key() for row in known}
        self.pending = [c for c in dict.fromkeys(cases) if c.key() not in done]
        self.failed: list[Case] = []
        self._total = len(self.pending)
        self._under_way: list[_Work] = []
        self._begun = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def compile(self, limit_s: float) -> None:
        """Fill the caches for what is compiled block by block, until all is done or it is time."""
        blocks = [c for c in self.pending if c.compile != "whole"]
        small = [c for c in blocks if c.seq <= SHORT or c.loss_chunk is not None]
        alike = {compiled_alike(c): c for c in reversed(small)}
        waiting = list(reversed(alike.values()))
        at_once = min(MOST_AT_ONCE, _cores())
        place = dataclasses.replace(self.place, layers=2, warmup=0, steps=1, checkpoint=False)
        gpus = [self.gpus[i % len(self.gpus)] for i in range(at_once)]
        compiling: list[_Work] = []
        try:
            while waiting or compiling:
                for work in compiling:
                    if work.process.poll():
                        self._say(f"{named(work.case)}: did not compile\n{work.said()}")
                compiling = [w for w in compiling if w.process.poll() is None]
                free = list(gpus)
                for work in compiling:
                    free.remove(work.gpu)
                for gpu in free[: len(waiting)]:
                    compiling.append(self._started(waiting.pop(0), gpu, place, threads=2))
                if time.monotonic() - self._begun > limit_s:
                    break
                time.sleep(POLL_S)
        finally:
            for work in compiling:
                work.end()
        self._say(f"compiled for {len(alike) - len(waiting)} of {len(alike)} kinds of blocks")

    def run(self, limit_s: float | None = None) -> bool:
        """Do what is pending; True where all of it has a row. At the limit the rest is ended."""
        try:
            while self.pending or self._under_way:
                self._collect()
                if limit_s is not None and time.monotonic() - self._begun > limit_s:
                    self._say(f"time is up: {len(self.pending) + len(self._under_way)} to do")
                    break
                for gpu in self.gpus:  # one that runs, and one that waits for it
                    taken = sum(work.gpu == gpu for work in self._under_way)
                    for _ in range(min(2 - taken, len(self.pending))):
                        self._under_way.append(self._waiting(self.pending.pop(0), gpu))
                time.sleep(POLL_S)
        finally:
            for work in self._under_way:
                work.end()
        return not (self.failed or self.pending or self._under_way)

    def _waiting(self, case: Case, gpu: str) -> _Work:
        place = dataclasses.replace(self.place, lock=str(self.folder / f"gpu{gpu}.lock"))
        return self._started(case, gpu, place, threads=min(8, _cores()))

    def _started(self, case: Case, gpu: str, place: Place, threads: int) -> _Work:
        files = Path(tempfile.mkdtemp(prefix="case-", dir=self.folder))
        task = {"case": dataclasses.asdict(case), "place": dataclasses.asdict(place)}
        # The pools of CUDA graphs were measured without segments that expand.
        expand = case.compile != "graphs"
        environment = (
            {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expand}"}
            | os.environ
            | {
                "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
                "TRITON_CACHE_DIR": str(self.folder / "triton"),
                "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
            }
        )
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [*WORKER, json.dumps(task), str(files / "row.json")]
        with (files / "log").open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        return _Work(case, gpu, process, time.monotonic(), files)

    def _collect(self) -> None:
        for work in list(self._under_way):
            seconds = time.monotonic() - work.begun
            if work.process.poll() is None and seconds < self.case_s:
                continue
            work.tell()
            work.end()
            self._under_way.remove(work)
            if not work.row.exists():
                self.failed.append(work.case)
                self._say(f"{named(work.case)}: failed after {seconds:.0f} s\n{work.said()}")
                continue
            (row,) = read(work.row)
            self.finished(row)
            self._say(f"{named(work.case)}: {summary(row)}, {seconds:.0f} s after its start")

    def _say(self, text: str) -> None:
        done = self._total - len(self.pending) - len(self._under_way)
        seconds = time.monotonic() - self._begun
        print(f"[{done}/{self._total}, {seconds:4.0f} s] {text}", file=sys.stderr, flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def named(case: Case) -> str:
    """A case on one line, with its model and sequence."""
    return f"{case.model} x {case.seq}, {label(case)}"


def summary(row: Row) -> str:
    """What came of a row, on one line."""
    if row["oom_in"]:
        return f"out of memory in {row['oom_in']}"
    peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f} GiB"
    return f"{peak}, {row['tokens_per_s']:.0f} tokens/s"
