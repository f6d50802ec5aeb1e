"""`rotation_delta`: rotations without their identity, some of them transposed."""

from __future__ import annotations

import pytest
import torch

from poetx_compile import ops
from poetx_compile.ops.rotation_delta import rotation_delta_reference
from tests.helpers import references
from tests.helpers.references import random_skew
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BLOCKS = [(0, 4), (3, 1), (2, 2), (1, 3), (3, 5), (2, 16)]


def _expected(skew: torch.Tensor, b: int, order: int | None, flipped: int) -> torch.Tensor:
    rotation = references.cayley(skew.double(), b, order)
    others = len(skew) - flipped
    if order is None:  # orthogonal: G(−Q) is the transposed block
        rotation = torch.cat([rotation[:others], rotation[others:].mT])
    else:
        rotation[others:] = references.cayley(-skew[others:].double(), b, order)
    return rotation - torch.eye(b, dtype=torch.float64)


@pytest.mark.parametrize("order", [1, 2, 3, 4, None])
@pytest.mark.parametrize(("blocks", "b"), BLOCKS)
def test_is_the_rotation_without_the_identity(blocks, b, order) -> None:
    skew = random_skew(blocks, b)
    for flipped in {0, blocks // 2, blocks}:
        for function in (ops.rotation_delta, rotation_delta_reference):
            actual = function(skew, b, order, torch.float64, flipped)
            assert_close(actual, _expected(skew, b, order, flipped))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_rounded_to_its_dtype(dtype) -> None:
    skew = random_skew(3, 8).float()
    actual = ops.rotation_delta(skew, 8, 3, dtype, 1)
    assert actual.dtype == dtype
    assert_close(actual, _expected(skew, 8, 3, 1))


def test_zero_at_the_identity() -> None:
    assert not ops.rotation_delta(torch.zeros(2, 28), 8, 3, torch.bfloat16, 1).any()


def test_autocast_changes_nothing() -> None:
    skew = random_skew(2, 8).float()
    expected = ops.rotation_delta(skew, 8, 3, torch.float32, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.rotation_delta(skew, 8, 3, torch.float32, 1), expected)


@pytest.mark.parametrize("args", [(3, torch.bfloat16, 1), (None, torch.float32, 0)])
def test_opcheck(args) -> None:
    order, dtype, flipped = args
    skew = random_skew(2, 4).float()
    torch.library.opcheck(ops.rotation_delta, (skew, 4, order, dtype, flipped))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 5), 4, 3, torch.float32), "skew must be"),
        ((torch.zeros(2, 6), 4, 0, torch.float32), "Neumann order"),
        ((torch.zeros(2, 6), 4, 3, torch.float32, 3), "a number of the 2 blocks"),
        ((torch.zeros(2, 6), 4, 3, torch.float32, -1), "a number of the 2 blocks"),
    ],
)
def test_bad_arguments_are_named(args, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.rotation_delta(*args)
