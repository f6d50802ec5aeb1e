"""Cases in processes of their own, one at a time on each GPU; what has a row is skipped."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.memory.cases import Case, label, of_row
from benchmarks.memory.worker import Place
from benchmarks.rows import Row, read

ROOT = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "benchmarks.memory.worker")
POLL_S = 0.1
LOG_LINES = 25


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


class Queue:
    """The cases of some plans.

    Args:
        cases: in their order.
        place: where and how they run.
        gpus: values of CUDA_VISIBLE_DEVICES; ``("",)`` for a CPU.
        caches: folder of compiled code. All cases share it: cases of one graph compile once.
        known: rows of earlier runs.
        finished: called with each new row.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        place: Place,
        gpus: Sequence[str],
        caches: Path,
        known: Sequence[Row] = (),
        finished: Callable[[Row], None] = lambda row: None,
    ):
        self.place, self.gpus, self.caches, self.finished = place, gpus, caches, finished
        done = {of_row(row).key() for row in known}
        self.pending = [c for c in dict.fromkeys(cases) if c.key() not in done]
        self.failed: list[Case] = []
        self._total = len(self.pending)
        self._under_way: list[_Work] = []
        self._begun = time.monotonic()

    def run(self, limit_s: float | None = None) -> bool:
        """Do what is pending; True where all of it has a row. At the limit the rest is ended."""
        try:
            while self.pending or self._under_way:
                self._collect()
                late = limit_s is not None and time.monotonic() - self._begun > limit_s
                if late:
                    self._say(f"time is up: {len(self.pending) + len(self._under_way)} to do")
                    break
                free = list(self.gpus)
                for work in self._under_way:
                    free.remove(work.gpu)
                for gpu in free[: len(self.pending)]:
                    self._under_way.append(self._started(self.pending.pop(0), gpu))
                time.sleep(POLL_S)
        finally:
            for work in self._under_way:
                if work.process.poll() is None:
                    os.killpg(work.process.pid, signal.SIGKILL)  # with the compilers it started
                    work.process.wait()
        return not (self.failed or self.pending or self._under_way)

    def _started(self, case: Case, gpu: str) -> _Work:
        files = Path(tempfile.mkdtemp(prefix="memory-"))
        task = {"case": dataclasses.asdict(case), "place": dataclasses.asdict(self.place)}
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(self.caches / "inductor"),
            "TRITON_CACHE_DIR": str(self.caches / "triton"),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        }
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
        for work in [w for w in self._under_way if w.process.poll() is not None]:
            self._under_way.remove(work)
            seconds = f"{time.monotonic() - work.begun:.0f} s"
            if not work.row.exists():
                self.failed.append(work.case)
                lines = work.log.read_text(encoding="utf-8", errors="replace").splitlines()
                said = "\n".join(lines[-LOG_LINES:])
                self._say(f"{named(work.case)}: failed after {seconds}, {work.log}\n{said}")
                continue
            (row,) = read(work.row)
            self.finished(row)
            self._say(f"{named(work.case)}: {summary(row)} in {seconds}")

    def _say(self, text: str) -> None:
        done = self._total - len(self.pending) - len(self._under_way)
        seconds = time.monotonic() - self._begun
        print(f"[{done}/{self._total}, {seconds:4.0f} s] {text}", file=sys.stderr, flush=True)


def named(case: Case) -> str:
    """A case on one line, with its model and sequence."""
    return f"{case.model} x {case.seq}, {label(case)}"


def summary(row: Row) -> str:
    """What came of a row, on one line."""
    if row["oom_in"]:
        return f"out of memory in {row['oom_in']}"
    peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f} GiB"
    return f"{peak}, {row['tokens_per_s']:.0f} tokens/s"
