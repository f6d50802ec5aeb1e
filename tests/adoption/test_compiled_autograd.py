"""Compiled autograd calls nothing at the end of a backward: adopted rotations train anyhow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.adoption import adopter
from poetx_compile.layers.prepared import stored_weight
from poetx_compile.optim.schedule import schedule_of
from tests.helpers.models import MLP
from tests.helpers.rotations import skews

OPTIONS = {
    "stage": "eager",
    "block_size": 4,
    "merge_interval": 2,
    "redraw_interval": 2,
    "max_angle": None,
}

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))


@contextlib.contextmanager
def compiled_autograd() -> Iterator[None]:
    """Its graphs run as they are: compiling them takes seconds each."""
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        yield


def build(lr: float = 1e-3) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(3)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return model, optimizer, torch.compile(model, backend="poetx", options=OPTIONS)


def loss_of(run: Callable[[Tensor], Tensor]) -> Tensor:
    return F.mse_loss(run(X), TARGET)


def test_rotations_settle_train_and_merge():
    model, optimizer, run = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    with compiled_autograd():
        for i in range(5):
            loss = loss_of(run)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if i == 2:  # after a merge
                assert len(skews(model)) == 4
                assert all(p.any() for p in skews(model))
    assert losses[-1] < losses[1] < losses[0]
    assert (schedule_of(optimizer).step, schedule_of(optimizer).merges) == (5, 2)
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert set(optimizer.state) == {model[0].bias, model[2].bias, *skews(model)}


def test_from_the_second_step_on_it_is_the_run_of_eager_autograd():
    """Gradients of the first backward, which nobody clipped or unscaled, are dropped."""
    runs = []
    for context in (contextlib.nullcontext, compiled_autograd):
        model, optimizer, run = build()
        with context():
            loss_of(run).backward()
            if context is contextlib.nullcontext:
                for p in skews(model):
                    p.grad = None
            optimizer.step()
            optimizer.zero_grad()
            losses = []
            for _ in range(2):
                loss = loss_of(run)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_a_scale_of_the_first_gradients_is_not_taken_for_gradients():
    runs = []
    for scale in (1.0, 1024.0):
        model, optimizer, run = build()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with compiled_autograd():
            for _ in range(2):
                scaler.scale(loss_of(run)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        runs.append([p.detach() for p in model.parameters()])
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q)


def test_an_optimiser_built_after_the_backward_takes_the_rotations_over():
    model, _, run = build()
    with compiled_autograd():
        loss_of(run).backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        optimizer.step()
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 4]
    assert stored_weight(model[0]) not in optimizer.state


def test_a_training_step_in_one_compiled_function():
    model, optimizer, _ = build()

    def step(x: Tensor, target: Tensor) -> Tensor:
        loss = F.mse_loss(model(x), target)
        loss.backward()
        return loss.detach()

    run = torch.compile(step, backend="poetx", options=OPTIONS)
    losses = []
    with torch._dynamo.config.patch(compiled_autograd=True):
        for _ in range(3):
            losses.append(run(X, TARGET).item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert (schedule_of(optimizer).step, schedule_of(optimizer).merges) == (3, 1)


def test_a_prepared_model_trains_as_ever():
    runs = []
    for context in (contextlib.nullcontext, compiled_autograd):
        torch.manual_seed(3)
        torch._dynamo.reset()
        model = MLP()
        optimizer = poetx.POETXAdamW(model, lr=1e-3, config=poetx.POETXConfig(block_size=4))
        run = torch.compile(model, backend="poetx", options={"stage": "eager"})
        losses = []
        with context():
            for _ in range(2):
                loss = loss_of(run)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_a_loop_without_an_optimiser_of_torch_is_told_that_nothing_trains(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(adopter, "MANY_CALLS", 2)
    _, _, run = build()
    with compiled_autograd():
        for _ in range(3):
            loss_of(run).backward()
    (record,) = [r for r in caplog.records if r.name == "poetx_compile"]
    assert "wait for the step of a torch optimiser: nothing trains" in record.getMessage()


def test_a_step_inside_of_a_backward_does_not_settle_what_the_backward_still_needs():
    """A hook that steps an optimiser of biases, while rotations wait for the end."""
    model, _, run = build()
    bias = torch.optim.SGD([model[2].bias], lr=1e-2)
    seen: list[int] = []

    def step(_: Tensor) -> None:
        bias.step()
        seen.append(len(skews(model)))

    model[2].bias.register_post_accumulate_grad_hook(step)
    loss_of(run).backward()
    assert seen == [0]
    assert len(skews(model)) == 4
    assert all(p.grad is not None for p in skews(model))
