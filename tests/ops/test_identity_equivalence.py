"""`identity_equivalence`: the weight itself, with the gradients of rotations that are zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from poetx_compile import ops
from tests.helpers.references import random_pair
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (n, m, b_out, b_in): whole, partial, odd, one block, a side of size 1.
CASES = [(8, 12, 4, 3), (7, 11, 3, 2), (5, 9, 5, 4), (1, 7, 1, 3), (6, 1, 2, 1), (13, 13, 2, 13)]


def _arguments(n: int, m: int, b_out: int, b_in: int, dtype=torch.float64, chunk: int = 1):
    """Weight, skew_in, skew_out (zeros of stride 0), perm_in, perm_out, block_in, block_out."""
    blocks_in, blocks_out = (0 if d == 1 else d // b for d, b in ((m, b_in), (n, b_out)))
    zero = torch.zeros(1, dtype=torch.promote_types(dtype, torch.float32))
    return (
        torch.randn(n, m, dtype=torch.float64).to(dtype),
        zero.expand(blocks_in, b_in * (b_in - 1) // 2),
        zero.expand(blocks_out, b_out * (b_out - 1) // 2),
        random_pair(m // chunk, 3),
        random_pair(n // chunk, 4),
        b_in,
        b_out,
    )


def _leaves(arguments):
    """The skew parameters, requiring gradients: stride 0 stays."""
    return [skew.detach().requires_grad_() for skew in arguments[1:3]]


def _reference(arguments, skews):
    """`orthogonal_equivalence` of the same weight in permuted coordinates, in float64."""
    weight, _, _, perm_in, perm_out, b_in, b_out = arguments
    (n, m), (p, q) = weight.shape, (perm_in, perm_out)
    columns = (p[0][:, None] * (m // p.shape[1]) + torch.arange(m // p.shape[1])).flatten()
    rows = (q[0][:, None] * (n // q.shape[1]) + torch.arange(n // q.shape[1])).flatten()
    permuted = weight.double()[rows][:, columns]
    skews = [skew.double().contiguous() for skew in skews]
    return ops.orthogonal_equivalence(permuted, *skews, p, q, b_in, b_out, 3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_the_weight_with_the_gradients_of_rotations_at_zero(case, dtype) -> None:
    arguments = _arguments(*case, dtype)
    weight, _, _, *rest = arguments
    skews, wanted = _leaves(arguments), torch.randn(weight.shape, dtype=torch.float64).to(dtype)
    weight.requires_grad_()
    actual = ops.identity_equivalence(weight, *skews, *rest)
    assert actual.dtype == dtype
    assert actual.data_ptr() == weight.data_ptr(), "a copy"
    grads = torch.autograd.grad(actual, [*skews, weight], wanted, allow_unused=True)
    assert grads[2] is None, "the weight is a constant"
    expected = _reference(arguments, skews)
    assert torch.equal(expected.to(dtype), weight)
    expected = torch.autograd.grad(expected, skews, wanted.double())
    for mine, theirs in zip(grads, expected, strict=False):
        assert mine.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(mine, theirs)


def test_chunks_of_columns() -> None:
    arguments = _arguments(12, 8, 4, 4, chunk=2)
    skews, wanted = _leaves(arguments), torch.randn(12, 8, dtype=torch.float64)
    actual = ops.identity_equivalence(arguments[0], *skews, *arguments[3:])
    expected = _reference(arguments, skews)
    for mine, theirs in zip(
        torch.autograd.grad(actual, skews, wanted),
        torch.autograd.grad(expected, skews, wanted),
        strict=True,
    ):
        assert_close(mine, theirs)


def test_values_of_the_skew_parameters_are_not_read() -> None:
    weight, _, _, *rest = _arguments(8, 12, 4, 3)
    skews = [torch.full((blocks, size), torch.nan) for blocks, size in ((4, 3), (2, 6))]
    assert torch.equal(ops.identity_equivalence(weight, *skews, *rest), weight)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_is_not_computed(frozen: int) -> None:
    arguments = _arguments(8, 12, 4, 3)
    skews = _leaves(arguments)
    skews[frozen].requires_grad_(False)
    y = ops.identity_equivalence(arguments[0], *skews, *arguments[3:])
    y.square().sum().backward()
    assert skews[frozen].grad is None
    assert skews[1 - frozen].grad is not None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_also_where_the_weight_leaves_the_graph(backend: str) -> None:
    """AOTAutograd builds an output that is a view of an input from the input: without gradients."""
    arguments = _arguments(8, 12, 4, 3)
    weight, _, _, *rest = arguments
    x = torch.randn(5, 12, dtype=torch.float64)

    def both(x, *skews):
        effective = ops.identity_equivalence(weight, *skews, *rest)
        return effective, F.linear(x, effective)

    results = []
    for function in (both, torch.compile(both, backend=backend)):
        skews = _leaves(arguments)
        effective, y = function(x, *skews)
        assert torch.equal(effective, weight)
        loss = y.square().sum() + effective.pow(3).sum()
        results.append(torch.autograd.grad(loss, skews))
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs)


def test_opcheck() -> None:
    arguments = _arguments(7, 11, 3, 2, torch.float32)
    torch.library.opcheck(
        torch.ops.poetx.identity_equivalence.default,
        (arguments[0], *_leaves(arguments), *arguments[3:]),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_autocast_leaves_the_weight_and_the_gradients_alone() -> None:
    arguments = _arguments(8, 12, 4, 3, torch.float32)
    skews, wanted = _leaves(arguments), torch.randn(8, 12)

    def gradients():
        weight = ops.identity_equivalence(arguments[0], *skews, *arguments[3:])
        return torch.autograd.grad(weight, skews, wanted)

    expected = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, gradients(), expected))


def test_transforms_of_torch_func_are_those_of_reverse_mode() -> None:
    arguments = _arguments(8, 12, 4, 3)
    skews, wanted = _leaves(arguments), torch.randn(8, 12, dtype=torch.float64)

    def loss(*skews):
        effective = ops.identity_equivalence(arguments[0], *skews, *arguments[3:])
        return (effective * wanted).sum()

    expected = torch.autograd.grad(loss(*skews), skews)
    tangents = tuple(torch.randn_like(g) for g in expected)
    slope = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    assert abs(slope) > 1e-3
    plain = tuple(skew.detach().clone() for skew in skews)  # `jvp` writes into stride 0
    assert_close(torch.func.jvp(loss, plain, tangents)[1], slope)
    for mine, theirs in zip(torch.func.grad(loss, (0, 1))(*plain), expected, strict=True):
        assert_close(mine, theirs)


def test_one_level_of_differentiation() -> None:
    arguments = _arguments(8, 12, 4, 3)
    skews = _leaves(arguments)
    weight = ops.identity_equivalence(arguments[0], *skews, *arguments[3:])
    (gradient,) = torch.autograd.grad(weight.pow(3).sum(), skews[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.randn(8), r"weight must be a floating point matrix, got .*float32 \[8\]"),
        (1, torch.zeros(5, 3), "5 blocks of 3 do not fit into 12 columns"),
        (2, torch.zeros(2, 5), r"skew must be \[blocks, 6\] for block_size 4, got \[2, 5\]"),
        (3, random_pair(11), "perm_in is over 11 columns, the tensor has 12"),
    ],
)
def test_argument_errors(position: int, value, message: str) -> None:
    arguments = list(_arguments(*CASES[0], torch.float32))
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        ops.identity_equivalence(*arguments)
