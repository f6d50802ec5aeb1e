"""The norm-relative comparison of the tests, by the table of `benchmarks/tolerances.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.tolerances import MEMORY, relative_error, tolerance

__all__ = ["MEMORY", "assert_close", "relative_error", "tolerance"]


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, what: str = "result"
) -> None:
    """Assert equal shapes, finite values and a norm-relative error within the table.

    Args:
        actual: the tensor under test.
        expected: the reference, usually in fp32 or fp64.
        dtype: the row of the table; default the dtype of `actual`.
        what: named in the message.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} is not {expected.shape}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error, bound = relative_error(actual, expected), tolerance(dtype or actual.dtype)
    assert error <= bound, f"{what}: relative error {error:.3g} exceeds {bound:.3g}"
