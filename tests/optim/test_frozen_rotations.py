"""Optimisers of models whose rotations are frozen: linear probing, BitFit, and phases of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.optim.groups import BLOCK
from poetx_compile.optim.schedule import schedule_of
from tests.helpers.models import MLP
from tests.helpers.rotations import skews, turn

CONFIG = poetx.POETXConfig(block_size=4, merge_interval=2)


def prepared(**fields: Any) -> nn.Module:
    model = nn.Sequential(MLP(), nn.LayerNorm(12))
    poetx.prepare(model, poetx.POETXConfig(block_size=4, merge_interval=2, **fields))
    return turn(model)


def freeze(model: nn.Module, what: str) -> None:
    for name, parameter in model.named_parameters():
        frozen = {"rotations": "skew" in name, "all but biases": "bias" not in name}[what]
        parameter.requires_grad_(not frozen and not name.endswith("original"))


OPTIMISERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "POETXAdamW": lambda model: poetx.POETXAdamW(model, lr=1e-2),
    "POETXMuon": lambda model: poetx.POETXMuon(model, lr=1e-2),
    "attach": lambda model: _attached(torch.optim.SGD(poetx.param_groups(model, lr=0.1)), model),
    "attach to all": lambda model: _attached(torch.optim.SGD(model.parameters(), lr=0.1), model),
    "adopt": lambda model: _adopted(torch.optim.SGD(model.parameters(), lr=0.1), model),
    "adopt trainable": lambda model: _adopted(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model
    ),
}


def _attached(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    poetx.attach(optimizer, model)
    return optimizer


def _adopted(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    poetx.adopt(optimizer, model)
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(6, 12)) - 1).square().sum().backward()
        poetx.clip_grad_norm_(optimizer, 1.0)
        optimizer.step()


@pytest.mark.parametrize("what", ["rotations", "all but biases"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_frozen_rotations_stand_still_and_the_rest_trains(name: str, when: str, what: str) -> None:
    model = prepared()
    if when == "before":
        freeze(model, what)
    optimizer = OPTIMISERS[name](model)
    if when == "after":
        freeze(model, what)
    state = {n: p.clone() for n, p in model.state_dict().items()}
    train(model, optimizer)
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, state[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    schedule = schedule_of(optimizer)
    assert schedule is not None
    assert schedule.merges == 0, "there is nothing to merge"
    saved = optimizer.state_dict()
    OPTIMISERS[name](model).load_state_dict(saved) if when == "before" else None


@pytest.mark.parametrize("name", ["POETXAdamW", "POETXMuon", "attach to all", "adopt"])
def test_rotations_that_an_optimiser_holds_train_when_they_are_unfrozen(name: str) -> None:
    model = prepared(max_angle=None)
    optimizer = OPTIMISERS[name](model)
    freeze(model, "rotations")
    train(model, optimizer, 3)
    model.requires_grad_(True)
    before = [m.weight.detach().clone() for _, m, _ in prepared_linears(model)]
    train(model, optimizer, 2)
    after = [m.weight for _, m, _ in prepared_linears(model)]
    assert not any(map(torch.equal, before, after))
    schedule = schedule_of(optimizer)
    assert schedule is not None
    assert schedule.merges == 1, "the steps that turned nothing wait for the first that does"


def test_an_optimiser_adopted_over_frozen_layers_trains_them_when_they_are_unfrozen() -> None:
    """As one over the plain model would: its parameters are the layer's, frozen or not."""
    model = prepared()
    freeze(model, "rotations")
    optimizer = OPTIMISERS["adopt"](model)
    assert {p for g in optimizer.param_groups if BLOCK in g for p in g["params"]} == {*skews(model)}
    model.requires_grad_(True)
    before = [m.weight.detach().clone() for _, m, _ in prepared_linears(model)]
    train(model, optimizer, 1)
    assert not any(map(torch.equal, before, [m.weight for _, m, _ in prepared_linears(model)]))


def test_a_frozen_layer_is_not_asked_for_by_adopt() -> None:
    model = prepared()
    model[0].up.requires_grad_(False)
    optimizer = OPTIMISERS["adopt trainable"](model)
    train(model, optimizer, 3)
    down = model[0].down.parametrizations.weight[0]
    ours = [p for g in optimizer.param_groups if BLOCK in g for p in g["params"]]
    assert set(ours) == {down.skew_in, down.skew_out}


@pytest.mark.parametrize("name", ["POETXAdamW", "POETXMuon"])
def test_one_frozen_side_of_each_layer(name: str) -> None:
    model = prepared()
    for _, _, e in prepared_linears(model):
        e.skew_in.requires_grad_(False)
    optimizer = OPTIMISERS[name](model)
    train(model, optimizer)
    schedule = schedule_of(optimizer)
    assert schedule is not None
    assert schedule.merges >= 2


def test_groups_without_parameters_are_no_obstacle() -> None:
    model = prepared()
    groups = poetx.param_groups(model, lr=0.1)
    poetx_group = dict(groups[-1], params=[])
    optimizer = torch.optim.SGD([{"params": []}, poetx_group, *groups], lr=0.1)
    _attached(optimizer, model)
    train(model, optimizer)


def test_a_phase_of_linear_probing_is_resumed_bit_for_bit() -> None:
    def run(break_at: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = prepared()
        freeze(model, "rotations")
        optimizer = poetx.POETXAdamW(model, lr=1e-2)
        for step in range(6):
            if step == break_at:
                weights, state = model.state_dict(), optimizer.state_dict()
                torch.manual_seed(0)
                model = prepared()
                freeze(model, "rotations")
                if step > 3:
                    model.requires_grad_(True)
                optimizer = poetx.POETXAdamW(model, lr=1e-2)
                model.load_state_dict(weights)
                optimizer.load_state_dict(state)
            if step == 3:
                model.requires_grad_(True)
                new = skews(model)
                optimizer.add_param_group({"params": new, "lr": 1e-3})
            torch.manual_seed(step)
            train(model, optimizer, 1)
        return {n: p.clone() for n, p in model.state_dict().items()}

    through, broken = run(None), run(2)
    assert all(torch.equal(broken[n], p) for n, p in through.items())
