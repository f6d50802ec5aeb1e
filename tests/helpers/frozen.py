"""What was there before the tests is hidden from the garbage collector (`gc.freeze`)."""

from __future__ import annotations

import gc

_before = 0


def freeze() -> None:
    """Hide all that is alive now."""
    global _before
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    _before = gc.get_freeze_count()


def hidden() -> bool:
    """Whether a test froze more, as `poetx_compile.layers.live_objects.hidden` would tell."""
    return gc.get_freeze_count() > _before
