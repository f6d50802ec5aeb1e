"""`explain` leaves the process as it found it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile import adoption
from tests.models import MLP, SwiGLU

OPTIONS = {"stage": "aot_eager", "block_size": 8}


def test_any_number_of_calls_and_the_model_still_compiles():
    """Every call compiles anew: past Dynamo's recompile limit the model would run eagerly."""
    model = SwiGLU()
    for rows in range(1, torch._dynamo.config.recompile_limit + 3):
        explanation = poetx.explain(model, torch.randn(rows, 16), options=OPTIONS)
        assert [row.status for row in explanation.rows] == ["rewritten"] * 3
    torch.compile(model, backend=poetx.poetx_backend, options=OPTIONS)(torch.randn(3, 16))
    assert adoption.adopted_state(model.gate_proj.weight) is not None


def test_sizes_seen_do_not_become_dynamic():
    model = SwiGLU()
    for rows in (3, 4, 5):
        explanation = poetx.explain(model, torch.randn(rows, 16), options=OPTIONS)
        assert f"x: f32[{rows}, 16]" in explanation.after


def test_buffers_are_restored():
    class Averaged(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(8, 8), nn.BatchNorm1d(8))
            self.register_buffer("average", torch.zeros(8))

        def forward(self, x):
            y = super().forward(x)
            self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
            return y

    model = Averaged()
    average = model.average
    before = copy.deepcopy(model.state_dict())
    poetx.explain(model, torch.randn(5, 8), options=OPTIONS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.average is average


def test_counting_kernels_adopts_nothing():
    model = MLP()
    explanation = poetx.explain(model, torch.randn(3, 12), options=OPTIONS, kernels=True)
    assert explanation.kernels is not None
    assert explanation.kernels > 0
    assert adoption.adopted_state(model.up.weight) is None


@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_a_model_compiled_in_place(part, graphs):
    model = nn.Sequential(SwiGLU(), SwiGLU())
    poetx.prepare(model, poetx.POETXConfig(block_size=8))
    for module in [model] if part == "whole" else model:
        module.compile(backend=poetx.poetx_backend, options={"stage": "aot_eager"})
    x = torch.randn(3, 16, requires_grad=True)
    explanation = poetx.explain(model, x)
    assert [row.status for row in explanation.rows] == ["rewritten"] * 6
    assert len(explanation.graphs) == 1
    before = graphs()
    model(x)
    assert graphs() == before + 1, "compiled as before, the blocks alike"
