"""`folded_linear`: a plain product whose tangents give the gradients of the rotations."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from poetx_compile import ops
from tests.helpers.references import random_pair, random_skew
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _layer(n: int, m: int, b: int, dtype: torch.dtype = torch.float64):
    """(stored weight, skew_in, skew_out, perm_in, perm_out)."""
    b_in, b_out = min(b, m), min(b, n)
    skews = [
        random_skew(size // side, side, seed=side, dtype=dtype).requires_grad_()
        for size, side in ((m, b_in), (n, b_out))
    ]
    weight = torch.randn(n, m, dtype=torch.float64).to(dtype)
    return weight, *skews, random_pair(m, 1), random_pair(n, 2)


def _folded(x, layer, b_in, b_out, order, sides=(True, True)) -> torch.Tensor:
    """The layer by the folded formulation; a side that is off takes no part."""
    weight, skew_in, skew_out, perm_in, perm_out = layer
    deltas, tangents, pairs = [], [], []
    for on, skew, b, pair, flipped in (
        (sides[0], skew_in, b_in, perm_in, 0),
        (sides[1], skew_out, b_out, perm_out, len(skew_out)),
    ):
        deltas.append(ops.rotation_delta(skew.detach(), b, order, x.dtype, flipped) if on else None)
        tangents.append(ops.rotation_tangent(skew, b, order, False, flipped) if on else None)
        pairs.append(pair if on else None)
    folded = ops.fold_weight(weight, *deltas, *pairs, x.dtype)
    return ops.folded_linear(x, folded, *tangents, *pairs)


@pytest.mark.parametrize(("n", "m", "b"), [(6, 8, 2), (7, 9, 3), (5, 4, 8), (2, 11, 4)])
@pytest.mark.parametrize("order", [1, 2, 3, 4, None])
def test_every_gradient_is_that_of_the_effective_weight(n, m, b, order) -> None:
    layer = _layer(n, m, b)
    b_in, b_out = min(b, m), min(b, n)
    x = torch.randn(2, 5, m, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, n, dtype=torch.float64)
    leaves = (x, layer[1], layer[2])

    effective = ops.orthogonal_equivalence(*layer, b_in, b_out, order)
    expected = torch.nn.functional.linear(x, effective)
    actual = _folded(x, layer, b_in, b_out, order)
    assert_close(actual, expected)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    for mine, theirs in zip(
        torch.autograd.grad((actual * weights).sum(), leaves), wanted, strict=True
    ):
        assert_close(mine, theirs)


def test_one_side_alone() -> None:
    layer = _layer(6, 8, 2)
    x, weights = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    for sides, skew in (((True, False), layer[1]), ((False, True), layer[2])):
        (grad,) = torch.autograd.grad((weights * _folded(x, layer, 2, 2, 3, sides)).sum(), skew)
        zero = torch.zeros_like(layer[2] if sides[0] else layer[1])
        skews = (layer[1], zero) if sides[0] else (zero, layer[2])
        identity = torch.arange(6 if sides[0] else 8).repeat(2, 1)
        pairs = (layer[3], identity) if sides[0] else (identity, layer[4])
        effective = ops.orthogonal_equivalence(layer[0], *skews, *pairs, 2, 2, 3)
        (expected,) = torch.autograd.grad((weights * (x @ effective.T)).sum(), skew)
        assert_close(grad, expected)


class _Calls(TorchDispatchMode):
    """The names of the products of blocks that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("poetx::") and "product" in name:
            self.products.append(name.removeprefix("poetx::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("b_in", "b_out", "wanted", "products"),
    [
        (2, 2, (True, True), ["stacked_block_products"]),
        (4, 2, (True, True), ["block_product"] * 2),  # two sizes do not stack
        (2, 2, (True, False), ["block_product"]),
        (2, 2, (False, True), ["block_product"]),
        (2, 2, (False, False), []),
    ],
)
def test_products_of_blocks(b_in, b_out, wanted, products) -> None:
    weight, x = torch.randn(6, 8), torch.randn(3, 8, requires_grad=True)
    tangents = [
        torch.zeros(size // b, b, b, requires_grad=on)
        for size, b, on in ((8, b_in, wanted[0]), (6, b_out, wanted[1]))
    ]
    v = ops.folded_linear(x, weight, *tangents, None, random_pair(6))
    with _Calls() as calls:
        torch.autograd.grad(v.sum(), [x, *(t for t in tangents if t.requires_grad)])
    assert calls.products == products


def test_gradients_accumulate_over_calls() -> None:
    layer = _layer(6, 8, 4)
    x = torch.randn(4, 8, dtype=torch.float64)
    (together,) = torch.autograd.grad(_folded(x, layer, 4, 4, 3).square().sum(), layer[1])
    parts = [
        torch.autograd.grad(_folded(part, layer, 4, 4, 3).square().sum(), layer[1])[0]
        for part in x.split(1)
    ]
    assert_close(sum(parts), together)


def test_a_frozen_side_keeps_nothing() -> None:
    layer = _layer(6, 8, 2)
    weight, perm_in, perm_out = layer[0], layer[3], layer[4]
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.folded_linear(
            x, weight, *(torch.zeros(n // 2, 2, 2) for n in (8, 6)), perm_in, perm_out
        )
    assert [t.shape for t in kept] == [weight.shape]
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_close(grad, torch.ones(3, 6, dtype=torch.float64) @ weight)


def test_autocast_casts_the_input() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.folded_linear(x, weight, None, None, None, None)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_gradcheck_and_opcheck() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 8, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: ops.folded_linear(x, weight, None, None, None, None), (x,))
    tangents = [torch.zeros(n // 2, 2, 2, requires_grad=True) for n in (8, 6)]
    args = (torch.randn(3, 8), weight.float(), *tangents, random_pair(8), random_pair(6))
    torch.library.opcheck(ops.folded_linear, args)


@pytest.mark.parametrize("tokens", [(0,), (2, 0), ()])
def test_leading_shapes(tokens) -> None:
    layer = _layer(6, 8, 2)
    x = torch.randn(*tokens, 8, dtype=torch.float64)
    y = _folded(x, layer, 2, 2, 3)
    assert y.shape == (*tokens, 6)
    (grad,) = torch.autograd.grad(y.sum(), layer[1])
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 7)}, r"x must be \[..., m\]"),
        ({1: torch.zeros(6, 8).double()}, "x and weight must have one dtype"),
        ({2: None}, "perm_in without tangent_in"),
        ({3: torch.zeros(4, 2, 2)}, "tangent_out must be"),
        ({5: random_pair(5)}, "perm_out"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    tangents = [torch.zeros(n // 2, 2, 2) for n in (8, 6)]
    args = (torch.zeros(3, 8), torch.zeros(6, 8), *tangents, random_pair(8), random_pair(6))
    with pytest.raises(RuntimeError, match=message):
        ops.folded_linear(*(dict(enumerate(args)) | change).values())
