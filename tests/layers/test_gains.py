"""Gains of prepared layers (`POETXConfig.gains`): what they do, and who knows of them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import poetx_compile as poetx
from poetx_compile.errors import IncompatibleStateError, UnownedRotationsError
from poetx_compile.inspect.diagnostics import effective_weight
from poetx_compile.layers.prepared import (
    equivalence_of,
    prepared_linears,
    stored_weight,
    trained_parameters,
)
from poetx_compile.layers.trained import trained
from poetx_compile.optim.groups import GAINS
from poetx_compile.optim.merge import merge
from tests.helpers.models import MLP, SwiGLU
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close

both_kinds = pytest.mark.parametrize("gains", ["rows", "both"])
X = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))


def gains_of(model: nn.Module) -> list[nn.Parameter]:
    return [gain for _, _, e in prepared_linears(model) for gain in e.gains.values()]


@torch.no_grad()
def scaled(model: nn.Module, gains: str = "both", **config: Any) -> nn.Module:
    """`model` prepared and turned, with gains away from one."""
    poetx.prepare(model, poetx.POETXConfig(block_size=4, gains=gains, **config))
    for number, gain in enumerate(gains_of(model)):
        values = torch.rand(gain.shape, generator=torch.Generator().manual_seed(number))
        gain.copy_(0.5 + values)
    return model if config.get("merge_interval") == 1 else turn(model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, run: Any = None) -> float:
    optimizer.zero_grad()
    loss = F.mse_loss((model if run is None else run)(X), TARGET)
    loss.backward()
    optimizer.step()
    return loss.item()


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_prepare_adds_gains_and_changes_no_bit(gains, dtype) -> None:
    model = MLP().to(dtype)
    expected, total = model(X.to(dtype)), sum(p.numel() for p in model.parameters())
    report = poetx.prepare(model, poetx.POETXConfig(block_size=4, gains=gains))
    assert torch.equal(model(X.to(dtype)), expected)
    shapes = {n.rpartition(".")[2]: list(p.shape) for n, p in model.up.named_parameters()}
    assert shapes.get("gain_in") == ([12] if gains == "both" else None)
    assert shapes["gain_out"] == [22]
    assert {p.dtype for p in gains_of(model)} == {torch.promote_types(dtype, torch.float32)}
    assert report.total == total
    assert report.trainable == sum(p.numel() for p in trained_parameters(model))


@both_kinds
def test_the_weight_and_the_gradients_of_gains_against_float64(gains) -> None:
    linear = scaled(nn.Linear(13, 9), gains)
    e = equivalence_of(linear)
    with torch.no_grad():
        rotated = e.effective(stored_weight(linear), *e.skews, None, None).double()
    g_in = torch.ones(13).double() if e.gain_in is None else e.gain_in.detach().double()
    g_out = e.gain_out.detach().double()
    assert_close(linear.weight, g_out.diag() @ rotated @ g_in.diag(), torch.float32)
    x, out = torch.randn(5, 13), torch.randn(5, 9)
    (linear(x) * out).sum().backward()
    grad = out.double().T @ x.double()
    assert_close(e.gain_out.grad, (grad * rotated) @ g_in)
    if gains == "both":
        assert_close(e.gain_in.grad, g_out @ (grad * rotated))


def test_merges_exports_and_copies_keep_the_function() -> None:
    model = scaled(SwiGLU().double(), merge_rotation="plain")
    x = torch.randn(5, 16).double()
    expected, before = model(x), [gain.clone() for gain in gains_of(model)]
    twin = pickle.loads(pickle.dumps(model.state_dict()))
    copied = copy.deepcopy(model)
    merge(model)
    assert_close(model(x), expected)
    assert all(map(torch.equal, gains_of(model), before))
    assert torch.equal(effective_weight(model.up_proj), model.up_proj.weight)
    plain = SwiGLU().double()
    plain.load_state_dict(poetx.plain_state_dict(model))
    assert_close(plain(x), expected)
    assert_close(poetx.merge_and_unload(model)(x), expected)
    with torch.no_grad():
        gains_of(copied)[0].fill_(3)
    assert not any((gain == 3).all() for gain in gains_of(model))
    plain.load_state_dict(poetx.plain_state_dict(twin))
    assert not torch.equal(plain(x), copied(x))


def test_a_new_weight_puts_gains_back_to_one() -> None:
    linear = scaled(nn.Linear(12, 8))
    linear.weight = weight = torch.randn(8, 12)
    assert torch.equal(linear.weight, weight)
    with torch.no_grad():
        gains_of(turn(linear))[0].mul_(2)
    nn.init.ones_(linear.weight)
    assert (linear.weight == 1).all()
    assert all((gain == 1).all() for gain in gains_of(linear))


def test_states_load_where_the_gains_are_the_same() -> None:
    saved, other = scaled(MLP()), scaled(MLP())
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(X), saved(X))
    plain = MLP()
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(X), plain(X))
    rows, none = scaled(MLP(), "rows"), scaled(MLP(), "none")
    before = rows(X)
    for model, state, said in (
        (rows, saved, "up: gain_in, gain_out in the state, and gains='rows' here"),
        (rows, none, "up: no gains in the state, and gains='rows' here"),
        (none, rows, "up: gain_out in the state, and gains='none' here"),
    ):
        with pytest.raises(IncompatibleStateError, match=said):
            model.load_state_dict(state.state_dict(), strict=False)
    assert torch.equal(rows(X), before)
    none.load_state_dict(poetx.plain_state_dict(saved.state_dict()))
    assert_close(none(X), saved(X))


@pytest.mark.parametrize("merged", [True, False])
def test_states_of_the_other_form_load_with_their_gains(merged: bool) -> None:
    saved = scaled(MLP(), merge_interval=1 if merged else 7)
    other = scaled(MLP(), merge_interval=7 if merged else 1)
    other.load_state_dict(saved.state_dict())
    assert_close(other(X), saved(X))
    assert all(map(torch.equal, gains_of(other), gains_of(saved)))
    plain = MLP()
    plain.load_state_dict(poetx.plain_state_dict(saved))
    assert_close(plain(X), saved(X))
    nn.init.ones_(saved.up.weight)
    assert (saved.up.weight == 1).all()


def test_meta_moves_and_casts() -> None:
    with torch.device("meta"):
        model = MLP()
    poetx.prepare(model, poetx.POETXConfig(block_size=4, gains="both"))
    model.to_empty(device="cpu")
    assert all((gain == 1).all() for gain in gains_of(model))
    assert {gain.dtype for gain in gains_of(model.bfloat16())} == {torch.float32}


def test_a_cached_weight_knows_of_its_gains() -> None:
    linear = scaled(nn.Linear(12, 8), "rows").eval()
    with torch.no_grad():
        before = linear(X)
        assert linear(X) is not before
        equivalence_of(linear).gain_out.mul_(2)
        assert_close(linear(X) - linear.bias, 2 * (before - linear.bias))


def test_freezing_the_weight_freezes_the_gains() -> None:
    linear = scaled(nn.Linear(12, 8))
    linear.weight.requires_grad_(False)
    assert not any(gain.requires_grad for gain in gains_of(linear))
    linear.weight.requires_grad_(True)
    assert all(gain.requires_grad for gain in gains_of(linear))


# --- optimisers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("kind", [poetx.POETXAdamW, poetx.POETXMuon])
def test_optimisers_train_gains_as_dense_parameters_without_decay(kind, interval: int) -> None:
    model = MLP()
    config = poetx.POETXConfig(block_size=4, gains="both", merge_interval=interval, max_angle=None)
    optimizer = kind(model, lr=1e-2, config=config, weight_decay=0.5)
    (group,) = [g for g in optimizer.param_groups if g["name"] == "gains"]
    assert set(group["params"]) == set(gains_of(model))
    assert (group["lr"], group["weight_decay"]) == (1e-2, 0)
    losses = [step(model, optimizer) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert not any((gain == 1).all() for gain in gains_of(model))
    assert set(optimizer.state[gains_of(model)[0]]) >= {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("before", [True, False])
def test_an_optimiser_of_torch_gets_a_group_of_gains_that_follows(before: bool) -> None:
    model, config = MLP(), poetx.POETXConfig(block_size=4, gains="rows")
    if not before:
        poetx.prepare(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    poetx.adopt(optimizer, model, config)
    (group,) = [g for g in optimizer.param_groups if GAINS in g]
    assert set(group["params"]) == set(gains_of(model))
    assert (group["lr"], group["weight_decay"], group["name"]) == (1e-2, 0, "gains")
    optimizer.param_groups[0]["lr"] = 2e-2
    step(model, optimizer)
    assert group["lr"] == 2e-2
    assert len([p for g in optimizer.param_groups for p in g["params"]]) == 2 + 2 * 3


def test_gains_that_nobody_holds_are_refused() -> None:
    model = scaled(MLP())
    groups = poetx.param_groups(model, lr=1e-3)
    optimizer = torch.optim.SGD([g for g in groups if g["name"] != "gains"])
    with pytest.raises(UnownedRotationsError, match="4 of 4 gains are in no group"):
        poetx.attach(optimizer, model)
    for gain in gains_of(model):
        gain.requires_grad_(False)
    poetx.attach(optimizer, model)


def test_a_model_that_nobody_prepared_trains_gains() -> None:
    options = {"stage": "aot_eager", "block_size": 4, "gains": "both", "merge_interval": 2}
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = torch.compile(model, backend="poetx", options=options)
    losses = [step(model, optimizer, run) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert len(gains_of(model)) == 4
    assert not any((gain == 1).all() for gain in gains_of(model))
    assert_close(run(X), model(X))


def test_what_trains_is_counted_before_and_after() -> None:
    config = poetx.POETXConfig(block_size=4, gains="both")
    before = trained(MLP(), config, {})
    after = trained(scaled(MLP()), config, {})
    assert after == before
    assert after.gains == 2 * (12 + 22)
    assert f"{after.gains} gains" in str(after)
