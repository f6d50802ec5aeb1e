"""`block_product`: the diagonal blocks of ``Xᵀ Y`` under gathers, in fp32."""

from __future__ import annotations

import pytest
import torch

from poetx_compile import ops
from tests.helpers.references import expand, random_pair
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (leading shape, width, blocks, b): whole, partial, none, b = 1, one block, empty batches.
CASES = [
    ((4,), 6, 3, 2),
    ((), 6, 2, 3),
    ((2, 3), 7, 2, 3),
    ((2, 1, 3), 11, 2, 5),
    ((3,), 5, 5, 1),
    ((3,), 5, 1, 5),
    ((3,), 5, 0, 2),
    ((0,), 6, 3, 2),
    ((2, 0), 7, 3, 2),
]
GATHERS = [(False, False), (True, False), (False, True), (True, True)]


def _pairs(gathers: tuple[bool, bool], width: int) -> list[torch.Tensor | None]:
    return [random_pair(width, seed) if on else None for seed, on in enumerate(gathers)]


def _naive(x, y, blocks: int, b: int, gather_x, gather_y) -> torch.Tensor:
    x = (x if gather_x is None else x[..., gather_x[0]]).flatten(0, -2).double()
    y = (y if gather_y is None else y[..., gather_y[0]]).flatten(0, -2).double()
    product = x.T @ y
    found = [product[k * b : (k + 1) * b, k * b : (k + 1) * b] for k in range(blocks)]
    return torch.stack(found) if found else x.new_zeros(0, b, b)


@pytest.mark.parametrize(("leading", "width", "blocks", "b"), CASES)
@pytest.mark.parametrize("gathers", GATHERS)
def test_is_the_diagonal_of_the_dense_product(leading, width, blocks, b, gathers) -> None:
    x, y = torch.randn(2, *leading, width)
    pairs = _pairs(gathers, width)
    actual = ops.block_product(x, y, blocks, b, *pairs)
    assert actual.dtype == torch.float32
    assert_close(actual, _naive(torch.atleast_2d(x), torch.atleast_2d(y), blocks, b, *pairs))


@pytest.mark.parametrize(
    ("width", "blocks", "b", "chunks"),
    [
        (12, 3, 4, (4, 4)),  # columns in a chunk of either side
        (14, 2, 6, (2, None)),  # a tail
        (15, 1, 8, (1, 3)),  # chunks across the edge of the block
        (6, 0, 2, (2, 3)),
    ],
)
def test_chunks_of_columns(width: int, blocks: int, b: int, chunks) -> None:
    x, y = (torch.randn(2, 3, width, dtype=torch.float64, requires_grad=True) for _ in "xy")
    pairs = [c and random_pair(width // c, seed) for seed, c in enumerate(chunks)]

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ops.block_product(x, y, blocks, b, *pairs)

    single = [None if pair is None else expand(pair, width) for pair in pairs]
    assert_close(function(x, y), _naive(x, y, blocks, b, *single))
    assert torch.autograd.gradcheck(function, (x, y))
    arguments = (x.detach().float(), y.detach().float(), blocks, b, *pairs)
    torch.library.opcheck(torch.ops.poetx.block_product.default, arguments)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float64, torch.float64), torch.float64),
    ],
)
def test_accumulates_in_fp32_at_least(dtypes, expected) -> None:
    x, y = torch.randn(500, 6).to(dtypes[0]), torch.randn(500, 6).to(dtypes[1])
    actual = ops.block_product(x, y, 3, 2)
    assert actual.dtype == expected
    # The inputs are what they are; the sum over the tokens must not be rounded to their dtype.
    assert_close(actual, _naive(x, y, 3, 2, None, None))


def test_non_contiguous_arguments() -> None:
    x, y = torch.randn(7, 4).T, torch.randn(4, 14)[:, ::2]
    pairs = _pairs((True, True), 7)
    assert_close(ops.block_product(x, y, 2, 3, *pairs), _naive(x, y, 2, 3, *pairs))


def test_autocast_leaves_it_in_fp32() -> None:
    x, y = torch.randn(2, 50, 6, requires_grad=True)
    plain = ops.block_product(x, y, 3, 2)
    expected = torch.autograd.grad(plain.square().sum(), (x, y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.block_product(x, y, 3, 2)
        actual = torch.autograd.grad(cast.square().sum(), (x, y))
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(("leading", "width", "blocks", "b"), CASES)
@pytest.mark.parametrize("gathers", GATHERS)
def test_gradcheck(leading, width, blocks, b, gathers) -> None:
    x, y = (torch.randn(*leading, width, dtype=torch.float64, requires_grad=True) for _ in "xy")
    pairs = _pairs(gathers, width)

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ops.block_product(x, y, blocks, b, *pairs)

    assert torch.autograd.gradcheck(function, (x, y))


@pytest.mark.parametrize(("leading", "width", "blocks", "b"), CASES[1:4] + CASES[6:8])
@pytest.mark.parametrize(
    ("gathers", "dtype"), [((False, False), torch.float32), ((True, True), torch.bfloat16)]
)
def test_opcheck(leading, width, blocks, b, gathers, dtype) -> None:
    x, y = (torch.randn(*leading, width).to(dtype).requires_grad_() for _ in "xy")
    arguments = (x, y, blocks, b, *_pairs(gathers, width))
    torch.library.opcheck(torch.ops.poetx.block_product.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.randn(4, 5)}, r"one shape, got \[4, 6\] and \[4, 5\]"),
        ({"blocks": 4}, "4 blocks of 2 do not fit into 6 columns"),
        ({"block_size": 0}, "3 blocks of 0 do not fit"),
        ({"gather_x": random_pair(5)}, "gather_x is over 5 columns, the tensor has 6"),
        ({"gather_y": torch.arange(6)}, "gather_y must be an int64 permutation pair"),
    ],
)
def test_argument_errors(change, message: str) -> None:
    arguments = {"x": torch.randn(4, 6), "y": torch.randn(4, 6), "blocks": 3, "block_size": 2}
    with pytest.raises(RuntimeError, match=message):
        ops.block_product(**(arguments | change))
