"""Kernels compiled before they are launched, by threads, while something else takes its time.

Triton lets other threads run for nine tenths of a compilation. What it has compiled for a launch
that was noted in a `rehearsal` it finds when that launch is made: by the kernel's own cache, whose
key is made of the same arguments.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from poetx_compile.ops.kernels import current, run_on
from poetx_compile.ops.kernels.common import Launch, rehearsal

log = logging.getLogger("poetx_compile")

THREADS = 4
"""At most: each takes a little of the time in which one thread alone runs Python."""


def threads() -> int:
    """How many compile at once: one core is left to the thread that goes on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else THREADS
    return max(1, min(THREADS, cores - 1))


class Early:
    """The launches of a rehearsal, compiled in the background from now on.

    What fails is logged for debugging and no more: the launch itself compiles it again, and raises
    what there is to raise. Nothing is loaded onto the device, and a process that ends waits for no
    more than the kernels that are being compiled.

    Args:
        device: where the kernels are to run, for which Triton is there.
        launches: as a `rehearsal` has noted them.
    """

    def __init__(self, device: torch.device, launches: Sequence[Launch]):
        self._device = device
        # The launches of a kernel one after another: most are the same, and found compiled.
        alike: dict[int, list[Launch]] = defaultdict(list)
        for one in launches:
            alike[id(one.kernel)].append(one)
        self._open = list(alike.values())
        count = min(threads(), len(self._open))
        self._threads = [
            threading.Thread(target=self._work, name="poetx-early") for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until all are compiled: no slower than one after another, where they are launched."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        with current(self._device):
            while self._open:
                for one in self._next():
                    if not threading.main_thread().is_alive():  # the process is about to end
                        return
                    try:
                        _compile(one)
                    except Exception:
                        name = getattr(one.kernel, "__name__", one.kernel)
                        log.debug("%s cannot be compiled early", name, exc_info=True)

    def _next(self) -> Sequence[Launch]:
        try:
            return self._open.pop(0)
        except IndexError:  # another thread was faster
            return ()


def compiled_early(device: torch.device, rehearse: Callable[[], None]) -> Early | None:
    """Compile in the background what a function launches.

    Args:
        device: where it is to run.
        rehearse: called once, in a `rehearsal`; it makes its launches for meta tensors.

    Returns:
        ``None`` where no kernels run on the device, and where there is nothing to compile.
    """
    if not run_on(device):
        return None
    with current(device), rehearsal() as launches, torch.no_grad():
        try:
            rehearse()
        except Exception:  # not needed: the step raises what there is to raise
            log.debug("what is launched on %s is not known early", device, exc_info=True)
    return Early(device, launches) if launches else None


def _compile(launch: Launch) -> None:
    compiled = launch.kernel.warmup(*launch.args, grid=(launch.programs,), **launch.constants)
    from triton.runtime import driver

    # Triton 3.6 has a launcher compiled in C for each kernel; it is found by its source.
    driver.active.launcher_cls(compiled.src, compiled.metadata)
