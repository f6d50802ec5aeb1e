"""`permute_columns`: a gather whose backward is the inverse gather."""

from __future__ import annotations

import pytest
import torch

from poetx_compile import ops
from poetx_compile.ops.permute import pair_index
from tests.helpers.references import expand, random_pair

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7), (2, 0, 1), (3, 1)]
CHUNKED = [((6,), 2), ((2, 3, 15), 3), ((0, 8), 4), ((2, 24), 24)]  # shape, columns in a chunk


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_is_a_gather(shape: tuple[int, ...], inverse: bool) -> None:
    x, pair = torch.randn(shape), random_pair(shape[-1])
    out = ops.permute_columns(x, pair, inverse)
    assert torch.equal(out, x[..., pair[int(inverse)]])
    assert torch.equal(ops.permute_columns(out, pair, not inverse), x)


@pytest.mark.parametrize(("shape", "chunk"), CHUNKED)
@pytest.mark.parametrize("inverse", [False, True])
def test_chunks_of_columns_move_together(shape, chunk: int, inverse: bool) -> None:
    x, pair = torch.randn(shape), random_pair(shape[-1] // chunk)
    columns = expand(pair, shape[-1])
    out = ops.permute_columns(x, pair, inverse)
    assert torch.equal(out, x[..., columns[int(inverse)]])
    assert torch.equal(ops.permute_columns(out, pair, not inverse), x)
    assert torch.equal(pair_index(pair, int(inverse), shape[-1]), columns[int(inverse)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_any_dtype(dtype) -> None:
    x, pair = (8 * torch.randn(4, 7)).to(dtype), random_pair(7)
    assert torch.equal(ops.permute_columns(x, pair), x[:, pair[0]])


def test_non_contiguous_input_gives_contiguous_output() -> None:
    x, pair = torch.randn(7, 4).T, random_pair(7)
    out = ops.permute_columns(x, pair)
    assert out.is_contiguous()
    assert torch.equal(out, x[:, pair[0]])


@pytest.mark.parametrize(("shape", "chunk"), [*((s, 1) for s in SHAPES), *CHUNKED])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(shape: tuple[int, ...], chunk: int, inverse: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    pair = random_pair(shape[-1] // chunk)

    def function(x: torch.Tensor) -> torch.Tensor:
        return ops.permute_columns(x, pair, inverse)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize(
    ("shape", "chunk"), [((7,), 1), ((2, 3, 7), 1), ((0, 7), 1), ((2, 3, 15), 3)]
)
@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck(shape: tuple[int, ...], chunk: int, inverse: bool) -> None:
    x, pair = torch.randn(shape, requires_grad=True), random_pair(shape[-1] // chunk)
    torch.library.opcheck(torch.ops.poetx.permute_columns.default, (x, pair, inverse))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (torch.arange(7), r"pair must be an int64 permutation pair \[2, d/c\], got .*int64 \[7\]"),
        (random_pair(7).int(), r"pair must be an int64 permutation pair .* got .*int32"),
        (random_pair(6), "pair is over 6 columns, the tensor has 7: not equal, and not chunks"),
        (random_pair(0), "pair is over 0 columns, the tensor has 7"),
        (random_pair(14), "pair is over 14 columns, the tensor has 7"),
    ],
)
def test_argument_errors(pair: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.permute_columns(torch.randn(3, 7), pair)
