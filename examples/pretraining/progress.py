"""A line that tells how long something silent has been going on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def telling(what: str, *, shown: bool = True, every: float | None = None) -> Iterator[None]:
    """Write `what` and the seconds it has taken to stderr, again after `every` seconds: one on a
    terminal, where it is one line, else half a minute."""
    terminal = sys.stderr.isatty()
    pause = every or (1 if terminal else 30)
    done = threading.Event()
    begun = time.perf_counter()

    def tell() -> None:
        while not done.wait(pause):
            line = f"{what}: {time.perf_counter() - begun:.0f} s"
            print(line, end="\r" if terminal else "\n", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    if shown:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if shown:
            thread.join()
        if shown and terminal:
            print("\x1b[2K", end="\r", file=sys.stderr, flush=True)
