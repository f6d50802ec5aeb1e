"""`POETXAdamW` is `torch.optim.AdamW` over its groups, with merges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.optim import POETXAdamW, POETXMuon, param_groups
from tests.helpers.models import TinyLM
from tests.helpers.tolerances import assert_close
from tests.helpers.training import build, train_step


@pytest.mark.parametrize("kwargs", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}])
def test_steps_between_merges_are_those_of_torch(kwargs: dict) -> None:
    models = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = TinyLM()
        poetx.prepare(model, poetx.POETXConfig(block_size=8, max_angle=None))
        settings = {"lr": 2e-3, "betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-6, **kwargs}
        if ours:
            optimizer: torch.optim.Optimizer = POETXAdamW(model, **settings)
        else:
            groups = param_groups(model, lr=2e-3, weight_decay=0.1)
            optimizer = torch.optim.AdamW(groups, **settings)
        for i in range(5):
            train_step(model, optimizer, i)
        models.append(model.state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


def test_second_moments_of_a_bf16_model_decay() -> None:
    """At β2 = 0.999 a step takes off less than bf16 can show: in bf16 they would stay for ever."""
    model = nn.Linear(16, 16, bias=False).bfloat16()
    config = poetx.POETXConfig(block_size=8, max_angle=None)
    optimizer = POETXAdamW(model, lr=1e-9, betas=(0.9, 0.999), config=config)
    rotations = [p for p in model.parameters() if p.requires_grad]
    for parameter in rotations:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    first = [optimizer.state[p]["exp_avg_sq"].clone() for p in rotations]
    for parameter in rotations:
        parameter.grad.zero_()
    for _ in range(100):
        optimizer.step()
    for parameter, moment in zip(rotations, first, strict=True):
        assert_close(optimizer.state[parameter]["exp_avg_sq"], 0.999**100 * moment)


@pytest.mark.parametrize("optimizer_class", [POETXAdamW, POETXMuon])
def test_dense_parameters_follow_torch_adamw(optimizer_class) -> None:
    """With the rotations standing still the rest is a plain AdamW run, bit for bit."""
    trained = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = TinyLM()
        poetx.prepare(model, poetx.POETXConfig(block_size=8))
        if ours:
            optimizer: torch.optim.Optimizer = optimizer_class(model, lr=1e-2, poetx_lr=0.0)
        else:
            groups = [g for g in param_groups(model, lr=1e-2) if g["name"].startswith("dense")]
            optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        for i in range(5):
            train_step(model, optimizer, i)
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_defaults() -> None:
    _, optimizer = build(POETXAdamW)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["fused"] is None
    assert {g["name"]: g["lr"] for g in optimizer.param_groups}["poetx b=8"] == 8e-3


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer_class", [POETXAdamW, POETXMuon])
def test_on_a_gpu_the_fused_kernel_is_the_default(optimizer_class) -> None:
    torch.manual_seed(0)
    model, optimizer = build(
        optimizer_class, TinyLM().cuda(), merge_interval=4, max_angle=0.25, moments="reset"
    )
    assert optimizer.param_groups[0]["fused"]
    tokens = torch.arange(24, device="cuda").reshape(2, 12)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert optimizer.schedule.merges >= 2
