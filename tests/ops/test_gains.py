"""Gains in the effective weights that the ops make, against their definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poetx_compile import ops
from poetx_compile.ops.gains import scaled
from tests.helpers.references import random_pair, random_skew
from tests.helpers.tolerances import assert_close


def gains(n: int, m: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.rand(size, dtype=dtype) + 0.5 for size in (m, n)]


def arguments(dtype: torch.dtype = torch.float64) -> tuple:
    """Of both ops, up to the block sizes: W [7, 6], rotations at the identity."""
    skews = (torch.zeros_like(random_skew(blocks, 3, dtype=torch.float64)) for blocks in (2, 2))
    skews = (skew.to(torch.promote_types(dtype, torch.float32)) for skew in skews)
    return (torch.randn(7, 6).to(dtype), *skews, random_pair(6), random_pair(7), 3, 3)


@pytest.mark.parametrize("kept", [(True, True), (True, False), (False, True)])
def test_a_weight_with_gains_is_a_product_with_diagonal_matrices(kept) -> None:
    weight = torch.randn(5, 3).double()
    both = gains(5, 3)
    given = [gain if keep else None for gain, keep in zip(both, kept, strict=True)]
    g_in, g_out = (
        torch.ones(size).double() if gain is None else gain
        for gain, size in zip(given, (3, 5), strict=True)
    )
    assert_close(scaled(weight, *given), g_out.diag() @ weight @ g_in.diag())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["orthogonal_equivalence", "identity_equivalence"])
def test_both_ops_take_gains_and_keep_the_dtype(op: str, dtype) -> None:
    args = (*arguments(dtype), *([3] if op == "orthogonal_equivalence" else []))
    both = gains(7, 6, torch.promote_types(dtype, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):  # changes nothing
        plain = getattr(ops, op)(*args)
        ones = getattr(ops, op)(*args, *map(torch.ones_like, both))
        actual = getattr(ops, op)(*args, *both)
    assert torch.equal(ones, plain)
    assert (actual.dtype, actual.is_contiguous()) == (dtype, True)
    assert_close(actual, scaled(plain.double(), *(gain.double() for gain in both)))


def test_gradients() -> None:
    weight, *rest = arguments()
    leaves = [gain.requires_grad_() for gain in gains(7, 6)]
    skews = [skew.requires_grad_() for skew in rest[:2]]

    def made(skew_in: Tensor, skew_out: Tensor, *both: Tensor) -> Tensor:
        return ops.orthogonal_equivalence(weight, skew_in, skew_out, *rest[2:], 3, *both)

    assert torch.autograd.gradcheck(made, (*skews, *leaves))
    stored = weight[rest[3][0]][:, rest[2][0]]
    rotated = ops.orthogonal_equivalence(stored, *rest, 3, *leaves)
    same = ops.identity_equivalence(weight, *rest, *leaves)
    out = torch.randn(7, 6).double()
    expected = torch.autograd.grad((rotated * out).sum(), [*skews, *leaves])
    actual = torch.autograd.grad((same * out).sum(), [*skews, *leaves])
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(mine, theirs)


def test_a_gain_of_another_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"gain_out must be \[4\] for a weight of \[4, 3\]"):
        scaled(torch.randn(4, 3), None, torch.ones(3))
