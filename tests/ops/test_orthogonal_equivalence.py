"""`orthogonal_equivalence`: the definition, its gradients, and the input-centric form of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from poetx_compile import ops
from tests.helpers import references
from tests.helpers.references import random_pair, random_skew
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (n, m, b_out, b_in): whole, partial, odd, one block, a side of size 1.
CASES = [(8, 12, 4, 3), (7, 11, 3, 2), (5, 9, 5, 4), (1, 7, 1, 3), (6, 1, 2, 1), (13, 13, 2, 13)]


def _arguments(n: int, m: int, b_out: int, b_in: int, dtype=torch.float64, angle: float = 0.3):
    """Weight, skew_in, skew_out, perm_in, perm_out, block_in, block_out."""
    blocks_in, blocks_out = (0 if d == 1 else d // b for d, b in ((m, b_in), (n, b_out)))
    skew_dtype = torch.promote_types(dtype, torch.float32)
    return (
        torch.randn(n, m, dtype=torch.float64).to(dtype),
        random_skew(blocks_in, b_in, angle=angle, dtype=skew_dtype, seed=1),
        random_skew(blocks_out, b_out, angle=angle, dtype=skew_dtype, seed=2),
        random_pair(m, 3),
        random_pair(n, 4),
        b_in,
        b_out,
    )


def _definition(arguments, order: int | None) -> torch.Tensor:
    weight, skew_in, skew_out, perm_in, perm_out, b_in, b_out = arguments
    g_in = references.cayley(skew_in.double(), b_in, order)
    g_out = references.cayley(skew_out.double(), b_out, order)
    return references.effective_weight(weight.double(), g_in, g_out, perm_in, perm_out)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", [1, 3, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_the_definition(case, order: int | None, dtype) -> None:
    arguments = _arguments(*case, dtype)
    actual = ops.orthogonal_equivalence(*arguments, order)
    assert actual.dtype == dtype
    assert_close(actual, _definition(arguments, order))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_skew_undoes_the_permutations_bitwise(dtype) -> None:
    for case in CASES:
        arguments = _arguments(*case, dtype, angle=0.0)
        weight, _, _, perm_in, perm_out, *_ = arguments
        actual = ops.orthogonal_equivalence(*arguments, 3)
        assert torch.equal(actual[perm_out[0]][:, perm_in[0]], weight)


@pytest.mark.parametrize("case", CASES)
def test_the_weight_is_contiguous_like_a_plain_one(case) -> None:
    # BLAS sums in another order for a transposed operand, and safetensors refuses one.
    assert ops.orthogonal_equivalence(*_arguments(*case), 3).is_contiguous()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", [1, 3, 4, None])
def test_gradcheck(case, order: int | None) -> None:
    weight, skew_in, skew_out, *rest = _arguments(*case)

    def function(*skews: torch.Tensor) -> torch.Tensor:
        return ops.orthogonal_equivalence(weight, *skews, *rest, order)

    leaves = tuple(t.requires_grad_() for t in (skew_in, skew_out))
    # Along random directions: every entry of the ops it is made of is checked in their own tests.
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(function(*leaves).sum(), weight, allow_unused=True)
    assert gradient is None, "the stored weight is a constant"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("leading", [(9,), (2, 3), (), (0,)])
@pytest.mark.parametrize("order", [3, None])
def test_rotating_activations_is_the_same_layer(case, leading, order: int | None) -> None:
    """Input-centric: permute, rotate, linear, rotate, permute, then the bias."""
    n, m, *_ = case
    weight, skew_in, skew_out, perm_in, perm_out, b_in, b_out = _arguments(*case)
    weight.requires_grad_(False)
    x, bias = torch.randn(*leading, m, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    grad = torch.randn(*leading, n, dtype=torch.float64)

    def weight_centric(x, bias, skew_in, skew_out):
        effective = ops.orthogonal_equivalence(
            weight, skew_in, skew_out, perm_in, perm_out, b_in, b_out, order
        )
        return F.linear(x, effective, bias)

    def input_centric(x, bias, skew_in, skew_out):
        z = ops.rotate_blocks(x, ops.rotations(skew_in, b_in, order), perm_in, None)
        u = F.linear(z, weight)
        v = ops.rotate_blocks(u, ops.rotations(skew_out, b_out, order), None, perm_out)
        return v + bias

    results = []
    for function in (weight_centric, input_centric):
        leaves = [t.detach().clone().requires_grad_() for t in (x, bias, skew_in, skew_out)]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for what, expected, actual in zip(
        ("output", "x", "bias", "skew_in", "skew_out"), *results, strict=True
    ):
        assert_close(actual, expected, what=what)


def test_autocast_leaves_the_effective_weight_alone() -> None:
    weight, skew_in, skew_out, *rest = _arguments(*CASES[1], torch.float32)
    leaves = [skew_in.requires_grad_(), skew_out.requires_grad_()]
    plain = ops.orthogonal_equivalence(weight, *leaves, *rest, 3)
    grad = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, leaves, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.orthogonal_equivalence(weight, *leaves, *rest, 3)
        actual = torch.autograd.grad(cast, leaves, grad)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", [3, None])
def test_opcheck(case, order: int | None) -> None:
    weight, skew_in, skew_out, *rest = _arguments(*case, torch.float32)
    arguments = (weight, skew_in.requires_grad_(), skew_out.requires_grad_(), *rest, order)
    # Composite: its autograd is that of the ops it decomposes into, none is registered for it.
    torch.library.opcheck(
        torch.ops.poetx.orthogonal_equivalence.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.randn(8), r"weight must be a floating point matrix, got .*float32 \[8\]"),
        (0, torch.zeros(8, 12, dtype=torch.int8), "weight must be a floating point matrix"),
        (1, torch.zeros(5, 3), "5 blocks of 3 do not fit into 12 columns"),
        (2, torch.zeros(2, 5), r"skew must be \[blocks, 6\] for block_size 4, got \[2, 5\]"),
        (3, random_pair(11), "perm_in is over 11 columns, the tensor has 12"),
        (4, torch.arange(8), "perm_out must be an int64 permutation pair"),
    ],
)
def test_argument_errors(position: int, value, message: str) -> None:
    arguments = list(_arguments(*CASES[0], torch.float32))
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        ops.orthogonal_equivalence(*arguments, 3)


@pytest.mark.parametrize("order", [3, None])
def test_forward_mode_and_transforms_of_torch_func_are_those_of_reverse_mode(order) -> None:
    weight, *skews, p, q, b_in, b_out = _arguments(8, 12, 4, 3)
    tangents = tuple(torch.randn_like(s) for s in skews)
    wanted = torch.randn(8, 12, dtype=torch.float64)

    def loss(s_in, s_out):
        actual = ops.orthogonal_equivalence(weight, s_in, s_out, p, q, b_in, b_out, order)
        return (actual * wanted).sum()

    leaves = [s.clone().requires_grad_() for s in skews]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    slope = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    assert abs(slope) > 1e-3
    assert_close(torch.func.jvp(loss, tuple(skews), tangents)[1], slope)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(s, t) for s, t in zip(skews, tangents, strict=True)]
        assert_close(forward_ad.unpack_dual(loss(*duals)).tangent, slope)
    for actual, gradient in zip(torch.func.grad(loss, (0, 1))(*skews), gradients, strict=True):
        assert_close(actual, gradient)
    stacked = [torch.stack([s, 2 * s]) for s in skews]
    each = torch.func.vmap(torch.func.grad(loss, (0, 1)))(*stacked)
    for actual, gradient in zip(each, gradients, strict=True):
        assert_close(actual[0], gradient)


@pytest.mark.parametrize("order", [1, 3, None])
def test_a_gradient_of_the_rotations_has_gradients(order) -> None:
    weight, *skews, p, q, b_in, b_out = _arguments(5, 7, 3, 3)

    def effective(s_in, s_out):
        return ops.orthogonal_equivalence(weight, s_in, s_out, p, q, b_in, b_out, order)

    assert torch.autograd.gradgradcheck(effective, [s.requires_grad_() for s in skews])
