"""One rate written into all groups is told; a schedule of each group's own rate never is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import poetx_compile as poetx
from poetx_compile.optim.groups import BLOCK
from tests.helpers.models import MLP
from tests.helpers.schedulers import ABSOLUTE, SCHEDULERS

TOLD = "is written into all param groups"
CONFIG = poetx.POETXConfig(block_size=4, max_angle=None)

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "POETXAdamW": poetx.POETXAdamW,
    "POETXMuon": poetx.POETXMuon,
    "param_groups": lambda model, lr: _attached(model, poetx.param_groups(model, lr=lr)),
}


def _attached(model: nn.Module, groups: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    poetx.attach(optimizer, model)
    return optimizer


def prepared() -> nn.Module:
    model = MLP()
    poetx.prepare(model, CONFIG)
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, before: Callable[[int], Any]) -> None:
    for index in range(4):
        before(index)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
        optimizer.step()


def write(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_loop_that_writes_one_rate_is_told_once(name: str, caplog: Any) -> None:
    model = prepared()
    optimizer = OPTIMISERS[name](model, lr=1e-3)
    steps(model, optimizer, lambda i: write(optimizer, 1e-3 / (1 + i)))
    assert caplog.text.count(TOLD) == 1
    ratio = 2.19 if name == "POETXMuon" else 16
    assert f"{ratio} x lr of 'poetx b=4'" in caplog.text


def test_a_loop_that_begins_later_is_told(caplog: Any) -> None:
    model = prepared()
    optimizer = poetx.POETXAdamW(model)
    steps(model, optimizer, lambda i: i > 1 and write(optimizer, 1e-3 / i))
    assert caplog.text.count(TOLD) == 1


def test_one_rate_for_good_is_told(caplog: Any) -> None:
    model = prepared()
    optimizer = poetx.POETXAdamW(model)
    steps(model, optimizer, lambda i: write(optimizer, 1e-4))
    assert caplog.text.count(TOLD) == 1


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_scheduler_that_is_given_one_rate_is_told(name: str, caplog: Any) -> None:
    model = prepared()
    optimizer = poetx.POETXAdamW(model)
    scheduler = SCHEDULERS[name](optimizer)
    steps(model, optimizer, lambda i: i and scheduler.step())
    assert caplog.text.count(TOLD) == 1


def lists(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    rates = [group["lr"] for group in optimizer.param_groups]
    low = [rate / 10 for rate in rates]
    return {
        "OneCycleLR": lambda: schedulers.OneCycleLR(optimizer, rates, 12),
        "CyclicLR": lambda: schedulers.CyclicLR(optimizer, low, rates, 2),
        "SWALR": lambda: torch.optim.swa_utils.SWALR(optimizer, low, 2),
    }


@pytest.mark.parametrize("optimizer_name", OPTIMISERS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_scheduler_of_torch_is_told(name: str, optimizer_name: str, caplog: Any) -> None:
    model = prepared()
    optimizer = OPTIMISERS[optimizer_name](model, lr=0.1)
    scheduler = lists(optimizer)[name]() if name in ABSOLUTE else SCHEDULERS[name](optimizer)
    arguments = [1.0] if name == "ReduceLROnPlateau" else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*epoch parameter.*")
        for _ in range(3):
            steps(model, optimizer, lambda i: i and scheduler.step(*arguments))
    assert TOLD not in caplog.text


def scaled(optimizer: torch.optim.Optimizer, factor: float, floor: float = 0.0) -> None:
    for group in optimizer.param_groups:
        group["lr"] = max(floor, factor * group.setdefault("initial_lr", group["lr"]))


RIGHT: dict[str, Callable[[torch.optim.Optimizer], Callable[[int], Any]]] = {
    "each group's own rate": lambda o: lambda i: scaled(o, (1 + i) / 10),
    "a warm-up from zero": lambda o: lambda i: scaled(o, i / 10),
    "down to a common floor": lambda o: lambda i: scaled(o, 0.1**i, 5e-4),
    "zero for all": lambda o: lambda i: scaled(o, 0.0),
    "rates that cross": lambda o: (
        lambda i: [g.update(lr=(1 + i if BLOCK in g else 3 - i) * 1e-3) for g in o.param_groups]
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_no_right_loop_is_told(name: str, caplog: Any) -> None:
    model = prepared()
    optimizer = poetx.POETXAdamW(model)
    steps(model, optimizer, RIGHT[name](optimizer))
    assert TOLD not in caplog.text


def test_one_rate_that_was_asked_for_is_not_told(caplog: Any) -> None:
    model = prepared()
    optimizer = poetx.POETXAdamW(model, lr=1e-3, poetx_lr=1e-3)
    steps(model, optimizer, lambda i: write(optimizer, 1e-3 / (1 + i)))
    assert TOLD not in caplog.text


def test_a_floor_is_not_told_after_a_resume(caplog: Any) -> None:
    model = prepared()
    optimizer = poetx.POETXAdamW(model)
    steps(model, optimizer, lambda i: scaled(optimizer, 0.1**i, 5e-4))
    again = poetx.POETXAdamW(model)
    again.load_state_dict(optimizer.state_dict())
    steps(model, again, lambda i: scaled(again, 0.0, 5e-4))
    assert TOLD not in caplog.text


def test_rotations_that_follow_survive_a_loop_and_nothing_is_told(caplog: Any) -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    poetx.adopt(optimizer, model, CONFIG)
    steps(model, optimizer, lambda i: write(optimizer, 1e-3 / (1 + i)))
    assert optimizer.param_groups[1]["lr"] == pytest.approx(16 * optimizer.param_groups[0]["lr"])
    assert TOLD not in caplog.text


# --- schedulers that cycle a momentum -----------------------------------------------------------

CYCLES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "OneCycleLR": lambda o: schedulers.OneCycleLR(
        o, [g["lr"] for g in o.param_groups], 5, base_momentum=0.85, max_momentum=0.95
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, 1e-4, [g["lr"] for g in o.param_groups], 2, base_momentum=0.85, max_momentum=0.95
    ),
}


@pytest.mark.parametrize("name", CYCLES)
def test_the_momentum_of_muon_cycles_and_the_betas_stay(name: str) -> None:
    model = prepared()
    optimizer = poetx.POETXMuon(model, betas=(0.8, 0.9))
    scheduler = CYCLES[name](optimizer)
    seen: list[float] = []
    for _ in range(4):
        model(torch.randn(3, 12)).sum().backward()
        optimizer.step()
        (ours,) = [g for g in optimizer.param_groups if BLOCK in g]
        seen.append(ours["momentum"])
        assert all(g["betas"] == (0.8, 0.9) for g in optimizer.param_groups if BLOCK not in g)
        scheduler.step()
    assert seen[0] == pytest.approx(0.95)
    assert min(seen) == pytest.approx(0.85, abs=0.02)


def test_the_momentum_that_cycles_is_the_one_that_steps() -> None:
    def step(momentum: float, cycled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = prepared()
        optimizer = poetx.POETXMuon(model, momentum=0.5 if cycled else momentum)
        if cycled:
            rates = [g["lr"] for g in optimizer.param_groups]
            schedulers.CyclicLR(optimizer, rates, rates, max_momentum=momentum)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(3, 12)).square().sum().backward()
            optimizer.step()
        return list(model.parameters())

    assert all(map(torch.equal, step(0.95, True), step(0.95, False)))
    assert not all(map(torch.equal, step(0.95, True), step(0.7, False)))


def test_a_dense_group_added_to_muon_has_the_betas_of_the_others() -> None:
    model = prepared()
    optimizer = poetx.POETXMuon(model, betas=(0.8, 0.9))
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.param_groups[-1]["betas"] == (0.8, 0.9)
    assert bool((extra != 1).all())
