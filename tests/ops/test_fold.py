"""`fold_weight`: the effective weight in one op, each side optional."""

from __future__ import annotations

import pytest
import torch

from poetx_compile import ops
from tests.helpers import references
from tests.helpers.references import random_pair, random_skew
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (n, m, blocks_out, b_out, blocks_in, b_in): whole, partial on either side, one block, none, and
# more than a block behind the last one on both sides.
CASES = [
    (6, 8, 3, 2, 2, 4),
    (7, 9, 2, 3, 4, 2),
    (5, 4, 1, 5, 1, 4),
    (3, 11, 0, 2, 2, 5),
    (9, 10, 1, 3, 1, 4),
]


def _arguments(
    case: tuple[int, ...], dtype: torch.dtype = torch.float64, stored: torch.dtype | None = None
):
    """(weight in `stored`, deltas in `dtype`, permutations), without the dtype of the result."""
    n, m, blocks_out, b_out, blocks_in, b_in = case
    weight = torch.randn(n, m, dtype=torch.float64).to(stored or dtype)
    deltas = [
        (references.cayley(random_skew(blocks, b), b, 3) - torch.eye(b)).to(dtype)
        for blocks, b in ((blocks_in, b_in), (blocks_out, b_out))
    ]
    return weight, *deltas, random_pair(m, 1), random_pair(n, 2)


def _expected(weight, delta_in, delta_out, perm_in, perm_out) -> torch.Tensor:
    """``W[perm_out][:, perm_in] = L S D_inᵀ`` with dense matrices."""

    def dense(delta: torch.Tensor, size: int) -> torch.Tensor:
        eye = torch.eye(delta.shape[-1], dtype=torch.float64)
        return references.block_diagonal(delta.double() + eye, size)

    folded = weight.double()
    n, m = weight.shape
    if delta_out is not None:
        folded = dense(delta_out, n) @ folded
        folded = folded if perm_out is None else folded[perm_out[1]]
    if delta_in is not None:
        folded = folded @ dense(delta_in, m).T
        folded = folded if perm_in is None else folded[:, perm_in[1]]
    return folded


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
def test_is_the_dense_product(case, sides) -> None:
    weight, delta_in, delta_out, perm_in, perm_out = _arguments(case)
    args = [delta_in if sides[0] else None, delta_out if sides[1] else None]
    for permuted in (sides, (False, False)):
        pairs = [
            pair if on else None for pair, on in zip((perm_in, perm_out), permuted, strict=True)
        ]
        actual = ops.fold_weight(weight, *args, *pairs, torch.float64)
        assert actual.is_contiguous()
        assert actual.data_ptr() != weight.data_ptr()
        assert_close(actual, _expected(weight, *args, *pairs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype, stored) -> None:
    weight, *deltas, perm_in, perm_out = _arguments((64, 48, 4, 16, 3, 16), dtype, stored)
    actual = ops.fold_weight(weight, *deltas, perm_in, perm_out, dtype)
    assert actual.dtype == dtype
    wide = [delta.float() for delta in deltas]
    expected = ops.fold_weight(weight, *wide, perm_in, perm_out, torch.float32)
    assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_identity_only_permutes(dtype) -> None:
    weight, _, _, perm_in, perm_out = _arguments((12, 8, 3, 4, 2, 4), dtype)
    zero = torch.zeros(3, 4, 4, dtype=dtype)
    actual = ops.fold_weight(weight, zero[:2], zero, perm_in, perm_out, dtype)
    assert torch.equal(actual[perm_out[0]][:, perm_in[0]], weight)


def test_is_the_effective_weight() -> None:
    weight, skew_in, skew_out = torch.randn(20, 12), random_skew(1, 8).float(), random_skew(2, 8)
    skew_out, pairs = skew_out.float(), (random_pair(12), random_pair(20))
    expected = ops.orthogonal_equivalence(weight, skew_in, skew_out, *pairs, 8, 8, 3)
    deltas = [
        ops.rotation_delta(skew, 8, 3, torch.float32, flipped)
        for skew, flipped in ((skew_in, 0), (skew_out, 2))
    ]
    assert_close(ops.fold_weight(weight, *deltas, *pairs, torch.float32), expected)


def test_autocast_changes_nothing() -> None:
    args = _arguments(CASES[0], torch.float32)
    expected = ops.fold_weight(*args, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.fold_weight(*args, torch.float32), expected)


def test_opcheck() -> None:
    args = _arguments(CASES[1], torch.float32)
    rounded = _arguments(CASES[1], torch.bfloat16, torch.float32)
    torch.library.opcheck(ops.fold_weight, (*rounded, torch.bfloat16))
    torch.library.opcheck(ops.fold_weight, (args[0], None, args[2], None, args[4], torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 2, 2)}, "weight must be a floating point matrix"),
        ({1: None}, "perm_in without delta_in"),
        ({2: torch.zeros(3, 2, 1)}, r"delta_out must be \[blocks, b, b\]"),
        ({1: torch.zeros(2, 4, 4).bfloat16()}, "delta_in must have the dtype of the result"),
        ({1: torch.zeros(3, 4, 4)}, "3 blocks of 4 do not fit into 8"),
        ({4: random_pair(5)}, "perm_out"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    args = dict(enumerate((*_arguments(CASES[0], torch.float32), torch.float32))) | change
    with pytest.raises(RuntimeError, match=message):
        ops.fold_weight(*args.values())
