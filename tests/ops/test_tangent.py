"""`rotation_tangent`: its derivative is that of a rotation about the one that was folded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poetx_compile import ops
from poetx_compile.ops.packing import packed_size
from tests.helpers import references
from tests.helpers.references import random_skew
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ORDERS = [1, 2, 3, 5, None]
BLOCKS = [(0, 4), (3, 1), (2, 2), (1, 3), (3, 5), (2, 16)]


def oracle(skew: Tensor, b: int, order: int | None) -> Tensor:
    """``G(Q') G(Q)⁻¹ − I`` as a function of Q' at Q' = Q."""
    inverse = torch.linalg.inv(references.cayley(skew.detach(), b, order))
    rotation = references.cayley(skew, b, order) + 0 * skew.sum()  # b = 1 reads no entry
    return rotation @ inverse - torch.eye(b, dtype=skew.dtype)


def gradient(function, skew: Tensor, grad: Tensor, *args) -> Tensor:
    leaf = skew.clone().requires_grad_()
    return torch.autograd.grad(function(leaf, *args), leaf, grad)[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("blocks", "b"), BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_that_of_the_relative_rotation(blocks, b, order, dtype) -> None:
    skew = random_skew(blocks, b, angle=0.5)
    grad = torch.randn(blocks, b, b, dtype=torch.float64)
    actual = gradient(ops.rotation_tangent, skew.to(dtype), grad.to(dtype), b, order)
    assert actual.dtype == dtype
    assert_close(actual, gradient(oracle, skew, grad, b, order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("flipped", [1, 3])
def test_the_gradient_of_a_transposed_block_is_that_at_minus_q(order, flipped) -> None:
    skew = random_skew(3, 5, angle=0.5)
    grad = torch.randn(3, 5, 5, dtype=torch.float64)
    sign = torch.ones(3, 1, dtype=torch.float64)
    sign[3 - flipped :] = -1

    def negated(leaf: Tensor) -> Tensor:
        return oracle(sign * leaf, 5, order)

    actual = gradient(ops.rotation_tangent, skew, grad, 5, order, False, flipped)
    assert_close(actual, gradient(negated, skew, grad))


@pytest.mark.parametrize("order", ORDERS)
def test_value_is_zero(order) -> None:
    tangent = ops.rotation_tangent(random_skew(3, 5, dtype=torch.float32), 5, order)
    assert torch.equal(tangent, torch.zeros(3, 5, 5))


@pytest.mark.parametrize("left", [False, True])
def test_gradient_leads_back_through_a_product_that_was_folded(left) -> None:
    # y = x G, or y = Gᵀ x, with a constant G: what reaches Q through I + E is what reaches it
    # through G itself. From the left it is the tangent of −Q.
    skew = random_skew(1, 8)
    x, weights = torch.randn(2, 1, 8, 8, dtype=torch.float64)

    def rotated(leaf: Tensor) -> Tensor:
        g = references.cayley(leaf, 8, 3)
        return g.mT @ x if left else x @ g

    def folded(leaf: Tensor) -> Tensor:
        g = references.cayley(leaf.detach(), 8, 3)
        moved = torch.eye(8, dtype=leaf.dtype)
        moved = moved + ops.rotation_tangent(leaf, 8, 3, False, int(left))
        return moved @ g.mT @ x if left else x @ moved @ g

    assert_close(gradient(folded, skew, weights), gradient(rotated, skew, weights))


@pytest.mark.parametrize("order", [1, 3, None])
def test_low_precision_is_exact_where_no_kernel_runs(order) -> None:
    skew, grad = random_skew(3, 5), torch.randn(3, 5, 5, dtype=torch.float64)
    results = [
        gradient(ops.rotation_tangent, skew, grad, 5, order, narrow) for narrow in (False, True)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("order", [1, 3, None])
@pytest.mark.parametrize(
    ("blocks", "b", "dtype"),
    [(0, 3, torch.float32), (2, 1, torch.float32), (3, 5, torch.float32), (3, 5, torch.float64)],
)
def test_opcheck(blocks, b, order, dtype) -> None:
    skew = random_skew(blocks, b, dtype=dtype)
    arguments = (skew.clone().requires_grad_(), b, order, True, blocks // 2)
    torch.library.opcheck(torch.ops.poetx.rotation_tangent.default, arguments)
    arguments = (torch.randn(blocks, b, b, dtype=dtype), skew, b, order, True, blocks // 2)
    torch.library.opcheck(torch.ops.poetx.rotation_tangent_backward.default, arguments)


def test_non_contiguous_arguments() -> None:
    skew, grad = random_skew(3, 5), torch.randn(3, 5, 5, dtype=torch.float64).mT
    strided = skew.T.contiguous().T
    backward = torch.ops.poetx.rotation_tangent_backward
    actual = backward(grad, strided, 5, 3)
    assert actual.is_contiguous()
    assert_close(actual, backward(grad.contiguous(), skew, 5, 3))


@pytest.mark.parametrize("order", [3, None])
def test_only_the_packed_vector_is_saved_for_the_backward(order) -> None:
    skew = random_skew(3, 8).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.rotation_tangent(skew, 8, order)
    assert [t.shape for t in saved] == [skew.shape]


@pytest.mark.parametrize("order", [3, None])
def test_autocast_and_reduced_precision_do_not_reach_the_gradient(order) -> None:
    skew = random_skew(2, 64, dtype=torch.float32)
    grad = torch.randn(2, 64, 64)
    expected = gradient(ops.rotation_tangent, skew, grad, 64, order)
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradient(ops.rotation_tangent, skew, grad, 64, order)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("skew", "b", "order", "message"),
    [
        (torch.zeros(2, 5), 4, 3, r"skew must be \[blocks, 6\] for block_size 4, got \[2, 5\]"),
        (torch.zeros(2, 5), 4, None, r"skew must be \[blocks, 6\]"),
        (torch.zeros(2, 6), 4, 0, "Neumann order must be ≥ 1, got 0"),
        (torch.zeros(2, 0), 0, 3, "block_size must be ≥ 1, got 0"),
        (torch.zeros(2, 6, dtype=torch.float16), 4, 3, "must be float32 or float64, got .*float16"),
    ],
)
def test_argument_errors(skew, b, order, message) -> None:
    for place in (skew, skew.to("meta")):
        with pytest.raises(RuntimeError, match=message):
            ops.rotation_tangent(place, b, order)
        grad = torch.zeros(2, b, b, device=place.device)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.poetx.rotation_tangent_backward(grad, place, b, order)


@pytest.mark.parametrize(("grad", "got"), [((2, 3, 3), "3, 3"), ((1, 4, 4), "1, 4, 4")])
def test_gradient_of_another_shape_is_an_error(grad, got) -> None:
    skew = torch.zeros(2, packed_size(4))
    with pytest.raises(RuntimeError, match=rf"grad must be \[2, 4, 4\], got .*{got}"):
        torch.ops.poetx.rotation_tangent_backward(torch.zeros(grad), skew, 4, 3)
