"""The one table of tolerances, of the tests and of what is checked before it is timed.

A tolerance bounds ``‖actual − expected‖ / ‖expected‖`` (Frobenius), not single entries: one number
holds for outputs and gradients of every size, and a wrong formula misses it by orders of magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE: dict[torch.dtype, float] = {
    # Unit roundoff 1.1e-16; the batched solve and chains of ten products cost three digits.
    torch.float64: 1e-12,
    # Unit roundoff 6e-8; sums of a few thousand terms in another order cost two digits.
    torch.float32: 1e-5,
    # Unit roundoff 4.9e-4: two roundings of every entry, and the sum of both.
    torch.float16: 2e-3,
    # Unit roundoff 3.9e-3: the same.
    torch.bfloat16: 1.5e-2,
}


ORTHOGONALIZED = 0.05
"""Of `orthogonalize_skew` with bf16 operands, relative to fp64: twelve products, each rounded once,
by polynomials that are steep in places. 0.012 from b = 64 on; blocks of few planes, which may lie
in such a place, 0.01 to 0.035 on average. A step's own noise is larger by an order."""


MEMORY = 0.02
"""Of bytes that are estimated against bytes that an allocator has counted: what libraries and their
kernels allocate for themselves is not in the estimate, 0.3 to 1.2 % of the peaks of a 1B model."""


def tolerance(dtype: torch.dtype) -> float:
    """The norm-relative error allowed for results that were rounded to `dtype`."""
    return _TOLERANCE[dtype]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` in float64; absolute where expected is zero.

    On the device of `actual`: copies of large activations to the host would take longer than a
    benchmark.
    """
    a = actual.detach().double()
    e = expected.detach().to(a)
    scale = e.norm().item()
    return (a - e).norm().item() / (scale if scale > 0 else 1.0)
