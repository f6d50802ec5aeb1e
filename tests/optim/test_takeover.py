"""`adopt`: rotations in an optimiser built over the plain model, and whoever sets its rates.

Nothing is compiled here, and most steps are taken on gradients made by hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as schedulers

import poetx_compile as poetx
from poetx_compile.errors import ConfigError, UnownedRotationsError
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from poetx_compile.optim.schedule import schedule_of
from poetx_compile.optim.takeover import FOLLOWS, RATIO
from tests.helpers.models import MLP, Attention
from tests.helpers.rotations import skews
from tests.helpers.schedulers import ABSOLUTE, SCHEDULERS

CONFIG = poetx.POETXConfig(block_size=4, merge_interval=3, redraw_interval=3, max_angle=None)


def groups_by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {g.get("name", str(i)): g for i, g in enumerate(optimizer.param_groups)}


def give_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)


def rates_used(optimizer: torch.optim.Optimizer) -> list[list[float]]:
    """The learning rates of all groups as each step sees them, behind all other hooks."""
    used: list[list[float]] = []
    optimizer.register_step_pre_hook(
        lambda o, *_: used.append([float(g["lr"]) for g in o.param_groups])
    )
    return used


# --- what the optimiser holds -------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
def test_rotations_move_into_groups_of_their_own(when: str) -> None:
    model = MLP()
    plain = dict(model.named_parameters())
    biases = [model.up.bias, model.down.bias]
    if when == "after prepare":
        poetx.prepare(model, CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3, eps=1e-7)
    schedule = poetx.adopt(optimizer, model, CONFIG)
    user, ours = optimizer.param_groups
    assert [id(p) for p in user["params"]] == [id(p) for p in biases]
    assert [id(p) for p in ours["params"]] == [id(p) for p in skews(model)]
    assert (ours["name"], ours[FOLLOWS], ours[RATIO]) == ("poetx b=4", 0, 16.0)
    assert (ours["lr"], ours["weight_decay"], ours["eps"]) == (0.16, 0.0, 1e-7)
    assert (user["lr"], user["weight_decay"]) == (1e-2, 0.3)
    give_gradients(model)
    optimizer.step()
    assert set(optimizer.state) == {*biases, *skews(model)}, "no moments of frozen weights"
    assert schedule is schedule_of(optimizer)
    assert schedule.step == 1
    assert plain["up.weight"] is stored_weight(model.up)


def test_moments_of_dense_training_before_go() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    give_gradients(model)
    optimizer.step()
    weight = model.up.weight
    assert weight in optimizer.state
    poetx.adopt(optimizer, model, CONFIG)
    assert weight not in optimizer.state
    assert model.up.bias in optimizer.state


def test_groups_of_the_users_are_followed_one_by_one() -> None:
    """Weights with decay in one group and the rest in another, as every example has it."""
    model = nn.Sequential(MLP(), nn.LayerNorm(12), nn.Linear(12, 4))
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    head = decay.pop()
    groups = [
        {"params": decay, "weight_decay": 0.1, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "rest"},
        {"params": [head], "lr": 1e-3, "betas": (0.5, 0.6), "name": "head"},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    config = poetx.POETXConfig(block_size=(12, 4), max_angle=None)
    poetx.adopt(optimizer, model, config)
    found = groups_by_name(optimizer)
    assert list(found) == [
        "decay", "rest", "head",
        "decay poetx b=12", "decay poetx b=4", "head poetx b=12", "head poetx b=4",
    ]  # fmt: skip
    assert [len(g["params"]) for g in found.values()] == [0, 5, 0, 2, 2, 1, 1]
    assert all(g["weight_decay"] == 0 for n, g in found.items() if "poetx" in n)
    assert found["head poetx b=4"]["lr"] == 1e-3 * 16
    assert found["head poetx b=12"]["betas"] == (0.5, 0.6)
    assert found["decay poetx b=12"]["lr"] == pytest.approx(1e-2 * 64 / 12)


def test_rotations_are_found_by_identity_not_by_name() -> None:
    class Decoy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.skew_in = nn.Parameter(torch.zeros(3, 6))
            self.soft_prompt = nn.Parameter(torch.zeros(6))
            self.oft_original = nn.Linear(8, 8)

    model = Decoy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    poetx.adopt(optimizer, model, CONFIG)
    user, ours = optimizer.param_groups
    assert {id(p) for p in user["params"]} == {
        id(model.skew_in), id(model.soft_prompt), id(model.oft_original.bias)
    }  # fmt: skip
    assert len(ours["params"]) == 2


def test_names_of_parameters_stay_in_step() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    poetx.adopt(optimizer, model, CONFIG)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_layers_that_come_later_join_the_groups() -> None:
    model = nn.ModuleList([MLP(), MLP()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    schedule = poetx.adopt(optimizer, model[0], CONFIG)
    give_gradients(model)
    optimizer.step()
    scheduler.step()
    poetx.prepare(model[1], CONFIG)
    assert poetx.adopt(optimizer, model) is schedule
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 8]
    for _ in range(2):
        give_gradients(model)
        optimizer.step()
        scheduler.step()
    assert (schedule.step, schedule.merges) == (3, 1)
    assert [e.draw for _, _, e in prepared_linears(model)] == [2, 2, 2, 2]
    assert poetx.adopt(optimizer, model) is schedule, "a second call changes nothing"
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 8]


# --- whoever sets the rates ---------------------------------------------------------------------


def test_every_scheduler_of_torch_is_tried() -> None:
    found = {
        n
        for n, c in vars(schedulers).items()
        if isinstance(c, type) and issubclass(c, schedulers.LRScheduler) and n[0] != "_"
    }
    assert found - {"LRScheduler"} <= set(SCHEDULERS)


def run_scheduler(name: str, how: str) -> tuple[list[list[float]], list[list[float]], Any]:
    """Rates used in each step, rates displayed after each step of the scheduler, the optimiser."""
    model = nn.Linear(8, 8)
    parameters: Any = model.parameters()
    if how != "scheduler first":
        poetx.prepare(model, CONFIG)
        parameters = model.parameters()
    if how == "param_groups":
        parameters = poetx.param_groups(model, lr=0.1)
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    if how == "param_groups":
        poetx.attach(optimizer, model)
    elif how == "adopt first":
        poetx.adopt(optimizer, model)
    scheduler = SCHEDULERS[name](optimizer)
    if how == "scheduler first":
        poetx.adopt(optimizer, model, CONFIG)
    used = rates_used(optimizer)
    displayed = []
    with warnings.catch_warnings():
        # SequentialLR passes an epoch to the schedulers it holds.
        warnings.filterwarnings("ignore", message=".*epoch parameter.*")
        for _ in range(6):
            give_gradients(model)
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            displayed.append([float(lr) for lr in scheduler.get_last_lr()])
    return used, displayed, optimizer


@pytest.mark.parametrize("how", ["scheduler first", "adopt first"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_follow_every_scheduler_built_before_or_after(name: str, how: str) -> None:
    used, displayed, optimizer = run_scheduler(name, how)
    dense, _ = [rates[0] for rates in used], [rates[1] for rates in used]
    assert len(set(dense)) > 1, "the schedule moves"
    for user, ours in used:
        assert ours == pytest.approx(16 * user)
    for user, ours in displayed:
        # What a scheduler sets by absolute numbers is put right before the step.
        if not (name == "with a floor" or (how == "adopt first" and name in ABSOLUTE)):
            assert ours == pytest.approx(16 * user, abs=1e-12)
    user, ours = optimizer.param_groups
    assert ours["momentum"] == user["momentum"]
    plain = nn.Linear(8, 8)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](reference)
    expected = rates_used(reference)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*epoch parameter.*")
        for _ in range(6):
            give_gradients(plain)
            reference.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert dense == [rates[0] for rates in expected], "the user's group has the user's rates"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_param_groups(name: str) -> None:
    used, displayed, _ = run_scheduler(name, "param_groups")
    assert len({rates[1] for rates in used}) > 1
    assert displayed[:-1] == used[1:], "what is logged is what the next step takes"
    if name not in (*ABSOLUTE, "with a floor"):
        for dense, ours in used:
            assert ours == pytest.approx(16 * dense)


def test_rates_written_by_hand_are_followed() -> None:
    """The loop of many a training script: one rate for all groups, before each step."""
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    poetx.adopt(optimizer, model, CONFIG)
    used = rates_used(optimizer)
    for rate in (0.1, 0.05, 0.0):
        for group in optimizer.param_groups:
            group["lr"] = rate
        give_gradients(model)
        optimizer.step()
    assert used == [[0.1, 1.6], [0.05, 0.8], [0.0, 0.0]]


def test_a_rate_in_a_tensor_stays_that_tensor() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    poetx.adopt(optimizer, model, CONFIG)
    user, ours = optimizer.param_groups
    tensor = ours["lr"]
    assert tensor is not user["lr"]
    user["lr"].fill_(0.05)
    give_gradients(model)
    optimizer.step()
    assert ours["lr"] is tensor
    assert float(tensor) == pytest.approx(0.8)


def test_a_rate_of_ones_own_sets_the_ratio() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    poetx.adopt(optimizer, model, CONFIG, poetx_lr=0.02)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, pytest.approx(0.02)]
    assert optimizer.param_groups[1][RATIO] == pytest.approx(0.2)


def test_a_warm_up_from_zero_says_nothing_of_the_ratio() -> None:
    for poetx_lr, ratio in ((None, 16.0), (0.02, 0.2)):
        model = MLP()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedulers.LambdaLR(optimizer, lambda step: step / 10)
        assert optimizer.param_groups[0]["lr"] == 0
        poetx.adopt(optimizer, model, CONFIG, poetx_lr=poetx_lr)
        assert optimizer.param_groups[1][RATIO] == pytest.approx(ratio)


# --- which optimisers ---------------------------------------------------------------------------

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, fused=True),
}


def regress(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 12, generator=generator)
    target = torch.tanh(x @ torch.randn(12, 12, generator=generator) / 12**0.5)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(model(x), target)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("how", ["adopt", "param_groups"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_trains_the_rotations_and_merges(name: str, how: str) -> None:
    torch.manual_seed(3)
    model = nn.Linear(12, 12)
    poetx.prepare(
        model, poetx.POETXConfig(block_size=4, merge_interval=4, redraw_interval=8, moments="reset")
    )
    if how == "adopt":
        optimizer = OPTIMISERS[name](model.parameters())
        poetx.adopt(optimizer, model)
    else:
        rule = "adafactor" if name == "Adafactor" else "adamw"
        rate = OPTIMISERS[name](model.parameters()).defaults["lr"]
        optimizer = OPTIMISERS[name](poetx.param_groups(model, lr=rate, rule=rule))
        poetx.attach(optimizer, model)
    model.bias.requires_grad_(False)  # only the rotations move
    schedule = schedule_of(optimizer)
    losses = regress(model, optimizer, 10)
    assert losses[-1] < 0.995 * losses[0]
    assert schedule.step == 10
    assert schedule.merges >= 2
    assert stored_weight(model) not in optimizer.state
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.ndim > 0:
                assert value.dtype == torch.float32


def test_adafactor_moves_rotations_as_far_as_it_moves_weights() -> None:
    """Its rate is relative: rotations, which start at zero, would stand still."""
    model = MLP()
    weights = [model.up.weight.detach().clone(), model.down.weight.detach().clone()]
    mean_square = sum(w.square().mean() for w in weights) / 2
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1, weight_decay=0.1)
    poetx.adopt(optimizer, model, CONFIG)
    user, ours = optimizer.param_groups
    assert ours["lr"] == pytest.approx(0.1 * 16 * float(mean_square) ** 0.5, rel=1e-5)
    assert (ours["eps"], user["eps"]) == ((None, 1.0), (None, 1e-3))
    give_gradients(model)
    optimizer.step()
    moved = torch.stack([s.detach().abs().mean() for s in skews(model)]).mean()
    assert moved.item() == pytest.approx(ours["lr"], rel=1e-4)


def test_dense_matrices_in_muon_and_rotations_in_another_optimiser() -> None:
    """`torch.optim.Muon` for what stays dense; the one that holds the rotations is attached."""
    model = nn.Sequential(nn.Embedding(9, 12), MLP(), nn.Linear(12, 9, bias=False))
    config = poetx.POETXConfig(
        block_size=4, merge_interval=3, max_angle=None, exclude_modules=("2",)
    )
    poetx.prepare(model, config)
    groups = {g["name"]: g for g in poetx.param_groups(model, lr=1e-2)}
    muon = torch.optim.Muon([groups.pop("dense")], lr=1e-3)
    adamw = torch.optim.AdamW(list(groups.values()), lr=1e-2)
    schedule = poetx.attach(adamw, model)
    with pytest.raises(UnownedRotationsError, match="skew parameters are in no group"):
        poetx.attach(muon, model)
    head = model[2].weight.detach().clone()
    for _ in range(3):
        F.cross_entropy(model(torch.arange(9)), torch.arange(9)).backward()
        muon.step()
        adamw.step()
        muon.zero_grad()
        adamw.zero_grad()
    assert (schedule.step, schedule.merges) == (3, 1)
    assert not torch.equal(model[2].weight, head)


def test_several_optimisers_over_parts_of_a_model() -> None:
    model = nn.ModuleList([MLP(), MLP()])
    poetx.prepare(model, CONFIG)
    first = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    second = torch.optim.SGD(model[1].parameters(), lr=1e-2)
    with pytest.raises(UnownedRotationsError, match="2 of 4 prepared layers"):
        poetx.adopt(first, model)
    poetx.adopt(first, model[0])
    poetx.adopt(second, model[1])
    give_gradients(model)
    for _ in range(3):
        first.step()
    draws = [e.draw for _, _, e in prepared_linears(model)]
    assert draws == [2, 2, 1, 1], "each merges its own layers"
    second.step()
    assert schedule_of(second).step == 1


def test_layers_that_share_a_permutation_have_one_optimiser() -> None:
    model = Attention()
    poetx.prepare(model, CONFIG)
    optimizer = torch.optim.SGD(model.q_proj.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="share permutations"):
        poetx.adopt(optimizer, model.q_proj)
    assert len(optimizer.param_groups) == 1, "nothing has been changed"


# --- what is told -------------------------------------------------------------------------------


def test_one_line_tells_what_happened(caplog: pytest.LogCaptureFixture) -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    poetx.adopt(optimizer, model, CONFIG)
    (record,) = caplog.records  # at the level that is seen by default
    message = record.getMessage()
    for part in ("AdamW trains 2 nn.Linear", "16 x lr at b=4", "every 3 steps", "'refuse'"):
        assert part in message


def test_an_optimiser_built_before_prepare_raises_at_its_first_step() -> None:
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    poetx.prepare(model, CONFIG)
    give_gradients(model)
    with pytest.raises(UnownedRotationsError, match=r"built before prepare.*adopt\(optimizer"):
        optimizer.step()
    poetx.adopt(optimizer, model)
    optimizer.step()


def test_rotations_that_nobody_merges_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = MLP()
    poetx.prepare(model, CONFIG)
    optimizer = torch.optim.AdamW(poetx.param_groups(model, lr=1e-2))
    for _ in range(2):
        give_gradients(model)
        optimizer.step()
    (record,) = caplog.records
    assert "never merges them: call poetx_compile.attach" in record.getMessage()


def test_prepared_rotations_that_no_optimiser_holds_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = MLP()
    poetx.prepare(model, CONFIG)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], lr=1e-2)
    for told in (0, 1, 1):
        give_gradients(model)
        optimizer.step()
        assert len(caplog.records) == told
    message = caplog.records[0].getMessage()
    assert "of 2 prepared layer(s) had gradients at two steps of SGD" in message
    assert "build it from poetx_compile.param_groups" in message


def test_an_optimiser_with_groups_of_its_own_is_not_changed() -> None:
    model = nn.ModuleList([MLP(), MLP()])
    poetx.prepare(model, CONFIG)
    optimizer = torch.optim.SGD(poetx.param_groups(model[0], lr=0.1))
    poetx.attach(optimizer, model[0])
    optimizer.add_param_group({"params": list(model[1].parameters())})
    with pytest.raises(ConfigError, match="groups of their own"):
        poetx.adopt(optimizer, model)
