"""The angle guard where rotations are not those that the optimiser's steps have made."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.errors import DivergedError
from poetx_compile.inspect.diagnostics import diagnostics
from poetx_compile.layers.prepared import equivalence_of
from poetx_compile.optim.angle import ANGLE, TURN, AngleGuard

LIMIT = 0.25


def build(rate: float = 0.01) -> tuple[nn.Linear, torch.optim.Optimizer, poetx.optim.MergeSchedule]:
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    poetx.prepare(model, poetx.POETXConfig(block_size=4, merge_interval=1000, max_angle=LIMIT))
    optimizer = torch.optim.SGD(poetx.param_groups(model, lr=rate, poetx_lr=rate))
    return model, optimizer, poetx.attach(optimizer, model)


def step(model: nn.Linear, optimizer: torch.optim.Optimizer, gradient: float = 1.0) -> float:
    """One step that turns by about the rate; the angle after it."""
    e = equivalence_of(model)
    for skew in (e.skew_in, e.skew_out):
        skew.grad = torch.full_like(skew, gradient)
    optimizer.step()
    return diagnostics(model)["angle_max"]


def test_a_rollback_of_the_model_alone_leaves_the_guard_as_watchful_as_before() -> None:
    """After steps that were NaN: what was measured of them is nothing to go by."""
    model, optimizer, schedule = build()
    for _ in range(4):
        step(model, optimizer)
    saved = copy.deepcopy(model.state_dict())
    for _ in range(2):
        step(model, optimizer, float("nan"))
    model.load_state_dict(saved)
    angles = [step(model, optimizer) for _ in range(60)]
    assert max(angles) <= 1.03 * LIMIT
    assert schedule.merges == schedule.early_merges >= 2
    assert 0 <= schedule.angle <= LIMIT


def test_a_load_of_larger_rotations_is_measured_before_the_next_step() -> None:
    """The model of before a merge, the optimiser of after it, which knows of no angle."""
    model, optimizer, schedule = build()
    angle = 0.0
    while not schedule.merges:
        saved, angle = copy.deepcopy(model.state_dict()), diagnostics(model)["angle_max"]
        step(model, optimizer)
    assert angle > 0.15
    model.load_state_dict(saved)
    step(model, optimizer)
    if schedule.merges == 1:  # the next step may be one too many already
        assert schedule.angle == pytest.approx(angle, rel=0.03)
    assert max(step(model, optimizer) for _ in range(30)) <= 1.03 * LIMIT


def test_what_is_restored_with_the_optimiser_is_not_measured_again() -> None:
    """A resumed run decides as the one that went on, in whatever order the two are loaded."""
    model, optimizer, schedule = build()
    for _ in range(5):
        step(model, optimizer)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    angles = [step(model, optimizer) for _ in range(30)]
    for order in (0, 1), (1, 0):
        other, other_optimizer, other_schedule = build()
        for part in order:
            (other, other_optimizer)[part].load_state_dict(copy.deepcopy(saved[part]))
        assert [step(other, other_optimizer) for _ in range(30)] == angles
        assert other_schedule.merges == schedule.merges > 0
        assert other_optimizer.state_dict() == optimizer.state_dict()


LOADS = {
    "larger rotations": lambda model, saved: model.load_state_dict(saved),
    "plain weights": lambda model, saved: model.load_state_dict(poetx.plain_state_dict(model)),
}
"""Loads of weights alone, after which the guard starts anew at the next step."""


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("steps", [1, 6])
def test_what_is_saved_between_a_load_of_weights_and_the_next_step_resumes_bitwise(
    steps: int, load: str, tmp_path: Path
) -> None:
    """Of two runs that are alike one saves, which does not show in it either."""
    live, twin = build(), build()
    for model, optimizer, _ in (live, twin):
        for _ in range(9):
            step(model, optimizer)
        saved = copy.deepcopy(model.state_dict())
        nothing = {k: torch.zeros_like(v) if "skew" in k else v for k, v in saved.items()}
        model.load_state_dict(nothing)
        for _ in range(steps):
            step(model, optimizer)
        LOADS[load](model, saved)
    model, optimizer, schedule = live
    merges = schedule.merges
    poetx.save_checkpoint(tmp_path / "1", model, optimizer)
    states = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    resumed = [build() for _ in range(3)]
    for order, run in zip([(0, 1), (1, 0)], resumed, strict=False):
        for part in order:
            run[part].load_state_dict(copy.deepcopy(states[part]))
    poetx.load_checkpoint(tmp_path / "1", *resumed[2][:2])
    assert all(run[1].state_dict() == optimizer.state_dict() for run in resumed)
    for _ in range(20):
        angle = step(model, optimizer)
        state = optimizer.state_dict()
        for run in (twin, *resumed):
            assert step(*run[:2]) == angle
            assert run[1].state_dict() == state
    assert twin[2].merges == schedule.merges > merges
    assert all(run[2].merges == schedule.merges - merges for run in resumed)


def test_a_run_that_saves_before_it_loads_weights_is_the_run_that_does_not() -> None:
    """A measurement under way is none of the rotations that are loaded."""
    runs = build(0.001), build(0.001)
    for (model, optimizer, schedule), saves in zip(runs, (True, False), strict=True):
        step(model, optimizer)
        after_one, gradient = copy.deepcopy(model.state_dict()), 1.0
        while schedule._guard._pending is None:
            step(model, optimizer, gradient)
            gradient *= 1.1
        if saves:
            optimizer.state_dict()
        model.load_state_dict(after_one)
    for _ in range(10):
        assert step(*runs[0][:2]) == step(*runs[1][:2])
        assert runs[0][1].state_dict() == runs[1][1].state_dict()


@pytest.mark.parametrize("loaded", [0, 1], ids=["taken before", "taken since"])
def test_rotations_loaded_before_further_layers_are_taken_are_measured(loaded: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(2)))
    config = poetx.POETXConfig(block_size=4, merge_interval=1000, max_angle=LIMIT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    poetx.prepare(model[0], config)
    schedule = poetx.adopt(optimizer, model[0], poetx_lr=0.001)
    for _ in range(2):
        step(model[0], optimizer)
    poetx.prepare(model[1], config)
    state = model[loaded].state_dict()
    turned = {k: torch.full_like(v, 0.05) if "skew" in k else v for k, v in state.items()}
    model[loaded].load_state_dict(turned)
    poetx.adopt(optimizer, model[1])
    step(model[0], optimizer)
    angle = diagnostics(model)["angle_max"]
    assert schedule.angle == pytest.approx(angle, abs=0.01)
    assert angle > 0.1


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_an_optimiser_of_rotations_on_meta_saves_what_it_had_before_a_load(assign: bool) -> None:
    real, _, _ = build()
    with torch.device("meta"):
        model, optimizer, _ = build()
    before = optimizer.state_dict()
    model.load_state_dict(real.state_dict(), assign=assign)
    assert optimizer.state_dict() == before


def test_rotations_that_stay_nan_are_told_at_the_guards_next_merge() -> None:
    model, optimizer, _ = build()
    step(model, optimizer)
    with pytest.raises(DivergedError):
        [step(model, optimizer, float("nan")) for _ in range(40)]


def test_a_measurement_that_is_not_finite_is_not_entered() -> None:
    skew = torch.full((1, 6), float("nan"))
    guard, ledger = AngleGuard([(skew, 4)], LIMIT), AngleGuard.fresh()
    guard.after_step(ledger, 1, 0.01)
    assert (ledger[ANGLE], ledger[TURN]) == (0.0, 0.0)
    skew.fill_(0.01)
    guard.after_step(ledger, 2, 0.01)
    assert 0 < ledger[ANGLE] < 0.1
