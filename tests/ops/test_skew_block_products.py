"""`skew_block_products`: the packed skew parts of blocks of ``XᵀY``, twice."""

from __future__ import annotations

import pytest
import torch

from poetx_compile import ops
from tests.helpers.references import random_pair
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _entries(x, y, blocks, b, index) -> torch.Tensor:
    """By the definition, entry by entry of the upper triangle."""
    x, y = x.flatten(0, -2).double()[:, index], y.flatten(0, -2).double()[:, index]
    out = []
    for at in range(0, blocks * b, b):
        pairs = [(at + i, at + j) for i in range(b) for j in range(i + 1, b)]
        out.append([2 * (x[:, i] @ y[:, j] - y[:, i] @ x[:, j]) for i, j in pairs])
    return torch.tensor(out, dtype=torch.float64).reshape(blocks, b * (b - 1) // 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "b", "chunk"), [(8, 4, 1), (11, 3, 1), (12, 4, 2), (5, 1, 1)])
def test_is_the_definition(d: int, b: int, chunk: int, dtype) -> None:
    x, y = (torch.randn(2, 5, d, dtype=torch.float64).to(dtype) for _ in range(2))
    pair = random_pair(d // chunk, 1)
    index = (pair[0][:, None] * chunk + torch.arange(chunk)).flatten()
    actual = ops.skew_block_products(x, y, d // b, b, pair)
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(actual, _entries(x, y, d // b, b, index))
    # A second product, of another width and not gathered, stands behind the first.
    x2, y2 = (torch.randn(2, 5, d + 1, dtype=torch.float64).to(dtype) for _ in range(2))
    both = ops.skew_block_products(x, y, d // b, b, pair, x2, y2, 1, None)
    assert_close(both[: d // b], actual)
    assert_close(both[d // b :], _entries(x2, y2, 1, b, torch.arange(d + 1)))


@pytest.mark.parametrize("blocks", [0, 2])
def test_no_tokens_or_no_blocks(blocks: int) -> None:
    x = torch.randn(3 if blocks == 0 else 0, 8)
    assert torch.equal(ops.skew_block_products(x, x, blocks, 4), torch.zeros(blocks, 6))


def test_opcheck() -> None:
    x, y, x2, y2 = (torch.randn(3, d) for d in (8, 8, 12, 12))
    torch.library.opcheck(ops.skew_block_products, (x, y, 2, 4))
    arguments = (x, y, 2, 4, random_pair(8), x2, y2, 3, random_pair(12))
    torch.library.opcheck(ops.skew_block_products, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(3, 7)}, "x and y must have one shape"),
        ({2: 3}, "3 blocks of 4 do not fit into 8 columns"),
        ({4: random_pair(7)}, "gather is over 7 columns"),
        ({6: None}, "a second product needs both x2 and y2"),
        ({7: 4}, "4 blocks of 4 do not fit into 12 columns"),
        ({5: torch.zeros(2, 12), 6: torch.zeros(2, 12)}, "must be over the same tokens"),
        ({5: torch.zeros(3, 12).double()}, "the operands must have one dtype"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    arguments = (*(torch.zeros(3, 8),) * 2, 2, 4, None, *(torch.zeros(3, 12),) * 2, 3, None)
    with pytest.raises(RuntimeError, match=message):
        ops.skew_block_products(*(dict(enumerate(arguments)) | change).values())
