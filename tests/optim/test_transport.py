"""Redraws apart from merges, and the moments that follow their planes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.errors import ConfigError, InterruptedMergeError
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from poetx_compile.layers.sides import Side
from poetx_compile.ops.permute import pair_index
from poetx_compile.optim import param_groups, transport
from poetx_compile.optim.merge import merge, redraw
from poetx_compile.optim.momentum import values
from poetx_compile.optim.schedule import LAST_REDRAW
from tests.helpers.models import Siblings
from tests.helpers.optimisers import with_gradients
from tests.helpers.rotations import skews, turn
from tests.helpers.tolerances import assert_close
from tests.helpers.training import both

Pairs = dict[tuple[int, int], float]
"""The value of each ordered pair of coordinates that has one."""


def pairs_of(packed: Tensor, side: Side) -> Pairs:
    """What packed values say of coordinates, one by one: −x of (j, i) where x of (i, j)."""
    coordinates = pair_index(side.permutation.pair, 0, side.permutation.size).tolist()
    pairs: Pairs = {}
    for block, entries in enumerate(packed.tolist()):
        inside = coordinates[block * side.block : (block + 1) * side.block]
        for (i, j), value in zip(itertools.combinations(inside, 2), entries, strict=True):
            pairs[i, j], pairs[j, i] = value, -value
    return pairs


def sides(model: nn.Module) -> list[Side]:
    return [side for _, _, e in prepared_linears(model) for side in e.sides]


@pytest.mark.parametrize("batch", [1, 40, 2**22])  # parts of a side, some sides, all at once
@pytest.mark.parametrize(
    ("size", "fields"),
    [
        ((24, 31), {"block_size": 8}),  # 7 left over
        ((13, 10), {"block_size": (5, 4)}),
        ((6, 30), {"block_size": 6}),  # one block and nothing left over: not redrawn
        ((64, 32), {"block_size": 16, "permutation": "chunked"}),
    ],
)
def test_a_moment_stays_with_its_pair(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], fields: dict[str, Any], batch: int
) -> None:
    monkeypatch.setattr(transport, "BATCH", batch)
    model = nn.ModuleList([Siblings(size[0]), nn.Linear(*size)])
    poetx.prepare(model, poetx.POETXConfig(seed=3, **fields))
    state = {
        s.skew: {"step": 7, "first": torch.randn_like(s.skew), "second": torch.rand_like(s.skew)}
        for s in sides(model)
        if s.skew.numel()
    }
    before = [
        {key: (pairs_of(state[s.skew][key], s), state[s.skew][key].mean()) for key in SIGNED}
        for s in sides(model)
    ]
    addresses = [state[s.skew]["first"].data_ptr() for s in sides(model)]
    merge(
        model,
        redraw=True,
        then=lambda moves: transport.transport(sides(model), moves, state, SIGNED),
    )
    assert addresses == [state[s.skew]["first"].data_ptr() for s in sides(model)]
    kept = new = 0
    for side, known in zip(sides(model), before, strict=True):
        for (i, j), value in pairs_of(state[side.skew]["first"], side).items():
            assert value == known["first"][0].get((i, j), 0.0)
        pairs, mean = known["second"]
        for (i, j), value in pairs_of(state[side.skew]["second"], side).items():
            if (i, j) in pairs:
                assert abs(value) == abs(pairs[i, j])
                kept += 1
            else:
                assert abs(value) == pytest.approx(mean.item(), rel=1e-5)
                new += 1
    assert kept
    assert new
    assert {state[s.skew]["step"] for s in sides(model)} == {7}


SIGNED = {"first": True, "second": False}


def test_a_merge_keeps_every_place_and_a_redraw_every_value() -> None:
    model = Siblings().double()
    poetx.prepare(model, poetx.POETXConfig(block_size=16, cayley="exact"))
    turn(model, 0.2)
    x = torch.randn(9, 48, dtype=torch.float64)
    before, draws = model(x), [s.permutation.draw for s in sides(model)]
    merge(model)
    assert [s.permutation.draw for s in sides(model)] == draws
    assert not any(s.any() for s in skews(model))
    assert_close(model(x), before, torch.float64)
    weights = [m.weight.clone() for _, m, _ in prepared_linears(model)]
    stored = [stored_weight(m).clone() for _, m, _ in prepared_linears(model)]
    seen: list[Any] = []
    redraw(model, then=seen.append)
    for (_, module, e), weight, old in zip(prepared_linears(model), weights, stored, strict=True):
        assert torch.equal(module.weight, weight)
        assert not torch.equal(stored_weight(module), old)
        assert {s.permutation for s in e.sides} <= set(seen[0])


# --- the schedule ---------------------------------------------------------------------------------


def attached(build: Any, model: nn.Module, **fields: Any) -> tuple[Any, poetx.optim.MergeSchedule]:
    """An optimiser, and its schedule: merges every 2 steps, redraws every 5."""
    fields = {"merge_interval": 2, "redraw_interval": 5, "max_angle": None, **fields}
    config = poetx.POETXConfig(**{"block_size": 4, **fields})
    optimizer = build(model, lr=1e-3, config=config)
    return optimizer, optimizer.schedule


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, size: float = 1) -> None:
    for i, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * number + i)
        p.grad = size * torch.randn(p.shape, generator=generator) if p.requires_grad else None
    optimizer.step()


@both
@pytest.mark.parametrize("moments", ["transport", "keep", "reset"])
def test_redraws_have_an_interval_of_their_own(optimizer_class, moments: str) -> None:
    model = nn.Linear(12, 8)
    optimizer, schedule = attached(optimizer_class, model, moments=moments)
    seen = []
    for number in range(11):
        step(model, optimizer, number)
        seen.append((schedule.last_merge, schedule.last_redraw, sides(model)[0].permutation.draw))
    assert seen == [
        *[(0, 0, 1), (2, 0, 1), (2, 0, 1), (4, 0, 1)],
        *[(5, 5, 2), (5, 5, 2), (7, 5, 2), (7, 5, 2), (9, 5, 2)],
        *[(10, 10, 3), (10, 10, 3)],
    ]
    assert (schedule.merges, schedule.redraws, schedule.early_merges) == (6, 2, 0)


@both
@pytest.mark.parametrize("moments", ["transport", "keep", "reset"])
def test_moments_at_a_redraw_and_at_a_merge(optimizer_class, moments: str) -> None:
    model = nn.ModuleList([nn.Linear(12, 4), nn.Linear(4, 12)])
    optimizer, _ = attached(optimizer_class, model, moments=moments, merge_interval=3)
    never = nn.ModuleList([nn.Linear(12, 4), nn.Linear(4, 12)])
    other, schedule = attached(optimizer_class, never, redraw_interval=None, merge_interval=10**6)
    assert schedule.config.moments == "transport"
    first = "momentum_buffer" if optimizer_class is poetx.POETXMuon else "exp_avg"
    for number in range(5):
        step(model, optimizer, number)
        step(never, other, number)
        before = [pairs_of(other.state[s.skew][first], s) for s in sides(never)]
        if number < 4:  # a merge between is no business of the moments
            for s, t in zip(skews(model), skews(never), strict=True):
                assert torch.equal(optimizer.state[s][first], other.state[t][first])
    for side, pairs, old in zip(sides(model), before, skews(never), strict=True):
        moment = optimizer.state[side.skew][first]
        if side.block == side.permutation.size or moments == "keep":
            assert torch.equal(moment, other.state[old][first])
        elif moments == "reset":
            assert not any(v.any() for v in optimizer.state[side.skew].values())
        else:
            moved = pairs_of(moment, side)
            assert moved == {pair: pairs.get(pair, 0.0) for pair in moved}


def test_the_merges_of_the_guard_keep_the_permutations() -> None:
    model = nn.Linear(12, 8)
    optimizer, schedule = attached(
        poetx.POETXMuon, model, merge_interval=1000, redraw_interval=7, max_angle=0.004
    )
    draws = []
    for number in range(8):
        step(model, optimizer, number)
        draws.append(sides(model)[0].permutation.draw)
    assert draws == [1] * 6 + [2, 2]
    assert schedule.early_merges >= 4
    assert schedule.redraws == 1


def test_sides_of_one_block_are_never_redrawn() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    optimizer, schedule = attached(
        poetx.POETXMuon, model, block_size=8, merge_interval=1000, redraw_interval=1
    )
    pairs = [s.permutation.pair.clone() for s in sides(model)]
    for number in range(3):
        step(model, optimizer, number)
    assert all(s.any() for s in skews(model)), "nothing to redraw, and so no merge for it"
    assert (schedule.merges, schedule.redraws, schedule.last_redraw) == (0, 0, 0)
    merge(model, redraw=True)
    assert all(map(torch.equal, pairs, [s.permutation.pair for s in sides(model)]))


def test_a_permutation_is_redrawn_for_the_side_that_gains() -> None:
    """Of two sides that share one, one of one block and one of several."""
    model = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
    config = poetx.POETXConfig(block_size=(8, 4))
    poetx.prepare(model, config, shared=[("up.out", "down.in")])
    merge(model, redraw=True)
    draws = {name: [s.permutation.draw for s in e.sides] for name, _, e in prepared_linears(model)}
    assert draws == {"up": [1, 2], "down": [2, 1]}
    loaded = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
    poetx.prepare(loaded, config, shared=[("up.out", "down.in")])
    loaded.load_state_dict(model.state_dict())
    plain = poetx.plain_state_dict(model.state_dict())
    for name, linear in loaded.items():
        assert torch.equal(linear.weight, model[name].weight)
        assert torch.equal(linear.weight, plain[f"{name}.weight"])


@both
def test_the_merged_form_redraws_and_writes_no_weight(optimizer_class) -> None:
    model = nn.Linear(12, 8)
    optimizer, schedule = attached(optimizer_class, model, merge_interval=1, redraw_interval=5)
    never = nn.Linear(12, 8)
    other, _ = attached(optimizer_class, never, merge_interval=1, redraw_interval=None)
    with torch.no_grad():
        stored_weight(never).copy_(stored_weight(model))
        never.bias.copy_(model.bias)
    for number in range(5):
        step(model, optimizer, number)
        step(never, other, number)
    assert (schedule.merges, schedule.redraws, schedule.last_redraw) == (0, 1, 5)
    assert torch.equal(model.weight, never.weight)
    first = "momentum_buffer" if optimizer_class is poetx.POETXMuon else "exp_avg"
    for side, old in zip(sides(model), sides(never), strict=True):
        pairs = pairs_of(other.state[old.skew][first], old)
        moved = pairs_of(optimizer.state[side.skew][first], side)
        assert moved == {pair: pairs.get(pair, 0.0) for pair in moved}
    resumed = nn.Linear(12, 8)
    again, _ = attached(optimizer_class, resumed, merge_interval=1, redraw_interval=5)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(5, 12):
        step(model, optimizer, number)
        step(resumed, again, number)
    assert torch.equal(model.weight, resumed.weight)
    assert schedule.redraws == 2


def test_new_planes_take_no_large_steps() -> None:
    """A second moment at zero would have them go 3 to 6 times as far, and no counter sees it."""
    model = nn.Linear(64, 64, bias=False)
    config = poetx.POETXConfig(block_size=16, redraw_interval=60, max_angle=None)
    optimizer = poetx.POETXAdamW(model, lr=1e-3, poetx_lr=1e-3, config=config, betas=(0.9, 0.999))
    largest = []
    for number in range(70):
        before = [s.detach().clone() for s in skews(model)]
        step(model, optimizer, number)
        turned = [(s - old).abs().max() for s, old in zip(skews(model), before, strict=True)]
        largest.append(torch.stack(turned).max().item())
    settled, after = max(largest[30:59]), max(largest[60:])
    assert optimizer.schedule.redraws == 1
    assert after <= 1.2 * settled


class Rounded(torch.optim.Optimizer):
    """Keeps its momentum in 8 bits, with an offset."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, p, grad in with_gradients(self):
            state = self.state[p]
            if not state:
                state["codes"] = torch.full_like(p, 128, dtype=torch.uint8)
            momentum = (state["codes"].float() - 128) / 100
            momentum.lerp_(grad, 0.1)
            state["codes"].copy_((momentum * 100 + 128).round().clamp(0, 255))
            p.sub_(momentum, alpha=group["lr"])


def test_a_state_that_cannot_move_is_refused() -> None:
    model = nn.Linear(8, 8)
    poetx.prepare(model, poetx.POETXConfig(block_size=4))
    with pytest.raises(ConfigError, match=r"moments = 'transport' .*Rounded.*'codes'.*'keep'"):
        poetx.attach(Rounded(param_groups(model, lr=1e-3)), model)
    kept = nn.Linear(8, 8)
    poetx.prepare(kept, poetx.POETXConfig(block_size=4, moments="keep"))
    poetx.attach(Rounded(param_groups(kept, lr=1e-3)), kept)


def test_an_older_state_was_redrawn_at_its_last_merge() -> None:
    model = nn.Linear(12, 8)
    optimizer, schedule = attached(poetx.POETXMuon, model)
    for number in range(4):
        step(model, optimizer, number)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop(LAST_REDRAW, None)
    optimizer.load_state_dict(state)
    assert (schedule.last_merge, schedule.last_redraw) == (4, 4)


def test_a_redraw_that_is_cut_off_marks_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(12, 8)
    optimizer, _ = attached(poetx.POETXMuon, model, redraw_interval=1)
    monkeypatch.setattr("poetx_compile.optim.schedule.transport", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(model, optimizer, 0)
    with pytest.raises(InterruptedMergeError):
        model.state_dict()


@pytest.mark.gpu
@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16", "int8"])
def test_a_gpu_moves_moments_as_the_cpu_does(momentum_dtype: str) -> None:
    moments = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Linear(300, 520).to(device)
        config = poetx.POETXConfig(block_size=128, redraw_interval=2, max_angle=None)
        optimizer = poetx.POETXMuon(model, config=config, momentum_dtype=momentum_dtype)
        for number in range(2):
            for i, p in enumerate(skews(model)):
                generator = torch.Generator().manual_seed(10 * number + i)
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            optimizer.step()
        assert optimizer.schedule.redraws == 1
        moments.append([values(optimizer.state[s], "momentum_buffer").cpu() for s in skews(model)])
    step_size = {"float32": 1e-6, "bfloat16": 2**-8, "int8": 1 / 127}[momentum_dtype]
    for one, other in zip(*moments, strict=True):
        assert ((one == 0) == (other == 0)).float().mean() > 0.98
        assert (one.float() - other.float()).abs().max() <= 1.1 * step_size * one.abs().max()
