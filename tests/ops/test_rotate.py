"""`rotate_blocks`: the block-diagonal product under gather and scatter, exact at the identity."""

from __future__ import annotations

import pytest
import torch

from poetx_compile import ops
from tests.helpers import references
from tests.helpers.references import random_pair, random_skew
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
    ((3,), 1, 0, 1),
    ((0,), 6, 3, 2),
    ((2, 0), 7, 3, 2),
]
PAIRS = [(False, False), (True, False), (False, True), (True, True)]


def _pairs(present: tuple[bool, bool], width: int) -> list[torch.Tensor | None]:
    return [random_pair(width, seed) if on else None for seed, on in enumerate(present)]


def _rotation(blocks: int, b: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return references.cayley(random_skew(blocks, b), b, 3).to(dtype)


@pytest.mark.parametrize(("leading", "width", "blocks", "b"), CASES)
@pytest.mark.parametrize("present", PAIRS)
@pytest.mark.parametrize("transpose", [False, True])
def test_is_the_dense_product(leading, width, blocks, b, present, transpose: bool) -> None:
    x, rotation = torch.randn(*leading, width, dtype=torch.float64), _rotation(blocks, b)
    pairs = _pairs(present, width)
    expected = references.rotate(x, rotation, *pairs, transpose)
    actual = ops.rotate_blocks(x, rotation, *pairs, transpose)
    assert actual.is_contiguous()
    assert_close(actual, expected)
    assert_close(ops.rotate_blocks(x.float(), rotation.float(), *pairs, transpose), expected)


@pytest.mark.parametrize(
    ("width", "blocks", "b", "gather", "scatter"),
    [
        (12, 3, 4, 4, 4),  # columns in a chunk of either side
        (12, 3, 4, 1, 3),
        (14, 2, 6, 2, None),  # with a tail
        (15, 1, 8, None, 3),  # chunks across the edges of blocks
        (15, 3, 5, 5, 15),
        (6, 0, 2, 2, 3),
    ],
)
@pytest.mark.parametrize("transpose", [False, True])
def test_chunks_of_columns(width, blocks, b, gather, scatter, transpose: bool) -> None:
    x = torch.randn(2, 3, width, dtype=torch.float64, requires_grad=True)
    rotation = _rotation(blocks, b).requires_grad_()
    pairs = [c and random_pair(width // c, seed) for seed, c in enumerate((gather, scatter))]

    def function(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        return ops.rotate_blocks(x, rotation, *pairs, transpose)

    assert_close(function(x, rotation), references.rotate(x, rotation, *pairs, transpose))
    assert torch.autograd.gradcheck(function, (x, rotation))
    arguments = (x.detach().float(), rotation.detach().float(), *pairs, transpose)
    torch.library.opcheck(torch.ops.poetx.rotate_blocks.default, arguments)
    delta = rotation.detach() - torch.eye(b, dtype=torch.float64)
    rounded = (x.detach(), delta, *pairs, transpose)
    assert_close(ops.rotate_by_delta(*rounded), function(x, rotation).detach())
    torch.library.opcheck(torch.ops.poetx.rotate_by_delta.default, rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_data_under_fp32_rotations(dtype) -> None:
    x, rotation, pair = torch.randn(33, 22).to(dtype), _rotation(5, 4), random_pair(22)
    actual = ops.rotate_blocks(x, rotation.float(), pair, None)
    assert actual.dtype == dtype
    assert_close(actual, references.rotate(x.double(), rotation, pair, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_identity_is_exact_in_every_dtype_and_matmul_precision(dtype, precision, device) -> None:
    torch.set_float32_matmul_precision(precision)
    x, pair = (100 * torch.randn(64, 70)).to(device, dtype), random_pair(70).to(device)
    eye = torch.eye(16, device=device).repeat(4, 1, 1)
    assert torch.equal(ops.rotate_blocks(x, eye), x)
    assert torch.equal(ops.rotate_blocks(x, eye, pair, pair, True), x)
    assert torch.equal(ops.rotate_blocks(x, eye, pair), x[:, pair[0]])


@pytest.mark.parametrize("angle", [1e-2, 1e-3])
def test_a_small_rotation_survives_rounding_to_bf16(angle: float) -> None:
    # Rounded as G, an entry 1 − θ²/2 becomes 1 and the length of every row of x grows.
    g = references.cayley(random_skew(1, 32, angle=angle), 32, None)
    x = torch.randn(400, 32).bfloat16()
    moved = ops.rotate_blocks(x.float(), g.float()) - x.float()
    delta = (g.float() - torch.eye(32)).bfloat16().double()
    assert_close(moved, x.double() @ delta[0], torch.bfloat16)


def test_non_contiguous_arguments() -> None:
    x, rotation = torch.randn(7, 4, dtype=torch.float64).T, _rotation(2, 3)
    wide = torch.randn(4, 3, 14, dtype=torch.float64).transpose(0, 1)[..., ::2]
    pair = random_pair(7)
    for strided in (x, wide):
        assert not strided.is_contiguous()
        for rotations in (rotation, rotation.mT.contiguous().mT):
            actual = ops.rotate_blocks(strided, rotations, pair, pair)
            assert_close(actual, references.rotate(strided, rotation, pair, pair))


@pytest.mark.parametrize("blocks", [0, 3])
def test_the_result_never_aliases_the_input(blocks: int) -> None:
    x = torch.randn(4, 6)
    before = x.clone()
    ops.rotate_blocks(x, torch.eye(2).repeat(blocks, 1, 1)).add_(1)
    assert torch.equal(x, before)


def test_autocast_casts_the_data_and_not_the_rotation() -> None:
    x, rotation = torch.randn(9, 6, requires_grad=True), _rotation(3, 2, torch.float32)
    rotation.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ops.rotate_blocks(x, rotation)
        double = ops.rotate_blocks(x.double(), rotation)
    assert actual.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    assert torch.equal(actual, ops.rotate_blocks(x.bfloat16(), rotation))
    actual.float().sum().backward()
    assert x.grad.dtype == rotation.grad.dtype == torch.float32


def test_a_backward_under_autocast_is_the_same() -> None:
    x = torch.randn(9, 6, requires_grad=True)
    rotation = _rotation(3, 2, torch.float32).requires_grad_()
    out, grad = ops.rotate_blocks(x, rotation), torch.randn(9, 6)
    expected = torch.autograd.grad(out, (x, rotation), grad, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(out, (x, rotation), grad)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(("leading", "width", "blocks", "b"), CASES)
@pytest.mark.parametrize("present", PAIRS)
@pytest.mark.parametrize("transpose", [False, True])
def test_gradcheck(leading, width, blocks, b, present, transpose: bool) -> None:
    x = torch.randn(*leading, width, dtype=torch.float64, requires_grad=True)
    rotation = _rotation(blocks, b).requires_grad_()
    pairs = _pairs(present, width)

    def function(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        return ops.rotate_blocks(x, rotation, *pairs, transpose)

    assert torch.autograd.gradcheck(function, (x, rotation))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("blocks", [0, 2])
def test_gradgradcheck(transpose: bool, blocks: int) -> None:
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    rotation = _rotation(blocks, 3).requires_grad_()
    pairs = _pairs((True, True), 7)
    assert torch.autograd.gradgradcheck(
        lambda x, rotation: ops.rotate_blocks(x, rotation, *pairs, transpose), (x, rotation)
    )


@pytest.mark.parametrize(("x_trains", "rotation_trains"), [(True, False), (False, True)])
def test_saves_only_what_the_wanted_gradients_need(x_trains, rotation_trains) -> None:
    x = torch.randn(5, 6, requires_grad=x_trains)
    rotation = _rotation(3, 2, torch.float32).requires_grad_(rotation_trains)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.rotate_blocks(x, rotation)
    assert [t.shape for t in saved] == [rotation.shape if x_trains else x.shape]


@pytest.mark.parametrize(("leading", "width", "blocks", "b"), CASES[1:4] + CASES[6:9])
@pytest.mark.parametrize("present", [(False, False), (True, True)])
@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck(leading, width, blocks, b, present, transpose: bool) -> None:
    x = torch.randn(*leading, width, requires_grad=True)
    rotation = _rotation(blocks, b, torch.float32).requires_grad_()
    arguments = (x, rotation, *_pairs(present, width), transpose)
    torch.library.opcheck(torch.ops.poetx.rotate_blocks.default, arguments)


def test_opcheck_in_bf16_with_strides() -> None:
    x = torch.randn(7, 4).bfloat16().T.requires_grad_()
    rotation = _rotation(2, 3, torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.poetx.rotate_blocks.default, (x, rotation, random_pair(7)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 6, dtype=torch.int64)}, r"floating point \[..., d\], got .*int64"),
        ({"rotation": torch.zeros(3, 2)}, r"rotation must be \[blocks, b, b\], got \[3, 2\]"),
        ({"rotation": torch.zeros(3, 2, 1)}, r"must be \[blocks, b, b\], got \[3, 2, 1\]"),
        ({"rotation": torch.zeros(4, 2, 2)}, "4 blocks of 2 do not fit into 6 columns"),
        ({"rotation": torch.zeros(3, 2, 2).bfloat16()}, "must be float32 or float64, got .*bfloat"),
        ({"gather": random_pair(5)}, "gather is over 5 columns, the tensor has 6"),
        ({"scatter": random_pair(6).int()}, "scatter must be an int64 permutation pair"),
    ],
)
def test_argument_errors(change, message: str) -> None:
    arguments = {"x": torch.randn(4, 6), "rotation": torch.zeros(3, 2, 2)}
    with pytest.raises(RuntimeError, match=message):
        ops.rotate_blocks(**(arguments | change))


def test_a_delta_of_another_dtype_is_refused() -> None:
    with pytest.raises(RuntimeError, match="delta must be of x's dtype"):
        ops.rotate_by_delta(torch.zeros(3, 6), torch.zeros(3, 2, 2).bfloat16())
    with pytest.raises(RuntimeError, match=r"delta must be \[blocks, b, b\], got \[3, 2\]"):
        ops.rotate_by_delta(torch.zeros(3, 6), torch.zeros(3, 2))
