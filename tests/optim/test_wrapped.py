"""Optimisers behind wrappers: what is attached, adopted and clipped is the optimiser itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import poetx_compile as poetx
from poetx_compile.errors import ConfigError, ParallelismError
from poetx_compile.layers.prepared import equivalence_of
from poetx_compile.optim.schedule import schedule_of
from tests.helpers.models import MLP

CONFIG = poetx.POETXConfig(block_size=4, merge_interval=2)


class Plain:
    """A wrapper that is no optimiser, and hands on what it is asked for (Lightning has such)."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name: str):
        return getattr(self.optimizer, name)


def accelerated(optimizer: torch.optim.Optimizer):
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)
    return AcceleratedOptimizer(optimizer)


WRAPPERS = pytest.mark.parametrize("wrap", [Plain, accelerated, lambda o: Plain(accelerated(o))])


def step(model: nn.Module, wrapper, limit: float | None = None) -> None:
    model(torch.ones(3, 12)).square().sum().backward()
    if limit is not None:
        poetx.clip_grad_norm_(wrapper, limit)
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        assert torch.stack(norms).norm() < 1.01 * limit
    wrapper.step()
    wrapper.zero_grad()


@WRAPPERS
def test_a_wrapped_optimiser_is_attached(wrap):
    model = MLP()
    poetx.prepare(model, CONFIG)
    optimizer = torch.optim.AdamW(poetx.param_groups(model, lr=1e-4))
    wrapper = wrap(optimizer)
    schedule = poetx.attach(wrapper, model)
    for _ in range(3):
        step(model, wrapper, limit=0.1)
    assert (schedule.step, schedule.merges) == (3, 1)
    assert schedule_of(wrapper) is schedule_of(optimizer) is schedule
    with pytest.raises(ConfigError, match="attached already"):
        poetx.attach(optimizer, model)


@WRAPPERS
def test_a_wrapped_optimiser_is_adopted(wrap):
    model = MLP()
    wrapper = wrap(torch.optim.AdamW(model.parameters(), lr=1e-4))
    schedule = poetx.adopt(wrapper, model, CONFIG)
    for _ in range(3):
        step(model, wrapper, limit=0.1)
    assert (schedule.step, schedule.merges) == (3, 1)
    assert equivalence_of(model.up).skew_in.abs().max() > 0


@WRAPPERS
@pytest.mark.parametrize("optimizer_class", [poetx.POETXAdamW, poetx.POETXMuon])
def test_a_wrapped_optimiser_of_ours_clips(wrap, optimizer_class):
    model = MLP()
    wrapper = wrap(optimizer_class(model, lr=1e-4, config=CONFIG))
    step(model, wrapper, limit=0.1)


@pytest.mark.parametrize("call", ["attach", "adopt", "clip_grad_norm_"])
def test_what_is_no_optimiser_is_refused_before_anything_is_changed(call):
    class InNameAlone(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.inner = optimizer

    model = MLP()
    if call != "adopt":
        poetx.prepare(model, CONFIG)
    inner = torch.optim.SGD(model.parameters(), lr=1e-4)
    argument = 1.0 if call == "clip_grad_norm_" else model
    for wrong in (InNameAlone(inner), model, [inner], None):
        with pytest.raises(ConfigError, match="is no optimiser of torch"):
            getattr(poetx, call)(wrong, argument)
    assert (equivalence_of(model.up) is None) == (call == "adopt")


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["attach", "adopt"])
def test_the_state_of_a_sharded_optimiser_is_reset(process_group, how):
    config = poetx.POETXConfig(block_size=4, merge_interval=2, redraw_interval=2, moments="reset")
    model = MLP()
    groups = model.parameters()
    if how == "attach":
        poetx.prepare(model, config)
        groups = poetx.param_groups(model, lr=1e-4)
    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, lr=1e-4)
    poetx.attach(optimizer, model) if how == "attach" else poetx.adopt(optimizer, model, config)
    for _ in range(2):
        step(model, optimizer)
    skew = equivalence_of(model.up).skew_in
    state = optimizer.optim.state[skew]
    assert (state["step"], state["exp_avg"].abs().max()) == (0, 0)
    step(model, optimizer)
    assert skew.abs().max() > 0


def test_a_sharded_optimiser_turns_weights(process_group) -> None:
    """With ``merge_interval=1`` the steps that processes send each other turn the weights."""
    weights = []
    kind = torch.optim.AdamW
    for sharded in (False, True):
        torch.manual_seed(0)
        model = MLP()
        poetx.prepare(model, poetx.POETXConfig(block_size=4, merge_interval=1))
        groups = poetx.param_groups(model, lr=1e-3)
        if sharded:
            optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=kind, lr=1e-3)
        else:
            optimizer = kind(groups, lr=1e-3)
        poetx.attach(optimizer, model)
        weights.append(model.up.weight.detach().clone())
        step(model, optimizer)
        weights.append(model.up.weight.detach().clone())
    before, alone, also_before, together = weights
    assert torch.equal(before, also_before)
    assert not torch.equal(before, alone)
    assert torch.equal(alone, together)
    views = ZeroRedundancyOptimizer(
        poetx.param_groups(model, lr=1e-3),
        optimizer_class=kind,
        lr=1e-3,
        parameters_as_bucket_view=True,
    )
    with pytest.raises(ParallelismError, match="leave that argument out"):
        poetx.attach(views, model)
