"""Gains: a trained factor for each row of a weight, and for each column, in their natural order."""

from __future__ import annotations

import torch
from torch import Tensor

GAINS = ("gain_in", "gain_out")
"""Arguments of the ops that make effective weights; ``None`` for ones."""


def scaled(weight: Tensor, gain_in: Tensor | None, gain_out: Tensor | None) -> Tensor:
    """``diag(gain_out) W diag(gain_in)``, in plain torch ops: for what makes effective weights.

    Args:
        weight: W [n, m].
        gain_in: [m], fp32 or fp64; ``None`` for ones.
        gain_out: [n], the same.

    Returns:
        [n, m] of the wider dtype; of gains of one, bitwise the weight.
    """
    for name, gain, dim in (("gain_in", gain_in, 1), ("gain_out", gain_out, 0)):
        torch._check(
            gain is None or (gain.dim() == 1 and gain.shape[0] == weight.shape[dim]),
            lambda name=name, gain=gain, dim=dim: (
                f"poetx: {name} must be [{weight.shape[dim]}] for a weight of "
                f"{list(weight.shape)}, got {list(gain.shape)}"
            ),
        )
    rows = weight if gain_out is None else weight * gain_out[:, None]
    return rows if gain_in is None else rows * gain_in
