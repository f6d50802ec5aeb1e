"""The iteration that orthogonalises, for the reference and for its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz step, from Muon (Jordan et al., 2024): steep at zero, so that five
steps bring every singular value above about 0.01 of the norm into 0.7 … 1.2."""

STEPS = 5


def newton_schulz(x: Tensor) -> Tensor:
    """``X ← aX + b A X + c A² X`` with ``A = X Xᵀ``, `STEPS` times.

    Args:
        x: [blocks, b, b] of Frobenius norm at most 1.

    Returns:
        The same shape and dtype; each product is rounded once, with what is added to it.
    """
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
