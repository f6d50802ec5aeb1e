"""Routers of mixtures of experts stay dense, however the mixture is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from tests.helpers.models import SwiGLU

ROUTER = "router of a mixture of experts"


class Weights(nn.Module):
    """Experts in tensors of three dimensions."""

    def __init__(self, experts: int = 6):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 16, 8))


class Gate(nn.Module):
    """A router that is a module: two linears, and a temperature."""

    def __init__(self, experts: int = 6):
        super().__init__()
        self.hidden, self.wg = nn.Linear(16, 10), nn.Linear(10, experts)


def beside_own_weights(name: str) -> nn.Module:
    model = Weights()
    model.add_module(name, nn.Linear(16, 6, bias=False))
    return model


def beside(name: str, router: nn.Module, experts: nn.Module, called: str) -> nn.Module:
    model = nn.Module()
    model.add_module(name, router)
    model.add_module(called, experts)
    return model


def mlps(count: int = 6) -> nn.ModuleList:
    return nn.ModuleList(SwiGLU() for _ in range(count))


MIXTURES = {
    "weights of its own": (beside_own_weights("gate"), {"gate"}),
    "called router": (beside_own_weights("token_router"), {"token_router"}),
    "called switch": (beside_own_weights("switch"), {"switch"}),
    "weights of a sibling": (beside("router", nn.Linear(16, 6), Weights(), "mlp"), {"router"}),
    "list": (beside("gate", nn.Linear(16, 6), mlps(), "mlps"), {"gate"}),
    "dict": (
        beside("gate", nn.Linear(16, 2), nn.ModuleDict({"a": SwiGLU(), "b": SwiGLU()}), "ffn"),
        {"gate"},
    ),
    "list of weights": (
        beside(
            "gating_network",
            nn.Linear(16, 4),
            nn.ParameterList(nn.Parameter(torch.randn(8, 16)) for _ in range(4)),
            "w1",
        ),
        {"gating_network"},
    ),
    "a module": (beside("gate", Gate(), mlps(), "mlps"), {"gate.hidden", "gate.wg"}),
    "a module beside experts": (
        beside("gate", Gate(5), nn.ModuleDict({"wrapped": mlps()}), "experts"),
        {"gate.hidden", "gate.wg"},
    ),
}


@pytest.mark.parametrize("which", MIXTURES)
def test_a_router_stays_dense_with_the_reason(which: str):
    mixture, routers = MIXTURES[which]
    model = nn.ModuleList([mixture, nn.Linear(16, 16)])
    report = poetx.prepare(model, poetx.POETXConfig(block_size=8))
    refused = {row.name: row.reason for row in report if row.is_linear and row.status != "prepared"}
    assert refused == {f"0.{name}": ROUTER for name in routers}


class Convolution(nn.Module):
    """A gated convolution: as many outputs of the gate as the convolution has."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv1d(16, 16, 3), nn.Linear(16, 16)


class Positions(nn.Module):
    """A gated attention with a bias of three dimensions, and a batch of one."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4, 9, 9))
        self.start = nn.Parameter(torch.zeros(1, 1, 16))
        self.gate, self.gate_score = nn.Linear(16, 16), nn.Linear(16, 1)


class Classifier(nn.Module):
    """As many classes as layers."""

    def __init__(self):
        super().__init__()
        self.layers, self.head, self.gate = mlps(3), nn.Linear(16, 3), nn.Linear(16, 16)


@pytest.mark.parametrize("make", [Convolution, Positions, Classifier, SwiGLU])
def test_a_gate_that_chooses_nothing_is_rotated(make):
    report = poetx.prepare(make(), poetx.POETXConfig(block_size=8))
    assert {row.status for row in report if row.is_linear} == {"prepared"}
