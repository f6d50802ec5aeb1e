"""Prepared linears of a kind have one class, and each can still be unloaded alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import poetx_compile as poetx
from poetx_compile.errors import EffectiveWeightError
from poetx_compile.layers.prepared import equivalence_of
from tests.helpers.graph_of import prepared
from tests.helpers.models import MLP
from tests.helpers.tolerances import assert_close


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


@pytest.mark.parametrize("bias", ["plain", "parametrized"])
def test_a_copy_of_a_compiled_layer_runs_code_of_its_own(bias):
    model = nn.Sequential(nn.Linear(12, 12))
    if bias == "parametrized":
        parametrize.register_parametrization(model[0], "bias", Scaled(), unsafe=True)
    prepared(model)
    model[0].compile(backend="eager")
    x = torch.randn(3, 12)
    model(x)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied(x).count_nonzero() == 0
    assert model(x).count_nonzero() > 0


@pytest.mark.parametrize("copied", ["before", "after"])
@pytest.mark.parametrize("first", ["bias", "weight"])
def test_copies_with_another_parametrization_are_apart(first, copied):
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    if first == "weight" and copied == "after":
        prepared(model)
    parametrize.register_parametrization(model[0], "bias", Scaled(), unsafe=True)
    if copied == "before":
        other = copy.deepcopy(model)
    if first == "bias" or copied == "before":
        prepared(model)
    if copied == "after":
        other = copy.deepcopy(model)
    x = torch.randn(3, 12)
    expected, apart = model(x), other(x)
    assert copied == "before" or torch.equal(expected, apart)
    if copied == "before":
        prepared(other)
    for unloaded, stays in ((other, model), (model, copy.deepcopy(model))):
        right = stays(x)
        poetx.merge_and_unload(unloaded)
        assert torch.equal(stays(x), right)
        assert equivalence_of(stays[0]) is not None
    assert_close(model(x), expected)
    parametrize.remove_parametrizations(other[0], "bias")
    assert type(other[0]) is nn.Linear
    assert_close(model(x), expected)


def test_a_copy_of_a_prepared_layer_takes_a_parametrization_of_its_own():
    model = prepared(nn.Sequential(nn.Linear(12, 12)))
    copied = copy.deepcopy(model)
    x = torch.randn(3, 12)
    expected = model(x)
    parametrize.register_parametrization(copied[0], "bias", Scaled(), unsafe=True)
    again = copy.deepcopy(copied)
    parametrize.remove_parametrizations(copied[0], "bias")
    assert torch.equal(model(x), expected)
    assert_close(again(x), expected + model[0].bias)
    assert_close(copied(x), expected + model[0].bias)


def test_no_parameter_takes_the_place_of_a_weight():
    model = prepared(MLP())
    expected = model.up.weight
    with pytest.raises(EffectiveWeightError, match="merge_and_unload"):
        model.up.weight = nn.Parameter(torch.zeros(22, 12))
    assert torch.equal(model.up.weight, expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantisation_says_to_unload_first():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.lstm = MLP(), nn.LSTM(12, 12)

        def forward(self, x):
            return self.mlp(self.lstm(x)[0])

    model, x = prepared(Mixed()), torch.randn(3, 2, 12)
    with pytest.raises(EffectiveWeightError, match="merge_and_unload"):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    some = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    assert equivalence_of(some.mlp.up) is not None
    assert torch.isfinite(some(x)).all()
    quantised = torch.ao.quantization.quantize_dynamic(poetx.merge_and_unload(model), {nn.Linear})
    assert type(quantised.mlp.up) is not nn.Linear
    assert torch.isfinite(quantised(x)).all()
