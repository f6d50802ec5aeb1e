"""Which optimisers train rotations, by what a copy of them does; and states made fresh again."""

from __future__ import annotations

import copy
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import poetx_compile as poetx
from poetx_compile.errors import AdoptionError, ConfigError
from poetx_compile.layers.prepared import stored_weight
from poetx_compile.optim.probe import Probed, probe
from poetx_compile.optim.schedule import schedule_of
from tests.helpers.models import MLP
from tests.helpers.optimisers import (
    ACCEPTED,
    REFUSED,
    SAM,
    Build,
    CountsInGroup,
    EarlyState,
    ScheduleFreeSGD,
    parameters,
)
from tests.helpers.rotations import skews
from tests.helpers.tolerances import assert_close

INTERVAL = 4
CANNOT_RESET = ["counter of a group", "early state"]
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):  # there its state is made only once
    CANNOT_RESET.append("Adagrad")


def prepared(moments: str = "keep", interval: int = INTERVAL) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(12, 12, bias=False)
    config = poetx.POETXConfig(
        block_size=4,
        merge_interval=interval,
        redraw_interval=interval,
        max_angle=None,
        moments=moments,
    )
    poetx.prepare(model, config)
    return model


def built(name: str, model: nn.Module, build: Build | None = None) -> Optimizer:
    """The optimiser over `param_groups`, attached."""
    rule = "adafactor" if name == "Adafactor" else "adamw"
    optimizer = (build or ACCEPTED[name])(poetx.param_groups(model, lr=1e-3, rule=rule))
    poetx.attach(optimizer, model)
    return optimizer


def step(optimizer: Optimizer, model: nn.Module, number: int | None) -> list[Tensor]:
    """A step with gradients that follow from `number`, or zero; the rotations after it."""

    def closure() -> Tensor:
        for i, p in enumerate(skews(model)):
            generator = torch.Generator().manual_seed(100 * (number or 0) + i)
            p.grad = 0.1 * torch.randn(p.shape, generator=generator)
            if number is None:
                p.grad.zero_()
        return torch.zeros(())

    closure()
    optimizer.step(closure)
    return [p.detach().clone() for p in skews(model)]


# --- merges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_steps_after_a_merge_as_if_there_had_been_none(name: str) -> None:
    """With moments kept, a step means the same turn whatever angle the rotations stand at."""
    merging, turning = prepared(), prepared(interval=100)
    one, other = built(name, merging), built(name, turning)
    for number in range(INTERVAL):
        step(one, merging, number)
        before = step(other, turning, number)
    assert (schedule_of(one).merges, schedule_of(other).merges) == (1, 0)
    after = step(one, merging, INTERVAL)
    moved = [a - b for a, b in zip(step(other, turning, INTERVAL), before, strict=True)]
    if name == "LAMB":  # its steps are proportional to the size of what they move, by design
        after = [a / a.norm() for a in after]
        moved = [m / m.norm() for m in moved]
    for a, m in zip(after, moved, strict=True):
        assert a.abs().max() > 0
        assert_close(a, m, torch.float32)


@pytest.mark.parametrize("how", ["attach", "adopt"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_attach_and_adopt_alike(name: str, how: str) -> None:
    reason, build = REFUSED[name]
    model = prepared()
    weights = skews(model) if how == "attach" else [stored_weight(model), *skews(model)]
    optimizer = build(list(weights))
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(AdoptionError, match=rf"cannot train rotations: .*({reason})"):
        (poetx.attach if how == "attach" else poetx.adopt)(optimizer, model)
    assert schedule_of(optimizer) is None
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in before["params"]]


def test_the_refused_are_wrong_after_a_merge() -> None:
    """Schedule-free averaging, the way `attach` used to allow it: no gradient, and W moves."""
    from poetx_compile.optim.merge import merge

    model = prepared()
    optimizer = ScheduleFreeSGD(list(skews(model)), lr=1.0)
    optimizer.train()
    for number in range(4):
        step(optimizer, model, number)
    merge(model, redraw=True)
    before = model.weight.detach().clone()
    step(optimizer, model, None)
    assert (model.weight - before).norm() > 0.05 * before.norm()


def test_only_groups_that_hold_rotations_are_tried() -> None:
    """A mixed optimiser: one rule for dense matrices, another for the rest."""
    model = MLP()
    poetx.prepare(model, poetx.POETXConfig(block_size=4, exclude_modules=("down",)))
    groups = {g["name"]: g for g in poetx.param_groups(model, lr=1e-3)}

    class Mixed(torch.optim.SGD):
        """Orthogonalises the groups that say so."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        update = p.grad
                        if group.get("orthogonal"):
                            u, _, vh = torch.linalg.svd(update, full_matrices=False)
                            update = u @ vh
                        p.sub_(update, alpha=group["lr"])

    groups["dense"]["orthogonal"] = True
    poetx.attach(Mixed(list(groups.values()), lr=1e-3), model)
    rotations = groups["poetx b=4"] | {"orthogonal": True}
    with pytest.raises(AdoptionError, match="orthogonalises"):
        poetx.attach(Mixed([rotations], lr=1e-3), model)


def test_our_own_optimisers_pass_as_any_other() -> None:
    for kind in (poetx.POETXAdamW, poetx.POETXMuon):
        model = prepared()
        assert probe(kind(model), skews(model), "reset") == Probed("zero")


def test_the_optimiser_that_is_tried_is_not_touched() -> None:
    """Nor is the random state, nor a scheduler that has put a step of its own on it."""
    weights = parameters((4, 5), (6, 5))
    optimizer = SAM(weights, lambda q: torch.optim.Adam(q, lr=torch.tensor(1e-3)))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base, 1)
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step(lambda: torch.zeros(()))
    scheduler.step()
    values = [p.detach().clone() for p in weights]
    before = copy.deepcopy([optimizer.base.state_dict(), torch.get_rng_state()])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    probe(optimizer, weights, "keep")
    state, random = before
    assert torch.equal(torch.get_rng_state(), random)
    for p, value in zip(weights, values, strict=True):
        assert torch.equal(p, value)
        assert p.grad.eq(1).all()
    now = optimizer.base.state_dict()
    assert now["param_groups"] == state["param_groups"]
    for index, entry in state["state"].items():
        assert all(torch.equal(now["state"][index][key], v) for key, v in entry.items())
    assert not calls


def test_what_cannot_be_copied_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Uncopied(torch.optim.SGD):
        def __init__(self, params: Any):
            super().__init__(params, lr=0.1)
            self.handle = (number for number in ())  # no generator can be copied

    model = prepared()
    poetx.attach(Uncopied(list(skews(model))), model)
    (record,) = caplog.records
    assert "Uncopied cannot be tried on small parameters (TypeError" in record.getMessage()


def test_an_optimiser_that_makes_its_state_when_built_is_built_after_prepare() -> None:
    model = MLP()
    optimizer = EarlyState(model.parameters())
    config = poetx.POETXConfig(block_size=4)
    with pytest.raises(AdoptionError, match=r"EarlyState makes its state .*prepare\(model\)"):
        poetx.adopt(optimizer, model, config)
    poetx.adopt(EarlyState(model.parameters()), model)


# --- moments="reset" ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ACCEPTED if name not in CANNOT_RESET])
def test_a_reset_state_is_that_of_a_fresh_optimiser(name: str) -> None:
    used, new = prepared("reset"), prepared("reset")
    optimizer = built(name, used)
    for number in range(INTERVAL):
        step(optimizer, used, number)
    assert not any(p.any() for p in skews(used))
    fresh = built(name, new)
    for number in range(INTERVAL, 2 * INTERVAL - 1):
        for a, b in zip(step(optimizer, used, number), step(fresh, new, number), strict=True):
            assert a.any()
            assert torch.equal(a, b)


@pytest.mark.parametrize("build", [CountsInGroup, EarlyState])
def test_what_cannot_be_made_fresh_is_refused(build: Build) -> None:
    model = prepared("reset")
    with pytest.raises(ConfigError, match=r"moments = 'reset' is not possible .*moments='keep'"):
        poetx.attach(build(poetx.param_groups(model, lr=1e-3)), model)


# --- the table ------------------------------------------------------------------------------------


def _table() -> dict[str, tuple[str, str]]:
    """Optimiser → (trains rotations, moments="reset"), as docs/how-to/own-optimiser.md says."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "own-optimiser.md"
    text = page.read_text(encoding="utf-8")
    lines = text[text.index("| optimiser | trains rotations") :].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in takewhile(lambda x: x[:1] == "|", lines)]
    return {name: (trains, reset) for names, trains, reset in rows for name in names.split(", ")}


TABLE = _table()


def test_the_table_has_every_optimiser_of_torch_and_every_form() -> None:
    assert TABLE.keys() == ACCEPTED.keys() | REFUSED.keys()
    found = {n for n, c in vars(torch.optim).items() if isinstance(c, type) and n != "Optimizer"}
    assert found <= {name.split()[0].replace("L-BFGS", "LBFGS") for name in TABLE}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_says_what_happens(name: str) -> None:
    trains, reset = TABLE[name]
    weights = parameters((4, 5), (6, 5))
    optimizer = ACCEPTED[name](weights) if name in ACCEPTED else REFUSED[name][1](weights)
    if trains.startswith("no"):
        with pytest.raises(AdoptionError):
            probe(optimizer, weights, "reset")
    elif name in CANNOT_RESET:
        assert reset.startswith("refused") or name == "Adagrad"
        with pytest.raises(ConfigError, match="moments = 'reset'"):
            probe(optimizer, weights, "reset")
    else:
        how = {"zero": "in place", "drop": "made again"}
        assert how[probe(optimizer, weights, "reset").reset] == reset
