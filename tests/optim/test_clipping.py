"""Clipping with the ramp after a merge that reset the moments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.errors import ConfigError


def run(moments: str, steps: int = 9, **clip) -> list[float]:
    """The norms after clipping of steps whose gradients have a norm far above every limit."""
    model = nn.Linear(8, 8)
    fields = {"merge_interval": 1, "redraw_interval": 3, "max_angle": None, "moments": moments}
    config = poetx.POETXConfig(block_size=4, **fields)
    optimizer = poetx.POETXAdamW(model, lr=1e-3, config=config)
    after = []
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.full_like(p, 10.0) if p.requires_grad else None
        before = poetx.clip_grad_norm_(optimizer, 1.0, **clip)
        assert before == pytest.approx(10 * (8 + 2 * 2 * 6) ** 0.5)
        squares = [(p.grad**2).sum() for p in model.parameters() if p.grad is not None]
        after.append(torch.stack(squares).sum().sqrt().item())
        optimizer.step()
    return after


def test_the_limit_rises_from_a_tenth_after_each_redraw_that_reset_the_moments():
    assert run("reset") == pytest.approx([1, 1, 1, 0.1, 0.19, 0.28, 0.1, 0.19, 0.28], rel=1e-4)
    assert run("reset", start=0.5, ramp=2) == pytest.approx(
        [1, 1, 1, 0.5, 0.75, 1, 0.5, 0.75, 1], rel=1e-4
    )
    assert run("reset", ramp=0) == pytest.approx([1] * 9, rel=1e-4)
    assert run("reset", start=3.0) == pytest.approx([1] * 9, rel=1e-4)


def test_moments_that_are_kept_need_no_ramp():
    assert run("keep") == pytest.approx([1] * 9, rel=1e-4)


def test_refusals():
    model = nn.Linear(8, 8)
    with pytest.raises(ConfigError, match=r"AdamW merges nothing.*attach"):
        poetx.clip_grad_norm_(torch.optim.AdamW(model.parameters()), 1.0)
    optimizer = poetx.POETXAdamW(model, config=poetx.POETXConfig(block_size=4))
    for arguments, name in (((0.0,), "max_norm = 0.0"), ((1.0,), "start = -1")):
        with pytest.raises(ConfigError, match=name):
            poetx.clip_grad_norm_(optimizer, *arguments, start=-1 if name[0] == "s" else 0.1)
    with pytest.raises(ConfigError, match="ramp = -1"):
        poetx.clip_grad_norm_(optimizer, 1.0, ramp=-1)
