"""The gate: no time is taken of what computes something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from benchmarks import (
    gate,
)


@pytest.fixture
def layer() -> nn.Linear:
    """24 → 16, blocks of 8, rotations that are not the identity, a bias."""
    module = nn.Linear(24, 16)
    poetx.prepare(module, poetx.POETXConfig(block_size=8))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "skew" in name:
            gate.random_skew_(parameter.data, 8, generator)
    return module


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return torch.randn(10, 24, requires_grad=True), torch.randn(10, 16)


def test_the_gate_passes_the_layer_itself(layer: nn.Linear, data: tuple[Tensor, Tensor]) -> None:
    errors = gate.check_layer(layer, layer, *data)
    assert set(errors) == {"output_error", "gradient_error"}
    assert 0 < errors["output_error"] < 1e-5
    assert all(p.grad is None for p in (data[0], *layer.parameters()))


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 1.001 * grads[0]


def test_the_gate_fails_a_wrong_output(layer: nn.Linear, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(gate.GateError, match="output: relative error"):
        gate.check_layer(lambda x: 1.001 * layer(x), layer, *data)


def test_the_gate_fails_a_wrong_input_gradient(
    layer: nn.Linear, data: tuple[Tensor, Tensor]
) -> None:
    with pytest.raises(gate.GateError, match="gradient of x: relative error"):
        gate.check_layer(lambda x: layer(_ScaledGradient.apply(x)), layer, *data)


def test_the_gate_fails_a_wrong_rotation_gradient(
    layer: nn.Linear, data: tuple[Tensor, Tensor]
) -> None:
    def wrong(x: Tensor) -> Tensor:
        weight = layer.weight
        weight.register_hook(lambda grad: 1.001 * grad)
        return nn.functional.linear(x, weight, layer.bias)

    with pytest.raises(gate.GateError, match=r"gradient of parametrizations.*skew"):
        gate.check_layer(wrong, layer, *data)


def test_the_gate_fails_rotations_that_get_no_gradient(
    layer: nn.Linear, data: tuple[Tensor, Tensor]
) -> None:
    def frozen(x: Tensor) -> Tensor:
        return nn.functional.linear(x, layer.weight.detach(), layer.bias)

    with pytest.raises(gate.GateError, match="skew_in is missing"):
        gate.check_layer(frozen, layer, *data)


def test_the_gate_fails_what_is_not_finite_or_has_another_shape() -> None:
    x = torch.ones(3)
    with pytest.raises(gate.GateError, match="relative error nan"):
        gate.check(x * torch.nan, x, torch.float32, "it")
    with pytest.raises(gate.GateError, match=r"shape \[1, 3\], not \[3\]"):
        gate.check(x[None], x, torch.float32, "it")


def test_random_rotations_stay_below_the_angle_guard() -> None:
    b, skew = 64, torch.zeros(4, 64 * 63 // 2)
    gate.random_skew_(skew, b, torch.Generator().manual_seed(0))
    upper = torch.zeros(4, b, b)
    upper[:, *torch.triu_indices(b, b, 1)] = skew
    angle = torch.linalg.matrix_norm(upper - upper.mT, 2).max()
    assert 0.1 < angle < 0.2
