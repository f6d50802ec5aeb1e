"""Runs the checks of a module in several processes: one start for all of them, each by its name.

A check is a function ``check_…()`` of a module beside this one. Every process runs all of them in
order, in one process group over gloo. The processes come from a fork server that has imported what
they need, so that a start costs a fraction of a second.
"""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import socket
import time
import traceback
from pathlib import Path
from queue import Empty
from typing import Any

import pytest

PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "poetx_compile",
    "tests.distributed.training",
]
TIMEOUT = 60
"""Seconds that a process waits for another one in a collective."""


def run(checks: str, folder: Path, processes: int = 2, *, grouped: bool = True) -> None:
    """Run every check of the module `checks`; fail by name where a process reports an exception.

    Args:
        checks: a module of this package.
        folder: the checks' working directory.
        processes: how many; a single one has no process group.
        grouped: whether they are in a process group already; else what torchrun would tell them is
            in their environment.
    """
    module = f"{__package__}.{checks}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    reports: Any = context.Queue()
    meeting = f"file://{folder}/meeting-{checks}-{processes}" if grouped else _free_port()
    workers = [
        context.Process(target=_work, args=(module, rank, processes, meeting, folder, reports))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    done: dict[str, list[str]] = {}
    running = processes
    while running:
        try:
            name, error, seconds = reports.get(timeout=1)
        except Empty:
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        running -= name is None
        if name is not None:
            print(f"{checks}.{name}: {seconds:.1f} s")
            done.setdefault(name, []).append(error)
    for worker in workers:
        worker.join()
    failed = {name: [e for e in done.get(name, ["not run"]) if e] for name in names(module)}
    text = "\n\n".join(f"{name}: {e}" for name, errors in failed.items() for e in errors)
    if text:
        pytest.fail(f"{checks} on {processes} processes\n{text}", pytrace=False)
    assert all(len(done[name]) == processes for name in failed)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def names(module: str) -> list[str]:
    """The checks of a module, in order."""
    return [name for name in vars(importlib.import_module(module)) if name.startswith("check_")]


def _work(
    module: str, rank: int, processes: int, meeting: str | int, folder: Path, reports: Any
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.chdir(folder)
    if isinstance(meeting, int):
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": meeting}
        os.environ.update({name: str(fact) for name, fact in facts.items()})
        os.environ["MASTER_ADDR"] = "localhost"
    elif processes > 1:
        dist.init_process_group(
            "gloo",
            init_method=meeting,
            rank=rank,
            world_size=processes,
            timeout=datetime.timedelta(seconds=TIMEOUT),
        )
    for name in names(module):
        torch.manual_seed(0)
        error, begun = "", time.process_time()
        try:
            getattr(importlib.import_module(module), name)()
        except BaseException:
            error = traceback.format_exc()
        reports.put((name, error, time.process_time() - begun))
        torch._dynamo.reset()
        if error:  # the others hear of it by the closed connection
            break
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
    reports.put((None, "", 0.0))
