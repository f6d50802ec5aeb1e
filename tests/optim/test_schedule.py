"""When merges happen, what is saved, and what is refused, for both optimisers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

import poetx_compile as poetx
from poetx_compile.errors import (
    ConfigError,
    IncompatibleStateError,
    InterruptedMergeError,
    StaleOptimizerError,
    UnownedRotationsError,
)
from poetx_compile.inspect.diagnostics import diagnostics
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.optim import POETXAdamW, POETXMuon, attach, param_groups
from poetx_compile.optim import merge as merge_module
from poetx_compile.optim.schedule import LAST_MERGE, STEP
from tests.helpers.models import MLP, TinyLM
from tests.helpers.rotations import skews
from tests.helpers.tolerances import relative_error, tolerance
from tests.helpers.training import both, build, draw, train_step


@both
def test_merges_come_at_the_interval(optimizer_class) -> None:
    model, optimizer = build(optimizer_class, merge_interval=3)
    draws = []
    for i in range(7):
        train_step(model, optimizer, i)
        draws.append(draw(model))
        assert all(s.any() for s in skews(model)) is ((i + 1) % 3 != 0)
    assert draws == [1, 1, 2, 2, 2, 3, 3]
    schedule = optimizer.schedule
    assert (schedule.step, schedule.last_merge, schedule.merges) == (7, 6, 2)
    assert (schedule.early_merges, schedule.angle) == (0, None)


@both
def test_accumulated_gradients_count_once(optimizer_class) -> None:
    model, optimizer = build(optimizer_class, merge_interval=2)
    for _ in range(3):
        model(torch.zeros(1, 4, dtype=torch.int64)).square().sum().backward()
    optimizer.step()
    assert (optimizer.schedule.step, draw(model)) == (1, 1)


@both
def test_outputs_survive_the_merge_of_a_step(optimizer_class) -> None:
    model, optimizer = build(optimizer_class, merge_interval=4, poetx_lr=8e-3)
    tokens = torch.arange(24).reshape(2, 12)
    seen = []
    real = merge_module.redraw_all

    def before_merge(permutations):
        with torch.no_grad():
            for _, _, e in prepared_linears(model):
                e.interrupted = False
            seen.append((model(tokens), diagnostics(model)["angle_max"]))
            for _, _, e in prepared_linears(model):
                e.interrupted = True
        return real(permutations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_module, "redraw_all", before_merge)
        for i in range(4):
            train_step(model, optimizer, i)
    (before, angle), after = seen[0], model(tokens)
    assert 0.005 < angle < 0.3
    # 14 layers one after the other, each within the bound of one merge.
    assert relative_error(after, before) <= 14 * (tolerance(torch.float32) + 2 * angle**4)


@both
@pytest.mark.parametrize("max_angle", [None, 0.05])
@pytest.mark.parametrize("stop", [3, 7])
def test_kill_and_resume_is_bitwise(optimizer_class, max_angle, stop: int) -> None:
    """Mid-interval, merges and redraws before and after, through torch.save and weights_only."""
    fields = {"merge_interval": 3, "redraw_interval": 5, "max_angle": max_angle, "lr": 2e-3}
    torch.manual_seed(1)
    model, optimizer = build(optimizer_class, **fields)
    file = io.BytesIO()
    losses = []
    for i in range(13):
        if i == stop:
            torch.save([model.state_dict(), optimizer.state_dict()], file)
        losses.append(train_step(model, optimizer, i))
    assert optimizer.schedule.merges > optimizer.schedule.redraws == 2

    torch.manual_seed(2)
    resumed, resumed_optimizer = build(optimizer_class, **fields)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(state)
    assert resumed_optimizer.schedule.step == stop
    assert losses[stop:] == [train_step(resumed, resumed_optimizer, i) for i in range(stop, 13)]
    for (name, one), other in zip(
        model.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    left, right = optimizer.state_dict(), resumed_optimizer.state_dict()
    assert left["param_groups"] == right["param_groups"]
    for index, state in left["state"].items():
        for key, value in state.items():
            assert torch.equal(value, right["state"][index][key]), key


@both
@pytest.mark.parametrize("flat", [False, True])
def test_resume_through_distributed_checkpoint_state(optimizer_class, flat: bool) -> None:
    """`set_state_dict` takes a step at lr 0 on the loaded model: it must not merge."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = build(optimizer_class, merge_interval=3, max_angle=0.25)
    for i in range(4):
        train_step(model, optimizer, i)
    weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    resumed, other = build(optimizer_class, merge_interval=3, max_angle=0.25)
    set_state_dict(
        resumed, other, model_state_dict=weights, optim_state_dict=state, options=options
    )
    for i in range(4, 8):
        assert train_step(model, optimizer, i) == train_step(resumed, other, i)
    assert (other.schedule.step, other.schedule.last_merge) == (8, 6)


@both
def test_saved_state_is_tensors_and_plain_values(optimizer_class) -> None:
    model, optimizer = build(optimizer_class, max_angle=0.25)
    train_step(model, optimizer)
    for group in optimizer.state_dict()["param_groups"]:
        assert (STEP in group) is (LAST_MERGE in group) is group["name"].startswith("poetx")
        for value in group.values():
            assert isinstance(value, int | float | str | tuple | list | bool | None), value


@both
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("batch", [2, 128])
def test_the_guard_holds_the_angle(optimizer_class, block_size: int, batch: int) -> None:
    """Learning rates far too large, with and without noise: the exact θ stays below the limit."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    target = nn.Linear(64, 64)
    limit = 0.25
    # Each three of optimiser, size, batch and rate meet.
    high = (optimizer_class is POETXAdamW) ^ (block_size == 16) ^ (batch == 2)
    lr = (0.006 if high else 0.001) * (1 if optimizer_class is POETXAdamW else 5)
    _, optimizer = build(
        optimizer_class,
        model,
        block_size=block_size,
        merge_interval=1000,
        max_angle=limit,
        poetx_lr=lr,
    )
    schedule = optimizer.schedule
    # The angle before the merge as well: the guard merges inside of step().
    angles, at_merge = [], []
    guard, guarded = schedule._guard, schedule._guard.after_step

    def after_step(ledger, step, lr):
        angles.append(diagnostics(model)["angle_max"])
        due = guarded(ledger, step, lr)
        if due:
            at_merge.append(angles[-1])
        return due

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "after_step", after_step)
        for i in range(100):
            x = torch.randn(batch, 64, generator=torch.Generator().manual_seed(i))
            F.mse_loss(model(x), target(x).detach()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert max(angles) <= 1.03 * limit
    assert schedule.early_merges == schedule.merges == len(at_merge)
    if max(angles) > 0.9 * limit:
        assert schedule.merges > 0
    # Not too early either: the last step before a merge left no room for two more of its size.
    assert all(angle > 0.4 * limit for angle in at_merge)


def test_a_step_beyond_the_limit_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = build(POETXMuon, max_angle=0.1, poetx_lr=0.3)
    for i in range(3):
        train_step(model, optimizer, i)
    assert optimizer.schedule.merges == 3
    (record,) = caplog.records
    assert "Lower poetx_lr" in record.getMessage()


@both
def test_the_guard_measures_rarely_where_little_turns(
    optimizer_class, monkeypatch: pytest.MonkeyPatch
) -> None:
    from poetx_compile.optim import angle

    calls = []
    real = angle.largest_norms
    monkeypatch.setattr(angle, "largest_norms", lambda s: calls.append(1) or real(s))
    model, optimizer = build(optimizer_class, poetx_lr=1e-5, max_angle=0.25)
    for i in range(50):
        train_step(model, optimizer, i)
    assert optimizer.schedule.merges == 0
    assert 3 <= len(calls) <= 5
    exact = diagnostics(model)["angle_max"]
    optimizer.state_dict()  # brings in the measurement under way
    assert 0 < optimizer.schedule.angle <= exact


def test_a_learning_rate_of_zero_does_not_merge() -> None:
    """Tools that only want the state to exist take such a step, on a loaded model."""
    model, optimizer = build(POETXAdamW, merge_interval=1, max_angle=0.1)
    for skew in skews(model):
        nn.init.constant_(skew, 0.09)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train_step(model, optimizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@both
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_by_the_gradient_scaler_does_not_count(optimizer_class, fused) -> None:
    model, optimizer = build(optimizer_class, merge_interval=2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counted = []
    for factor in (1.0, float("inf"), 1.0):
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        scaler.scale(model(tokens).square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counted.append((optimizer.schedule.step, draw(model)))
    assert counted == [(1, 1), (1, 1), (2, 2)]


@both
def test_learning_rate_schedules_reach_every_group(optimizer_class) -> None:
    model, optimizer = build(optimizer_class, poetx_lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train_step(model, optimizer)
    scheduler.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["dense"] == pytest.approx(5e-4)
    assert rates["poetx b=8"] == pytest.approx(5e-3)
    before = [s.detach().clone() for s in skews(model)]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train_step(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, skews(model), strict=True))


@both
def test_an_interrupted_merge_stops_the_optimiser_until_both_are_restored(
    optimizer_class, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build(optimizer_class, merge_interval=3)
    for i in range(2):
        train_step(model, optimizer, i)
    checkpoint = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "rotate_weight", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_step(model, optimizer, 2)
    with pytest.raises(InterruptedMergeError):
        optimizer.step()
    with pytest.raises(InterruptedMergeError):
        model.state_dict()
    checkpoint.seek(0)
    weights, state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    optimizer.zero_grad()
    assert torch.isfinite(train_step(model, optimizer, 2))
    assert (optimizer.schedule.step, optimizer.schedule.last_merge, draw(model)) == (3, 3, 2)


def test_any_optimiser_can_be_attached() -> None:
    model = MLP()
    poetx.prepare(
        model,
        poetx.POETXConfig(
            block_size=4, merge_interval=2, redraw_interval=2, max_angle=None, moments="reset"
        ),
    )
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1), lr=0.1, momentum=0.9)
    schedule = attach(optimizer, torch.compile(model, backend="eager"))
    for _ in range(4):
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (schedule.step, schedule.merges, draw(model)) == (4, 2, 3)
    assert not any(optimizer.state[s]["momentum_buffer"].any() for s in skews(model))


def test_attach_refuses() -> None:
    model = MLP()
    with pytest.raises(ConfigError, match="not prepared"):
        attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    dense = list(model.parameters())
    config = poetx.POETXConfig(block_size=4)
    poetx.prepare(model, config)
    with pytest.raises(UnownedRotationsError, match="4 of 4 skew parameters"):
        attach(torch.optim.SGD(dense, lr=0.1), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="differs in seed"):
        attach(optimizer, model, poetx.POETXConfig(block_size=4, seed=1))
    attach(optimizer, model, config)
    for attached in (optimizer, POETXAdamW(model)):
        with pytest.raises(ConfigError, match="attached already"):
            attach(attached, model)


@both
def test_a_model_that_changed_under_the_optimiser_is_refused(optimizer_class) -> None:
    model, optimizer = build(optimizer_class)
    train_step(model, optimizer)
    poetx.merge_and_unload(model)
    with pytest.raises(StaleOptimizerError, match="build a new optimiser"):
        optimizer.step()
    config = poetx.POETXConfig(block_size=8, target_modules=["q_proj"], merge_interval=1)
    model = TinyLM()
    _, optimizer = model, optimizer_class(model, config=config)
    model.extra = nn.Sequential()
    model.extra.q_proj = nn.Linear(8, 8)
    poetx.prepare(model)
    with pytest.raises(StaleOptimizerError, match="prepare"):
        train_step(model, optimizer)


def test_state_of_an_optimiser_that_did_not_merge_is_refused() -> None:
    model, optimizer = build(POETXAdamW)
    plain = torch.optim.AdamW(param_groups(model, lr=1e-3))
    with pytest.raises(IncompatibleStateError, match="poetx_step"):
        optimizer.load_state_dict(plain.state_dict())
    assert optimizer.schedule.step == 0


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"), [(POETXAdamW, POETXMuon), (POETXMuon, POETXAdamW)]
)
def test_state_of_another_kind_of_optimiser_is_refused(saved_by, loaded_by) -> None:
    model, optimizer = build(saved_by)
    train_step(model, optimizer)
    other_model, other = build(loaded_by)
    with pytest.raises(IncompatibleStateError, match=f"is not that of a {loaded_by.__name__}"):
        other.load_state_dict(optimizer.state_dict())
    train_step(other_model, other)  # nothing was taken over
    assert other.schedule.step == 1


@both
def test_compiled_training_merges_without_recompiling(optimizer_class) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    torch.manual_seed(3)
    model, optimizer = build(optimizer_class, merge_interval=2, max_angle=0.25)
    torch.manual_seed(3)
    eager, eager_optimizer = build(optimizer_class, merge_interval=2, max_angle=0.25)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(5):
        loss = train_step(compiled, optimizer, i)
        assert relative_error(loss, train_step(eager, eager_optimizer, i)) < 1e-5
    assert optimizer.schedule.merges == 2
    assert counter.frame_count == 1


def test_a_compiled_step_merges_alike_and_compiles_no_more_than_without_rotations() -> None:
    """`torch.compile(optimizer.step)`: the counters change at every step, the graphs do not."""
    from torch._dynamo.testing import CompileCounterWithBackend

    graphs, results = [], []
    for how in ("plain", "eager", "compiled", "in a function"):
        torch.manual_seed(3)
        torch._dynamo.reset()
        model = nn.Linear(12, 12)
        counter = CompileCounterWithBackend("aot_eager")
        if how != "plain":
            poetx.prepare(model, poetx.POETXConfig(block_size=4, merge_interval=3))
            groups = param_groups(model, lr=1e-3)
        else:
            groups = [{"params": [model.bias]}, {"params": [model.weight]}]
        optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
        schedule = None if how == "plain" else attach(optimizer, model)
        step = optimizer.step
        if how == "in a function":
            step = torch.compile(lambda: optimizer.step(), backend=counter)  # noqa: B023
        elif how != "eager":
            step = torch.compile(optimizer.step, backend=counter)
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
        for i in range(8):
            F.mse_loss(model(x), torch.tanh(x)).backward()
            step()
            optimizer.zero_grad()
            if i == 5:
                optimizer.state_dict()
        graphs.append(counter.frame_count)
        if schedule is not None:
            results.append((model.weight.detach(), schedule.step, schedule.merges))
    plain, _, compiled, in_a_function = graphs
    assert compiled <= plain
    assert in_a_function <= plain
    for weight, steps, merges in results[1:]:
        assert relative_error(weight, results[0][0]) < tolerance(torch.float32)
        assert (steps, merges) == results[0][1:] == (8, 2)
