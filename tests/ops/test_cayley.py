"""`cayley_neumann` and `cayley_exact`: values, gradients, products, precision, errors."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from poetx_compile import ops
from poetx_compile.ops.packing import pack, packed_size, unpack
from poetx_compile.ops.polynomial import polynomial, polynomial_backward
from tests.helpers import references
from tests.helpers.references import random_skew
from tests.helpers.tolerances import assert_close, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ORDERS = [1, 2, 3, 4, 5, 6]
BLOCKS = [(0, 4), (3, 1), (2, 2), (1, 3), (3, 5), (2, 16)]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize(("blocks", "b"), BLOCKS)
def test_packing_follows_the_documented_index(blocks: int, b: int) -> None:
    packed = random_skew(blocks, b)
    full = unpack(packed, b)
    assert packed_size(b) == packed.shape[1]
    assert torch.equal(full, references.unpack(packed, b))
    assert torch.equal(pack(full), packed)


@pytest.mark.parametrize(("blocks", "b"), BLOCKS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_neumann_is_the_direct_formula(blocks: int, b: int, order: int, dtype) -> None:
    skew = random_skew(blocks, b, angle=0.8)
    actual = ops.cayley_neumann(skew.to(dtype), b, order)
    assert actual.dtype == dtype
    assert_close(actual, references.cayley(skew, b, order))


@pytest.mark.parametrize(("blocks", "b"), BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_orthogonal_and_the_direct_formula(blocks: int, b: int, dtype) -> None:
    skew = random_skew(blocks, b, angle=0.8)
    actual = ops.cayley_exact(skew.to(dtype), b)
    assert_close(actual, references.cayley(skew, b, None))
    assert_close(actual @ actual.mT, torch.eye(b, dtype=dtype).expand(blocks, b, b))


@pytest.mark.parametrize("order", ORDERS)
def test_neumann_shrinks_a_plane_by_the_documented_factor(order: int) -> None:
    # (I+Q)(I−Q)⁻¹(I−Q^(k+1)) for one plane with eigenvalues ±iθ.
    theta = 0.25
    g = ops.cayley_neumann(torch.tensor([[theta]], dtype=torch.float64), 2, order)[0]
    expected = abs(1 - (1j * theta) ** (order + 1))
    assert torch.linalg.svdvals(g).tolist() == pytest.approx([expected, expected], rel=1e-12)


@pytest.mark.parametrize("order", [*ORDERS, None])
def test_zero_is_exactly_the_identity(order: int | None) -> None:
    for b in (1, 2, 5):
        eye = torch.eye(b).expand(3, b, b)
        assert torch.equal(ops.rotations(torch.zeros(3, packed_size(b)), b, order), eye)


@pytest.mark.parametrize(("blocks", "b"), [(2, 1), (2, 2), (1, 3), (2, 5)])
@pytest.mark.parametrize("order", [*ORDERS, None])
def test_gradcheck(blocks: int, b: int, order: int | None) -> None:
    skew = random_skew(blocks, b, angle=0.8).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ops.rotations(s, b, order), skew)


@pytest.mark.parametrize("order", [*ORDERS, None])
def test_gradient_is_autograds_through_the_direct_formula(order: int | None) -> None:
    skew = random_skew(3, 16, angle=0.8)
    grad = torch.randn(3, 16, 16, dtype=torch.float64)
    gradients = []
    for function in (ops.rotations, references.cayley):
        leaf = skew.clone().requires_grad_()
        function(leaf, 16, order).backward(grad)
        gradients.append(leaf.grad)
    assert_close(*gradients)


@pytest.mark.parametrize("order", [1, 3, 6, None])
@pytest.mark.parametrize(
    ("blocks", "b", "dtype"),
    [(0, 3, torch.float32), (2, 1, torch.float32), (3, 5, torch.float32), (3, 5, torch.float64)],
)
def test_opcheck(blocks: int, b: int, order: int | None, dtype) -> None:
    skew = random_skew(blocks, b, dtype=dtype).requires_grad_()
    if order is None:
        torch.library.opcheck(torch.ops.poetx.cayley_exact.default, (skew, b))
    else:
        torch.library.opcheck(torch.ops.poetx.cayley_neumann.default, (skew, b, order))
        torch.library.opcheck(torch.ops.poetx.cayley_neumann.default, (skew, b, order, True))


@pytest.mark.parametrize("order", [1, 3, None])
def test_opcheck_of_the_backward_ops(order: int | None) -> None:
    skew, grad = random_skew(3, 5), torch.randn(3, 5, 5, dtype=torch.float64)
    if order is None:
        torch.library.opcheck(torch.ops.poetx.cayley_exact_backward.default, (grad, skew, 5))
    else:
        arguments = (grad, skew, 5, order)
        torch.library.opcheck(torch.ops.poetx.cayley_neumann_backward.default, arguments)


def test_non_contiguous_arguments() -> None:
    skew = random_skew(3, 5)
    strided = skew.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(ops.cayley_neumann(strided, 5, 3), ops.cayley_neumann(skew, 5, 3))
    grad = torch.randn(3, 5, 5, dtype=torch.float64)
    backward = torch.ops.poetx.cayley_neumann_backward
    assert_close(backward(grad.mT, strided, 5, 3), backward(grad.mT.contiguous(), skew, 5, 3))


@pytest.mark.parametrize("order", [1, 3, None])
def test_low_precision_is_exact_where_no_kernel_runs(order: int | None) -> None:
    skew = random_skew(3, 5)
    grad = torch.randn(3, 5, 5, dtype=torch.float64)
    results = []
    for narrow in (False, True):
        leaf = skew.clone().requires_grad_()
        out = ops.rotations(leaf, 5, order, narrow)
        results.append((out, *torch.autograd.grad(out, leaf, grad)))
    for precise, permitted in zip(*results, strict=True):
        assert torch.equal(precise, permitted)


def test_the_backward_is_told_that_it_may_be_of_low_precision() -> None:
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.poetx.cayley_neumann_backward.default:
                seen.append(args[2:])
            return func(*args, **(kwargs or {}))

    seen: list[tuple] = []
    with Calls():
        ops.cayley_neumann(random_skew(3, 5).requires_grad_(), 5, 3, True).sum().backward()
        ops.cayley_neumann(random_skew(3, 5).requires_grad_(), 5, 3).sum().backward()
    # What equals the default of the schema may be left out.
    assert [(*call, False)[:3] for call in seen] == [(5, 3, True), (5, 3, False)]


@pytest.mark.parametrize("order", [3, None])
def test_gradient_of_another_shape_is_an_error(order: int | None) -> None:
    skew, grad = torch.zeros(2, 6), torch.zeros(2, 3, 3)
    exact, neumann = torch.ops.poetx.cayley_exact_backward, torch.ops.poetx.cayley_neumann_backward
    backward, rest = (exact, ()) if order is None else (neumann, (order,))
    with pytest.raises(RuntimeError, match=r"grad must be \[2, 4, 4\], got \[2, 3, 3\]"):
        backward(grad, skew, 4, *rest)


class _CountProducts(TorchDispatchMode):
    """Counts batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("order", "forward", "backward"),
    [(1, 1, 1), (2, 2, 2), (3, 2, 4), (4, 3, 6), (5, 3, 8), (6, 4, 10)],
)
def test_number_of_products_is_the_documented_one(order: int, forward: int, backward: int) -> None:
    q = unpack(random_skew(2, 4), 4)
    with _CountProducts() as counter:
        polynomial(q, order)
    assert counter.count == forward
    with _CountProducts() as counter:
        polynomial_backward(torch.randn_like(q), q, order)
    assert counter.count == backward


@pytest.mark.parametrize("order", [3, None])
def test_only_the_packed_vector_is_saved_for_the_backward(order: int | None) -> None:
    skew = random_skew(3, 8).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.rotations(skew, 8, order)
    assert [t.shape for t in saved] == [skew.shape]


@pytest.mark.parametrize("order", [3, None])
def test_autocast_leaves_rotations_in_fp32(order: int | None) -> None:
    skew = random_skew(2, 8, dtype=torch.float32).requires_grad_()
    grad = torch.randn(2, 8, 8)
    plain = ops.rotations(skew, 8, order)
    (expected,) = torch.autograd.grad(plain, skew, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.rotations(skew, 8, order)
        (actual,) = torch.autograd.grad(cast, skew, grad)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("order", [3, None])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_reduced_matmul_precision_does_not_reach_rotations(order: int | None, device: str) -> None:
    skew = random_skew(4, 64, dtype=torch.float32).to(device).requires_grad_()
    grad = torch.randn(4, 64, 64, device=device)
    results = []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        out = ops.rotations(skew, 64, order)
        results.append((out, *torch.autograd.grad(out, skew, grad)))
    assert torch.get_float32_matmul_precision() == "medium"
    for exact, reduced in zip(*results, strict=True):
        assert torch.equal(exact, reduced)


def test_fp32_errors_are_those_of_fp32() -> None:
    skew = random_skew(4, 64, angle=0.25)
    error = relative_error(ops.cayley_neumann(skew.float(), 64, 3), references.cayley(skew, 64, 3))
    assert 0 < error < 1e-6


@pytest.mark.parametrize(
    ("skew", "b", "order", "message"),
    [
        (torch.zeros(2, 5), 4, 3, r"skew must be \[blocks, 6\] for block_size 4, got \[2, 5\]"),
        (torch.zeros(6), 4, 3, r"skew must be \[blocks, 6\]"),
        (torch.zeros(2, 6), 4, 0, "Neumann order must be ≥ 1, got 0"),
        (torch.zeros(2, 0), 0, 3, "block_size must be ≥ 1, got 0"),
        (torch.zeros(2, 6, dtype=torch.bfloat16), 4, 3, "must be float32 or float64, got .*bfloat"),
    ],
)
def test_argument_errors(skew, b: int, order: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.cayley_neumann(skew, b, order)
    meta = skew.to("meta")
    with pytest.raises(RuntimeError, match=message):
        ops.cayley_neumann(meta, b, order)
