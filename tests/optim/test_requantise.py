"""Merges of int8 weights: what moves, what keeps its bits, and how far 200 of them go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.optim.merge import merge, redraw
from tests.helpers.models import Siblings
from tests.helpers.rotations import turn
from tests.helpers.tolerances import relative_error

ROUNDED_ONCE = 0.011
"""Of a weight of a normal distribution: 0.9 % (docs/numerics.md), and the polar factor's θ⁴."""


def linear(n: int = 96, m: int = 256, dtype: torch.dtype = torch.float32, **config) -> nn.Linear:
    model = nn.Linear(m, n, dtype=dtype)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    poetx.prepare(model, poetx.POETXConfig(**{"block_size": 32, "base": "int8"} | config))
    return model


def state(model: nn.Module) -> list[torch.Tensor]:
    layers = list(prepared_linears(model))
    return [t.clone() for _, m, e in layers for t in (stored_weight(m), e.scale)]


@pytest.mark.parametrize("permutation", ["random", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_rounds_the_weight_once(dtype: torch.dtype, permutation: str) -> None:
    model = turn(linear(n=51, m=230, dtype=dtype, permutation=permutation), 0.1)
    before = model.weight.clone()
    address = stored_weight(model).data_ptr()
    merge(model, redraw=True)
    assert 0.004 < relative_error(model.weight, before) < ROUNDED_ONCE
    e = equivalence_of(model)
    assert (e.draw, int(e.merges), e.skew_in.any().item()) == (2, 1, False)
    assert 0 < abs(poetx.diagnostics(model)["norm_drift_max"]) < 2e-3
    assert stored_weight(model).data_ptr() == address


def test_blocks_that_did_not_turn_keep_their_bits() -> None:
    model = linear()
    e = equivalence_of(model)
    turn(model, 0.1)
    with torch.no_grad():
        e.skew_out.zero_()
        e.skew_in[2:].zero_()  # columns from 64 on
    before = state(model)
    merge(model)
    for old, new, columns in zip(before, state(model), (64, 1), strict=True):
        assert torch.equal(old[:, columns:], new[:, columns:])
        assert not torch.equal(old[:, :columns], new[:, :columns])
    before = state(model)
    merge(model)
    assert all(map(torch.equal, before, state(model)))


def test_a_redraw_moves_whole_groups_where_chunks_are_as_long() -> None:
    for b, moves_whole_groups in ((256, True), (32, False)):
        model = linear(n=128, m=512, block_size=b, permutation="chunked", dtype=torch.bfloat16)
        before = model.weight.clone()
        redraw(model)
        assert equivalence_of(model).draw == 2
        assert torch.equal(model.weight, before) == moves_whole_groups
        assert relative_error(model.weight, before) < ROUNDED_ONCE


def test_the_bits_are_those_of_seed_merge_and_layer() -> None:
    torch.manual_seed(0)
    model = Siblings()
    poetx.prepare(model, poetx.POETXConfig(block_size=16, base="int8"))
    other = copy.deepcopy(model)
    for one in (model, other):
        turn(one, 0.1)
        merge(one, redraw=True)
    assert all(map(torch.equal, state(model), state(other)))
    equivalence_of(other.q).merges += 1
    for one in (model, other):
        turn(one, 0.1, seed=2)
        merge(one)
    same = list(map(torch.equal, state(model), state(other)))
    assert same == [False, False, *[True] * 6] or same == [False, True, *[True] * 6]


def test_200_merges_at_small_angles_drift_by_half_a_per_cent_at_most() -> None:
    """In the norm, and along the weight that exact merges make. Entries walk at random around it
    (docs/numerics.md): that is bounded as well, and not small."""
    model = linear(n=64, m=64, merge_rotation="plain")
    exact = linear(n=64, m=64, merge_rotation="plain", base="dense", dtype=torch.float64)
    exact.weight = model.weight.double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        for skews in zip(*(equivalence_of(one).skews for one in (model, exact)), strict=True):
            step = 1e-4 * torch.randn(skews[0].shape, generator=generator)  # θ of about 0.001
            for skew in skews:
                skew.data.copy_(step)
        for one in (model, exact):
            merge(one)
    weight, goal = model.weight.detach().double(), exact.weight.detach()
    assert abs((weight * goal).sum() / goal.square().sum() - 1) <= 0.005
    assert abs(weight.norm() / goal.norm() - 1) <= 0.005
    assert relative_error(weight, goal) <= 0.08
