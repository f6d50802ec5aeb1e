"""What users do with a model of the merged form (``merge_interval=1``)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import poetx_compile as poetx
from poetx_compile.errors import (
    AdoptionError,
    ConfigError,
    DivergedError,
    InterruptedMergeError,
    StaleOptimizerError,
    UnownedRotationsError,
)
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.ops import turn_weight
from poetx_compile.optim import turning
from poetx_compile.optim.merge import merge
from tests.helpers.merged import OPTIMISERS, Net, data, net, step, weights


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def skews(model: nn.Module) -> list[nn.Parameter]:
    return [skew for _, _, e in prepared_linears(model) for skew in e.skews]


def test_the_weight_is_plain_and_its_rotations_take_no_memory() -> None:
    torch.manual_seed(0)
    plain = Net()
    before = copy.deepcopy(plain)
    config = poetx.POETXConfig(block_size=5, merge_interval=1, exclude_modules=())
    assert "the weights stay plain" in str(poetx.prepare(plain, config))
    assert torch.equal(plain.q.weight, before.q.weight)
    assert plain.q.weight.data_ptr() == stored_weight(plain.q).data_ptr()
    x, _ = data(torch.float32)
    assert torch.equal(plain(x), before(x))
    step(plain, poetx.POETXMuon(plain))
    assert len({skew.data_ptr() for skew in skews(plain) if skew.numel()}) == 1
    assert not any(skew.any() for skew in skews(plain))
    with torch.no_grad():
        plain.q.weight.fill_(0.5)
        nn.init.ones_(plain.k.weight)
    plain.out.weight = torch.full((1, 21), 2.0)
    assert [w.unique().item() for w in weights(plain)] == [0.5, 1.0, 2.0]
    copied = copy.deepcopy(plain).to(torch.float64)
    assert len({skew.data_ptr() for skew in skews(copied) if skew.numel()}) == 1
    assert {skew.dtype for skew in skews(copied)} == {torch.float64}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_does_not_move_keeps_its_bits(name: str) -> None:
    """Frozen layers, layers without a gradient, a rate of zero, steps a scaler skips."""
    model = net(torch.bfloat16)
    model.q.weight.requires_grad_(False)
    optimizer = OPTIMISERS[name](model)
    with torch.no_grad():
        stored_weight(model.k)[0].fill_(-0.0)
    before = weights(model)
    for _ in range(2):  # each side has had its turn
        step(model, optimizer)
    q, k, out = (not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert (q, k, out) == (False, True, True)
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert same(before, weights(model))
    signs = [w.signbit() for w in before]
    assert same(signs, [w.signbit() for w in weights(model)])


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_sees_what_has_changed_since_the_last(name: str) -> None:
    """A weight elsewhere in memory, another parameter in its place, a layer frozen for a while."""
    model, other = net(torch.bfloat16), net(torch.bfloat16)
    optimizers = [(m, OPTIMISERS[name](m)) for m in (model, other)]

    def steps() -> None:
        for it in optimizers:
            for _ in range(3):  # each side has its turn
                step(*it)
        assert same(weights(model), weights(other))

    steps()
    moved, chain = stored_weight(model.q), model.k.parametrizations["weight"]
    left = moved.data, stored_weight(model.k)
    moved.data = moved.data.clone()
    chain.original = nn.Parameter(left[1].detach().clone(), requires_grad=False)
    before = [w.clone() for w in left]
    steps()
    assert same(before, [*left])
    before = weights(model)
    for frozen in (True, False):
        for m in (model, other):
            for skew in equivalence_of(m.out).skews:
                skew.requires_grad_(not frozen and len(skew) > 0)
        steps()
        changed = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
        assert changed == [True, True, not frozen]


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_skips_steps(fused: bool) -> None:
    model = net(torch.float32)
    optimizer = poetx.POETXAdamW(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = data(torch.float32)
    counted = []
    for factor in (1.0, float("inf"), 1.0):
        before = weights(model)
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        counted.append((optimizer.schedule.step, same(before, weights(model))))
    assert counted == [(1, False), (1, True), (2, False)]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_run_goes_on_bit_for_bit(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding, redraws, norms put right: all of it follows from the saved count of steps."""
    monkeypatch.setattr(turning, "NORM_EVERY", 2)
    model = net(torch.bfloat16, redraw_interval=4)
    optimizer = OPTIMISERS[name](model)
    for _ in range(3):
        step(model, optimizer)
    poetx.save_checkpoint(tmp_path / "state", model, optimizer)
    state = torch.load(tmp_path / "state", weights_only=True)["model"]
    assert not any("skew" in key for key in state)
    assert state["q.parametrizations.weight.original"].equal(model.q.weight)
    for _ in range(2):
        step(model, optimizer)
    assert {e.draw for _, _, e in prepared_linears(model)} == {2}
    other = net(torch.bfloat16, redraw_interval=4)
    again = OPTIMISERS[name](other)
    poetx.load_checkpoint(tmp_path / "state", other, again)
    for _ in range(2):
        step(other, again)
    assert same(weights(model), weights(other))
    assert torch.equal(model.q.weight, poetx.plain_state_dict(other)["q.weight"])
    unloaded = poetx.merge_and_unload(other)
    assert type(unloaded.q) is nn.Linear
    assert torch.equal(unloaded.q.weight, model.q.weight)


@pytest.mark.parametrize("merged_first", [False, True])
def test_a_checkpoint_of_the_other_form_is_converted(merged_first: bool) -> None:
    """The effective weights are the same, the coordinates of the moments as well."""
    intervals = (1, 200) if merged_first else (200, 1)
    model = net(merge_interval=intervals[0], max_angle=None)
    optimizer = OPTIMISERS["POETXMuon"](model)
    for _ in range(2):
        step(model, optimizer)
    if not merged_first:
        merge(model, redraw=True)  # to another draw, with rotations on top
        step(model, optimizer)
    other = net(merge_interval=intervals[1], max_angle=None, seed=5)
    again = OPTIMISERS["POETXMuon"](other)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    x, _ = data()
    assert (model(x) - other(x)).abs().max() < 1e-13
    assert [e.draw for _, _, e in prepared_linears(other)] == [
        e.draw for _, _, e in prepared_linears(model)
    ]
    before = model(x)
    for group in (*optimizer.param_groups, *again.param_groups):
        group["lr"] *= 1e-3
    step(model, optimizer)
    step(other, again)
    moved, apart = (model(x) - before).norm(), (model(x) - other(x)).norm()
    assert moved > 0
    assert apart < 0.1 * moved  # rotations on top of others are no sum of both


def test_an_interrupted_step_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = OPTIMISERS["SGD"](model)
    step(model, optimizer)
    state = copy.deepcopy(model.state_dict())
    real = turn_weight.turn_weight_
    calls = []

    def fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(turn_weight, "turn_weight_", fails)
    with pytest.raises(KeyboardInterrupt):
        step(model, optimizer)
    monkeypatch.undo()
    for use in (lambda: step(model, optimizer), optimizer.step, model.state_dict):
        with pytest.raises(InterruptedMergeError, match="Load the last checkpoint"):
            use()
    model.load_state_dict(state)
    step(model, optimizer)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_that_is_not_finite_turns_nothing(name: str) -> None:
    model = net(torch.float32)
    optimizer = OPTIMISERS[name](model)
    step(model, optimizer)
    before = weights(model)
    with pytest.raises(DivergedError, match="no weight was turned"):
        step(model, optimizer, factor=float("nan"))
    assert same(before, weights(model))
    assert not any(skew.any() for skew in skews(model))


def test_adoption() -> None:
    """A model that nobody prepared, with any optimiser over its parameters."""
    torch.manual_seed(0)
    model = Net().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    options = {"stage": "aot_eager", "block_size": 5, "merge_interval": 1, "exclude_modules": ()}
    forward = torch.compile(model, backend=poetx.poetx_backend, options=options)
    losses = [step(model, optimizer, forward) for _ in range(6)]
    assert losses[-1] < losses[0]
    e = equivalence_of(model.q)
    assert e is not None
    assert e.merged
    assert not any(skew.any() for skew in skews(model))
    torch.manual_seed(0)
    plain = Net()
    assert torch.linalg.svdvals(model.q.weight).allclose(
        torch.linalg.svdvals(plain.q.weight.double()), rtol=1e-4
    )
    assert not torch.equal(model.q.weight, plain.q.weight.double())


def test_averages_of_weights_mean_something() -> None:
    model = net()
    optimizer = OPTIMISERS["AdamW"](model)
    averaged = AveragedModel(model)
    seen = []
    for _ in range(3):
        step(model, optimizer)
        averaged.update_parameters(model)
        seen.append(model.q.weight.detach().clone())
    mean = torch.stack(seen).mean(0)
    assert (averaged.module.q.weight - mean).abs().max() < 1e-12
    x, _ = data()
    averaged.eval()(x)
    averaged.state_dict()
    for p, average in zip(model.parameters(), averaged.parameters(), strict=True):
        p.data.copy_(average)
    assert torch.equal(model.eval().q.weight, averaged.module.q.weight)
    model.state_dict()
    step(model.train(), optimizer)


def test_closures() -> None:
    one, other = net(), net()
    first, second = OPTIMISERS["SGD"](one), OPTIMISERS["SGD"](other)
    x, y = data()
    at_rest = []

    def closure() -> torch.Tensor:
        second.zero_grad()
        at_rest.append(len({skew.data_ptr() for skew in skews(other)}) == 2)  # one is empty
        loss = (other(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        expected = step(one, first)
        assert torch.equal(second.step(closure), expected)
    assert same(weights(one), weights(other))
    assert all(at_rest)

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if closure is not None and closure is not Twice:
                closure()
            return super().step(closure)

    model = net()
    twice = Twice(poetx.param_groups(model, lr=0.01), lr=0.01)
    poetx.attach(twice, model)

    def again() -> torch.Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    with pytest.raises(AdoptionError, match="more than once"):
        twice.step(again)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="neumann_order"):
        poetx.POETXConfig(merge_interval=1, neumann_order=1)
    model = net()
    optimizer = torch.optim.SGD(poetx.param_groups(model, lr=0.1), lr=0.1)
    with pytest.raises(UnownedRotationsError, match="call poetx_compile"):
        step(model, optimizer)
    optimizer = poetx.POETXMuon(model)
    model.load_state_dict(net().state_dict(), assign=True)
    with pytest.raises(StaleOptimizerError, match="assign=True"):
        step(model, optimizer)


def test_a_large_step_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for rate, told in ((0.01, False), (0.2, True)):
        caplog.clear()
        model = net(torch.float32)
        optimizer = poetx.POETXMuon(model, lr=0.01, poetx_lr=rate)
        for _ in range(3):
            step(model, optimizer)
        assert 0.5 * rate < optimizer.schedule.angle < 1.5 * rate
        assert ("turned rotations by" in caplog.text) is told


def test_diagnostics_tell_of_the_drift() -> None:
    model = net(torch.bfloat16)
    optimizer = poetx.POETXMuon(model, lr=0.01)
    start = {name: m.weight.float().norm() for name, m, _ in prepared_linears(model)}
    assert poetx.diagnostics(model)["norm_drift_max"] == 0
    for _ in range(5):
        step(model, optimizer)
    drifts = [
        (m.weight.float().norm() / start[name] - 1).item() for name, m, _ in prepared_linears(model)
    ]
    other = net(torch.bfloat16, seed=4)
    other.load_state_dict(model.state_dict())
    for it in (model, other):
        figures = poetx.diagnostics(it)
        assert abs(figures["norm_drift_max"] - max(map(abs, drifts))) < 1e-6
        assert abs(figures["norm_drift_mean"] - sum(drifts) / len(drifts)) < 1e-6
        assert 0 < figures["norm_drift_max"] < 0.01
        assert figures["angle_max"] == 0
    model.q.weight = 3 * model.q.weight.detach()
    nn.init.normal_(model.k.weight)
    step(model, optimizer)
    assert poetx.diagnostics(model)["norm_drift_max"] < 0.01


@pytest.mark.parametrize("name", ["AdamW", "POETXAdamW", "POETXMuon, turn_every"])
def test_rounding_moves_no_norm_for_long(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def drift(every: int, dtype: torch.dtype, steps: int = 122) -> tuple[float, torch.Tensor]:
        monkeypatch.setattr(turning, "NORM_EVERY", every)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 256, bias=False)).to(dtype)
        poetx.prepare(model, poetx.POETXConfig(block_size=64, merge_interval=1))
        optimizer = OPTIMISERS[name](model)
        x = torch.randn(8, 256).to(dtype)
        for _ in range(steps):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return poetx.diagnostics(model)["norm_drift_max"], model[0].weight.detach()

    assert drift(40, torch.bfloat16)[0] < 6e-5 < 2e-4 < drift(1000, torch.bfloat16)[0]
    assert torch.equal(drift(2, torch.float32, 6)[1], drift(1000, torch.float32, 6)[1])


def test_a_norm_that_somebody_else_has_changed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes through the stored parameters is not seen: what is written has to stay."""
    monkeypatch.setattr(turning, "NORM_EVERY", 2)
    model = net(torch.bfloat16)
    optimizer = poetx.POETXMuon(model, lr=0.01)
    step(model, optimizer)
    before = stored_weight(model.q).float().norm()
    with torch.no_grad():
        stored_weight(model.q).mul_(0.5)
        stored_weight(model.k).zero_()
    for _ in range(4):
        step(model, optimizer)
    assert abs(stored_weight(model.q).float().norm() / before - 0.5) < 0.005
    assert not stored_weight(model.k).any()
    assert poetx.diagnostics(model)["norm_drift_max"] > 0.49


@pytest.mark.parametrize("name", ["SGD", "POETXMuon"])
def test_a_compiled_step(name: str) -> None:
    one, other = net(), net()
    first, second = OPTIMISERS[name](one), OPTIMISERS[name](other)
    second.step = torch.compile(second.step, backend="eager")
    for _ in range(3):
        step(one, first)
        step(other, second)
    for a, b in zip(weights(one), weights(other), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_a_redraw_writes_no_weight() -> None:
    models = []
    for interval in (2, None):
        model = net(redraw_interval=interval)
        optimizer = OPTIMISERS["POETXMuon"](model)
        models.append((model, optimizer))
        for _ in range(2):
            step(model, optimizer)
    (one, first), (other, second) = models
    assert same(weights(one), weights(other))
    assert first.schedule.redraws == 1
    one.load_state_dict(one.state_dict())
    merge(one, redraw=True)
    assert same(weights(one), weights(other))
    assert {e.draw for _, _, e in prepared_linears(one)} == {3}
    step(one, first)
    step(other, second)
    assert not same(weights(one), weights(other))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gains_multiply_a_plain_weight_and_survive_the_life_of_it(mode: Any) -> None:
    model = net(gains="both")
    optimizer = OPTIMISERS["POETXMuon"](model)
    for _ in range(3):
        step(model, optimizer)
    x, _ = data()
    expected = model(x).detach()
    others = [net(gains="both", merge_interval=interval, seed=3) for interval in (1, 200)]
    for other in (model, *others):
        other.load_state_dict(model.state_dict())
        with mode():
            assert (other.eval()(x) - expected).abs().max() < 1e-13
    plain = Net().double()
    plain.load_state_dict(poetx.plain_state_dict(model))
    assert (plain(x) - expected).abs().max() < 1e-13
