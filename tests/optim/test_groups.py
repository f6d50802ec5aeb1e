"""Param groups: every trainable parameter once, found by identity, with readable names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from poetx_compile.optim import POETXAdamW, POETXMuon, param_groups
from tests.helpers.models import OddZoo, TinyLM


class Decoy(nn.Module):
    """Dense parameters whose names look like rotations."""

    def __init__(self):
        super().__init__()
        self.skew_in = nn.Parameter(torch.zeros(3, 6))
        self.soft_prompt = nn.Parameter(torch.zeros(6))
        self.linear = nn.Linear(8, 8)


def prepared(model: nn.Module, block_size: int = 8, gains: str = "none") -> nn.Module:
    poetx.prepare(model, poetx.POETXConfig(block_size=block_size, gains=gains))
    return model


@pytest.mark.parametrize("build", [TinyLM, OddZoo, Decoy, lambda: nn.Linear(8, 4, bias=False)])
def test_every_trainable_parameter_is_in_exactly_one_group(build) -> None:
    model = prepared(build())
    groups = param_groups(model, lr=1e-3)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    frozen = {id(stored_weight(m)) for _, m, _ in prepared_linears(model)}
    assert frozen
    assert not frozen & set(listed)
    assert all(group["params"] for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)


def test_kinds_of_parameters() -> None:
    model = prepared(Decoy())
    groups = {g["name"]: g for g in param_groups(model, lr=1e-3, weight_decay=0.1)}
    assert list(groups) == ["dense", "dense no decay", "poetx b=8"]
    assert [id(p) for p in groups["dense"]["params"]] == [id(model.skew_in)]
    assert {id(p) for p in groups["dense no decay"]["params"]} == {
        id(model.soft_prompt),
        id(model.linear.bias),
    }
    assert [g["weight_decay"] for g in groups.values()] == [0.1, 0.0, 0.0]


def test_learning_rates() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4))
    poetx.prepare(model, poetx.POETXConfig(block_size=(32, 8)))

    def rates(**kwargs) -> dict[str, float]:
        return {g["name"]: g["lr"] for g in param_groups(model, lr=0.01, **kwargs)}

    blocks = (32, 16, 8, 4)
    assert rates() == {
        "dense no decay": 0.01,
        **{f"poetx b={b}": pytest.approx(0.01 * 64 / b) for b in blocks},
    }
    assert rates(rule="muon") == {
        "dense no decay": 0.01,
        **{f"poetx b={b}": 0.02 for b in blocks},
    }
    assert set(rates(poetx_lr=0.5).values()) == {0.01, 0.5}


@pytest.mark.parametrize(
    ("b", "ratio"), [(64, 2), (32, 2), (16, 2 + 1 / 3), (8, 2 + 2 / 3), (4, 3), (2, 3)]
)
def test_small_blocks_turn_by_larger_angles(b: int, ratio: float) -> None:
    model = nn.Sequential(nn.Linear(64, 192, bias=False))
    poetx.prepare(model, poetx.POETXConfig(block_size=b))
    for group in param_groups(model, lr=0.01, rule="muon"):
        assert group["lr"] == pytest.approx(0.01 * ratio)


def test_frozen_rotations_are_left_out() -> None:
    model = prepared(TinyLM())
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    listed = {id(p) for group in param_groups(model, lr=1e-3) for p in group["params"]}
    assert listed == {id(p) for p in model.parameters() if p.requires_grad}
    POETXAdamW(model)  # attaches: what does not train needs no owner


@pytest.mark.parametrize("optimizer", [POETXAdamW, POETXMuon])
def test_preparing_on_demand(optimizer) -> None:
    config = poetx.POETXConfig(block_size=8)
    model = torch.compile(TinyLM(), backend="eager")
    optimizer(model, config=config)
    assert len(list(prepared_linears(model._orig_mod))) == 14
    optimizer(model)
    optimizer(model, config=config)
    with pytest.raises(ConfigError, match="differs in seed"):
        optimizer(model, config=poetx.POETXConfig(block_size=8, seed=1))


def test_parts_prepared_by_hand_stay_the_only_ones() -> None:
    model = TinyLM()
    poetx.prepare(model.layers[0], poetx.POETXConfig(block_size=8))
    POETXAdamW(model)
    assert len(list(prepared_linears(model))) == 7
    poetx.prepare(model.layers[1], poetx.POETXConfig(block_size=4))
    with pytest.raises(ConfigError, match="different configurations"):
        POETXAdamW(model)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="prepare"):
        param_groups(nn.Linear(4, 4), lr=1e-3)
    model = prepared(nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="rule"):
        param_groups(model, lr=1e-3, rule="sgd")
    with pytest.raises(ConfigError, match="poetx_lr"):
        param_groups(model, lr=1e-3, poetx_lr=-1.0)
    with pytest.raises(ConfigError, match="momentum"):
        POETXMuon(model, momentum=1.0)
    for optimizer in (POETXAdamW, POETXMuon):
        with pytest.raises(ValueError, match="beta"):
            optimizer(model, betas=(1.5, 0.9))
        with pytest.raises(ValueError, match="learning rate"):
            optimizer(model, lr=-1.0)


def test_gains_have_a_group_of_their_own() -> None:
    model = prepared(Decoy(), gains="both")
    groups = {g["name"]: g for g in param_groups(model, lr=1e-3, weight_decay=0.1)}
    assert list(groups) == ["dense", "dense no decay", "gains", "poetx b=8"]
    layers = [e for _, _, e in prepared_linears(model)]
    assert {*groups["gains"]["params"]} == {g for e in layers for g in e.gains.values()}
    assert (groups["gains"]["lr"], groups["gains"]["weight_decay"]) == (1e-3, 0)
