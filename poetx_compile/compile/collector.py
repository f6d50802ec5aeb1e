"""Python's garbage collector, paused while graphs are compiled.

A compilation makes millions of objects that live until it ends. The collector walks over all of
them again and again and frees next to nothing: a tenth of the first step of a model of 12 layers,
and more of a larger one.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Collect nothing inside, in the whole process, and go on afterwards; may be nested."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
