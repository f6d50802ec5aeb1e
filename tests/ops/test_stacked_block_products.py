"""`stacked_block_products`: what two `block_product` would give, and its gradients."""

from __future__ import annotations

import pytest
import torch

from poetx_compile import ops
from tests.helpers.references import expand, random_pair
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (leading shape, widths, blocks, b, chunks of the gathers or None)
CASES = [
    ((4,), (6, 4), (3, 2), 2, (1, 1)),
    ((2, 3), (7, 11), (2, 3), 3, (1, None)),  # tails
    ((), (8, 3), (2, 1), 3, (2, None)),
    ((5,), (12, 14), (3, 2), 4, (4, 7)),  # chunks across the edge of a block
    ((3,), (6, 5), (0, 5), 1, (None, 1)),  # a product without blocks
    ((3,), (6, 5), (1, 0), 5, (None, None)),
    ((2, 0), (7, 6), (3, 2), 2, (1, 3)),
]


def _arguments(leading, widths, blocks, b: int, chunks, dtype=torch.float32) -> tuple:
    operands = [torch.randn(*leading, widths[i], dtype=dtype) for i in (0, 0, 1, 1)]
    gathers = [
        c and random_pair(width // c, seed)
        for seed, (c, width) in enumerate(zip(chunks, widths, strict=True))
    ]
    return *operands, *blocks, b, *gathers


def _diagonal(x: torch.Tensor, y: torch.Tensor, blocks: int, b: int, gather) -> torch.Tensor:
    """Block by block of the dense product in fp64."""
    order = torch.arange(x.shape[-1]) if gather is None else expand(gather, x.shape[-1])[0]
    product = torch.einsum("...i,...j->...ij", x.double()[..., order], y.double()[..., order])
    dense = product.reshape(-1, *product.shape[-2:]).sum(0)
    found = [dense[k * b : (k + 1) * b, k * b : (k + 1) * b] for k in range(blocks)]
    return torch.stack(found) if found else dense.new_zeros(0, b, b)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_one_stack_of_both_diagonals(case, dtype) -> None:
    args = x1, y1, x2, y2, blocks1, blocks2, b, gather1, gather2 = _arguments(*case, dtype)
    actual = ops.stacked_block_products(*args)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.is_contiguous()
    first = _diagonal(x1, y1, blocks1, b, gather1)
    second = _diagonal(x2, y2, blocks2, b, gather2)
    assert_close(actual, torch.cat([first, second]))


def test_non_contiguous_arguments() -> None:
    x1, y1, x2, y2, *rest = _arguments((4,), (6, 4), (3, 2), 2, (1, None))
    expected = ops.stacked_block_products(x1, y1, x2, y2, *rest)
    strided = [t.T.contiguous().T for t in (x1, y1, x2)] + [y2[:1].expand(4, 4)]
    actual = ops.stacked_block_products(*strided, *rest)
    assert_close(actual[:3], expected[:3])
    assert_close(actual[3:], _diagonal(x2, y2[:1].expand(4, 4), 2, 2, None).float())


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case) -> None:
    *operands, blocks1, blocks2, b, gather1, gather2 = _arguments(*case, torch.float64)

    def function(*given: torch.Tensor) -> torch.Tensor:
        return ops.stacked_block_products(*given, blocks1, blocks2, b, gather1, gather2)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in operands])


def test_gradients_of_some_operands_alone() -> None:
    x1, y1, x2, y2, *rest = _arguments(*CASES[1])
    wanted = [t.requires_grad_() for t in (y1, x2)]
    stack = ops.stacked_block_products(x1, y1, x2, y2, *rest)
    blocks1, _, b, gather1, gather2 = rest
    parts = (
        ops.block_product(x1, y1, blocks1, b, gather1, gather1),
        ops.block_product(x2, y2, rest[1], b, gather2, gather2),
    )
    expected = torch.autograd.grad(sum(p.square().sum() for p in parts), wanted)
    actual = torch.autograd.grad(stack.square().sum(), wanted)
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want)


def test_autocast_leaves_it_in_fp32() -> None:
    args = _arguments((50,), (6, 4), (3, 2), 2, (None, None))
    plain = ops.stacked_block_products(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.stacked_block_products(*args)
    assert torch.equal(cast, plain)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, (torch.float32, torch.bfloat16)[i % 2]) for i, case in enumerate(CASES)],
)
def test_opcheck(case, dtype) -> None:
    *operands, blocks1, blocks2, b, gather1, gather2 = _arguments(*case, dtype)
    args = (*(t.requires_grad_() for t in operands), blocks1, blocks2, b, gather1, gather2)
    torch.library.opcheck(torch.ops.poetx.stacked_block_products.default, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y1": torch.randn(4, 5)}, r"one shape, got \[4, 6\] and \[4, 5\]"),
        ({"blocks2": 3}, "3 blocks of 2 do not fit into 4 columns"),
        (
            {"x2": torch.randn(5, 4), "y2": torch.randn(5, 4)},
            r"over the same tokens, got \[4, 6\] and \[5, 4\]",
        ),
        ({"y2": torch.randn(4, 4).half()}, "one dtype, got .*float32 and torch.float16"),
        ({"gather2": random_pair(3)}, "gather2 is over 3 columns, the tensor has 4"),
    ],
)
def test_argument_errors(change, message: str) -> None:
    names = ("x1", "y1", "x2", "y2", "blocks1", "blocks2", "block_size")
    given = _arguments((4,), (6, 4), (3, 2), 2, (None, None))
    arguments = dict(zip(names, given, strict=False))
    with pytest.raises(RuntimeError, match=message):
        ops.stacked_block_products(**(arguments | change))
