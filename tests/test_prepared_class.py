"""Prepared linears of a kind have one class, and each can still be unloaded alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import poetx_compile as poetx
from poetx_compile.parametrization import equivalence_of
from tests.models import MLP
from tests.passes.graph_of import prepared
from tests.tolerances import assert_close


class Scaled(nn.Module):
    def forward(self, bias):
        return 2 * bias


def test_one_class_for_all_of_a_kind():
    first, second = prepared(MLP()), prepared(MLP(width=7))
    assert type(first.up) is type(first.down) is type(second.up)
    assert isinstance(first.up, nn.Linear)
    assert parametrize.type_before_parametrizations(first.up) is nn.Linear


def test_unloading_one_model_leaves_the_others():
    model = prepared(MLP())
    x = torch.randn(3, 12)
    expected, copied = model(x), copy.deepcopy(model)
    poetx.merge_and_unload(copied)
    assert type(copied.up) is nn.Linear
    assert torch.equal(model(x), expected)
    poetx.merge_and_unload(model)
    assert type(model.up) is nn.Linear
    assert_close(model(x), expected)
    poetx.prepare(model, poetx.POETXConfig(block_size=8))
    assert equivalence_of(model.up) is not None


def test_a_weight_can_be_assigned():
    model = prepared(MLP())
    weight = torch.randn(22, 12)
    model.up.weight = weight
    assert torch.equal(model.up.weight, weight)


def test_cached_weights_are_those_of_their_own_layer():
    model = prepared(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)))
    expected = [layer.weight for layer in model]
    with parametrize.cached():
        for layer, weight in zip(model, expected, strict=True):
            assert torch.equal(layer.weight, weight)
            assert layer.weight is layer.weight
    assert model[0].weight is not model[0].weight


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_further_parametrization_of_the_weight_is_applied(backend):
    model = prepared(MLP())
    x = torch.randn(3, 12)
    up = nn.functional.linear(x, 2 * model.up.weight.detach(), model.up.bias)
    parametrize.register_parametrization(model.up, "weight", Scaled())
    call = torch.compile(model.up, backend=backend, fullgraph=True) if backend else model.up
    assert_close(call(x), up)


@pytest.mark.parametrize("first", ["bias", "weight"])
def test_a_bias_may_be_parametrized_as_well(first):
    model, plain = (nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    parametrize.register_parametrization(plain[0], "bias", Scaled(), unsafe=True)
    if first == "weight":
        prepared(model)
    parametrize.register_parametrization(model[0], "bias", Scaled(), unsafe=True)
    if first == "bias":
        prepared(model)
    x = torch.randn(3, 12)
    expected = model(x)
    assert model[1].bias.grad_fn is None, "the other bias is a parameter as before"
    poetx.merge_and_unload(model)
    assert parametrize.is_parametrized(model[0], "bias")
    assert_close(model(x), expected)
    assert torch.equal(model[0].bias, plain[0].bias)
    assert type(model[1]) is nn.Linear


def test_taking_one_off_by_hand_leaves_the_others():
    model = prepared(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)))
    x = torch.randn(3, 12)
    expected = model(x)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    assert equivalence_of(model[1]) is not None
    assert_close(model(x), expected)
