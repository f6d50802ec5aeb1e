"""What tests import is hidden from the garbage collector (`gc.freeze`)."""

from __future__ import annotations

import gc
import sys

_before = 0
_modules = 0


def freeze() -> None:
    """Hide all that is alive now, if many modules were imported since the last time."""
    global _before, _modules
    if len(sys.modules) < _modules + 100:
        return
    gc.collect()
    gc.freeze()
    _before, _modules = gc.get_freeze_count(), len(sys.modules)


def hidden() -> bool:
    """Whether a test froze more, as `poetx_compile.layers.live_objects.hidden` would tell."""
    return gc.get_freeze_count() > _before
