"""`orthogonalize_skew`: what `tests/optim/test_muon.py` says of `orthogonalize`, packed."""

from __future__ import annotations

import pytest
import torch

from poetx_compile import ops
from poetx_compile.ops.orthogonalize import orthogonalize
from tests.helpers.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b", [1, 2, 7])
def test_is_that_of_the_skew_matrices(b: int, dtype: torch.dtype) -> None:
    packed = torch.randn(3, b * (b - 1) // 2, dtype=dtype)
    rows, columns = torch.triu_indices(b, b, 1)
    matrix = packed.new_zeros(3, b, b)
    matrix[:, rows, columns] = packed
    expected = orthogonalize(matrix - matrix.mT)[:, rows, columns]
    actual = ops.orthogonalize_skew(packed, b)
    assert actual.dtype == dtype
    if b > 1:
        assert_close(actual, expected)


def test_opcheck() -> None:
    torch.library.opcheck(ops.orthogonalize_skew, (torch.randn(2, 6), 4))
    with pytest.raises(RuntimeError, match=r"skew must be \[blocks, 6\]"):
        ops.orthogonalize_skew(torch.randn(2, 5), 4)
