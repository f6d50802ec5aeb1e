"""The iteration that orthogonalises, for the reference and for its kernels.

``X ← aX + bAX + cA²X``, ``A = X Xᵀ``: each step is an odd polynomial of the singular values. The
polynomials are minimax, each on what the one before has left (Polar Express: Amsel et al., 2025,
arXiv 2505.16932), so that four of them do what five equal ones of Muon do.

Before the first step X is divided by a bound of its largest singular value that A gives. Those of a
skew matrix come in pairs, so ``2σ⁴ ≤ ‖A‖²``; that is 2 to 4 times tighter than the norm of X, which
is worth a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]

COEFFICIENTS = (
    (8.3410, -24.5974, 18.2230),
    (3.9124, -2.8065, 0.5135),
    (3.3214, -2.4056, 0.4725),
    (2.1672, -1.5473, 0.3702),
)
"""(a, b, c) of the steps, for singular values from 0.004 to 1. Each is computed for an interval 2 %
longer than the one before leaves, since rounding may leave it; the last is scaled, so that results
of 0.77 … 1.07 are 0.92 on average, as five steps of Muon's make them."""

BOUND = 1.08
"""What the bound of the singular values is enlarged by: beyond 1 the polynomials are steep, and A
is rounded. Blocks of one plane are at the bound; at 1 / 1.08 the slope of all steps is zero."""

SMALLEST = 1e-15
"""Norms below count as zero: the squares of their entries leave fp32."""


def newton_schulz(x: Tensor, coefficients: Coefficients = COEFFICIENTS) -> Tensor:
    """The steps of `coefficients`.

    Args:
        x: skew [blocks, b, b] of Frobenius norm 1, or zero.

    Returns:
        The same shape and dtype; each product is rounded once, with what is added to it.
    """
    for step, (a, b, c) in enumerate(coefficients):
        square = torch.bmm(x, x.mT)
        if step == 0:
            norm = torch.linalg.matrix_norm(square.to(torch.promote_types(x.dtype, torch.float32)))
            bound = (BOUND * (norm * 0.5**0.5).sqrt()).clamp_min(SMALLEST)[:, None, None]
            x, square = (x / bound).to(x.dtype), (square / bound**2).to(x.dtype)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
