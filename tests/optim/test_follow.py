"""Groups of rotations follow the user's groups, whatever becomes of the list of groups."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from poetx_compile.optim.follow import FOLLOWS, GROUP
from poetx_compile.optim.groups import BLOCK, RATIO
from tests.helpers.models import MLP
from tests.helpers.rotations import skews

CONFIG = poetx.POETXConfig(block_size=4, max_angle=None)


def adopted(**rates: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """An MLP with a norm and three groups: the norm's, up's and down's; and two of rotations."""
    model = nn.Sequential(nn.LayerNorm(12), MLP())
    optimizer = torch.optim.SGD(
        [
            {"params": [*model[0].parameters()], "lr": 0.5, "name": "norm"},
            {"params": [*model[1].up.parameters()], "lr": 0.1, "name": "up"},
            {"params": [*model[1].down.parameters()], "lr": 0.01, "name": "down"},
        ]
    )
    poetx.adopt(optimizer, model, CONFIG, **rates)
    assert [g["name"] for g in optimizer.param_groups[3:]] == ["up poetx b=4", "down poetx b=4"]
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scale: float = 0.5) -> None:
    """One step at rates that a loop has written, and what the rotations then have."""
    for group in optimizer.param_groups:
        if BLOCK not in group:
            group["lr"] *= scale
            group["momentum"] = group["lr"]
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()


def assert_follows(optimizer: torch.optim.Optimizer) -> None:
    groups = {g["name"]: g for g in optimizer.param_groups if "name" in g}
    for name in ("up", "down"):
        ours, user = groups[f"{name} poetx b=4"], groups[name]
        assert ours["lr"] == pytest.approx(16 * user["lr"])
        assert ours["momentum"] == user["momentum"]


def insert(optimizer: torch.optim.Optimizer) -> None:
    new = {"params": [nn.Parameter(torch.ones(3))], "lr": 7.0}
    optimizer.add_param_group(new)
    optimizer.param_groups.insert(0, optimizer.param_groups.pop())


CHANGES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "deleted": lambda o: [o.state.pop(p) for p in o.param_groups.pop(0)["params"]],
    "inserted": insert,
    "reordered": lambda o: o.param_groups.reverse(),
    "replaced by copies": lambda o: setattr(o, "param_groups", [{**g} for g in o.param_groups]),
    "loaded": lambda o: o.load_state_dict(o.state_dict()),
    "loaded from a copy": lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "loaded from a file": lambda o: o.load_state_dict(pickle.loads(pickle.dumps(o.state_dict()))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rotations_follow_their_group(change: str) -> None:
    model, optimizer = adopted()
    step(model, optimizer)
    assert_follows(optimizer)
    CHANGES[change](optimizer)
    step(model, optimizer)
    assert_follows(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    assert_follows(optimizer)


def test_a_deleted_group_goes_on_in_an_optimiser_that_is_built_again() -> None:
    """Saved after the deletion, loaded where all is adopted again and deleted again."""
    model, optimizer = adopted()
    del optimizer.param_groups[0]
    step(model, optimizer)
    again_model, again = adopted()
    del again.param_groups[0]
    again.load_state_dict(optimizer.state_dict())
    step(again_model, again)
    assert_follows(again)


def test_layers_that_are_adopted_later_find_the_group_of_their_rotations() -> None:
    model = nn.Sequential(nn.LayerNorm(12), MLP(), MLP())
    optimizer = torch.optim.SGD(
        [{"params": [*m.parameters()], "lr": 0.1, "name": n} for n, m in model.named_children()]
    )
    for index in (1, 2):
        poetx.prepare(model[index], CONFIG)
    poetx.adopt(optimizer, model[1])
    del optimizer.param_groups[0]
    poetx.adopt(optimizer, model[2])
    names = {g["name"]: g for g in optimizer.param_groups}
    assert set(names) == {"1", "2", "1 poetx b=4", "2 poetx b=4"}
    for name in ("1", "2"):
        assert names[name][GROUP] == names[f"{name} poetx b=4"][FOLLOWS]
        (index,) = [int(name)]
        assert names[f"{name} poetx b=4"]["params"] == skews(model[index])


def test_rotations_whose_group_is_gone_are_not_trained_at_some_other_rate() -> None:
    model, optimizer = adopted()
    gone = optimizer.param_groups.pop(1)
    with pytest.raises(ConfigError, match=r"'up poetx b=4'.* which 0 groups have"):
        step(model, optimizer)
    (ours,) = [g for g in optimizer.param_groups if g["name"] == "up poetx b=4"]
    del ours[FOLLOWS]
    rate = ours["lr"]
    step(model, optimizer)
    assert ours["lr"] == rate, "a rate of its own"
    optimizer.param_groups.append(gone)
    step(model, optimizer)
    assert ours["lr"] == rate


def test_a_copy_of_a_followed_group_is_refused_until_it_says_which_it_is() -> None:
    model, optimizer = adopted()
    new = {**optimizer.param_groups[1], "params": [nn.Parameter(torch.ones(3))], "name": "new"}
    optimizer.add_param_group(new)
    with pytest.raises(ConfigError, match="which 2 groups have"):
        step(model, optimizer)
    del optimizer.param_groups[-1][GROUP]
    step(model, optimizer)
    assert_follows(optimizer)


# --- the ratio of a rate of one's own -----------------------------------------------------------

PEAK = 0.1
WARM_UPS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: step / 10),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, PEAK, 20, div_factor=float("inf")),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.0, PEAK, 10),
    "by hand": lambda o: o.param_groups[0].update(lr=0.0),
    "by hand, told": lambda o: o.param_groups[0].update(lr=0.0, initial_lr=PEAK),
}


@pytest.mark.parametrize("name", WARM_UPS)
def test_a_warm_up_from_zero_leaves_the_ratio_right(name: str) -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK)
    WARM_UPS[name](optimizer)
    assert optimizer.param_groups[0]["lr"] == 0
    poetx.adopt(optimizer, model, CONFIG, poetx_lr=0.02)
    assert optimizer.param_groups[1][RATIO] == pytest.approx(0.2)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_rate_beside_zero_is_refused_before_anything_is_changed(as_tensor: bool) -> None:
    model = MLP()
    lr = torch.tensor(0.0) if as_tensor else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(ConfigError, match="in no ratio to a learning rate of 0"):
        poetx.adopt(optimizer, model, CONFIG, poetx_lr=0.02)
    assert len(optimizer.param_groups) == 1
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], before, strict=True))
    optimizer.param_groups[0]["initial_lr"] = 0.1
    poetx.adopt(optimizer, model, poetx_lr=0.02)
    assert optimizer.param_groups[1][RATIO] == pytest.approx(0.2)


@pytest.mark.parametrize("poetx_lr", [None, 0.0])
def test_a_rate_of_zero_alone_is_no_obstacle(poetx_lr: float | None) -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    poetx.adopt(optimizer, model, CONFIG, poetx_lr=poetx_lr)
    user, ours = optimizer.param_groups
    assert ours["lr"] == 0.0
    user["lr"] = 0.1
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    assert ours["lr"] == pytest.approx(1.6 if poetx_lr is None else 0.0)
