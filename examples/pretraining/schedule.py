"""Learning-rate schedule: linear warm-up, then cosine to 1 %."""

from __future__ import annotations

import math

FLOOR = 0.01


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at `step`, counted from 0, of a run of `steps` steps."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
