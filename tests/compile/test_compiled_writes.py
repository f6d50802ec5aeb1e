"""A write into `linear.weight` in compiled code arrives, or is refused: it never vanishes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.errors import EffectiveWeightError
from poetx_compile.layers.prepared import equivalence_of
from tests.helpers.tolerances import assert_close

OPTIONS = {"stage": "eager", "block_size": 4}
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def no_grad(write: Callable[[Tensor], Any]) -> Callable[[nn.Linear], None]:
    def call(linear: nn.Linear) -> None:
        with torch.no_grad():
            write(linear.weight)

    return call


def max_norm(linear: nn.Linear) -> None:
    norm = linear.weight.norm(dim=1, keepdim=True)
    linear.weight.data.copy_(linear.weight * norm.clamp(max=0.5) / norm)


def set_row(weight: Tensor) -> None:
    weight[0] = 1


def out(linear: nn.Linear) -> None:
    with torch.no_grad():
        weight = linear.weight
        torch.mul(weight, 0.5, out=weight)


WRITES = {
    "method": no_grad(lambda weight: weight.mul_(0.5)),
    "function": no_grad(lambda weight: torch.clamp_(weight, -0.1, 0.1)),
    "data": lambda linear: linear.weight.data.mul_(0.5),
    "max-norm": max_norm,
    "row": no_grad(set_row),
    "view": no_grad(lambda weight: weight.t().chunk(2)[1].zero_()),
    "initialisation": lambda linear: nn.init.zeros_(linear.weight),
    "out": out,
    "foreach": no_grad(lambda weight: torch._foreach_mul_([weight], 0.5)),
    "renormalised": lambda linear: F.embedding(torch.arange(3), linear.weight, max_norm=0.1),
    "in place": no_grad(lambda weight: F.relu(weight, inplace=True)),
    "aten": no_grad(lambda weight: torch.ops.aten.mul_.Tensor(weight, torch.ones(()) / 2)),
}


class Written(nn.Module):
    def __init__(self, write: Callable[[nn.Linear], None]):
        super().__init__()
        self.inner, self.write = nn.Linear(12, 12), write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.inner)
        return self.inner(x)


def prepared(write: Callable[[nn.Linear], None]) -> Written:
    torch.manual_seed(3)
    model = Written(write)
    poetx.prepare(model, poetx.POETXConfig(block_size=4))
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="poetx", options=OPTIONS)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(BackendCompilerFailed) as error:
        call()
    assert isinstance(error.value.inner_exception, EffectiveWeightError)
    return str(error.value.inner_exception)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_refused_with_the_way_out(write: str):
    model = prepared(WRITES[write])
    text = refusal(lambda: compiled(model)(X))
    assert "writes into the weight of inner in place" in text
    assert "exclude_modules" in text


@pytest.mark.parametrize("write", WRITES)
def test_outside_of_compiled_code_it_arrives(write: str):
    """The first way out that the error names."""
    model, plain = prepared(torch.compiler.disable(WRITES[write])), Written(WRITES[write])
    plain.inner.load_state_dict(poetx.plain_state_dict(model.inner))
    y = compiled(model)(X)
    assert_close(y, plain(X))
    assert_close(model.inner.weight, plain.inner.weight)


def test_assigned_it_arrives():
    """The second: the graph is cut, and the rotations go back to the identity."""

    def assign(linear: nn.Linear) -> None:
        linear.weight = linear.weight.detach() * 0.5

    model = prepared(assign)
    before = model.inner.weight.detach().clone()
    run = compiled(model)
    for power in (1, 2):
        y = run(X)
        assert_close(model.inner.weight, before * 0.5**power)
        assert_close(y, F.linear(X, before * 0.5**power, model.inner.bias))


@pytest.mark.parametrize("alone", [True, False])
def test_the_property_is_written_by_code_that_dynamo_traces(alone: bool):
    """That of torch 2.11 calls what C has of a property behind the graph, which reads it before."""
    linear = nn.Linear(12, 12)
    if not alone:
        parametrize.register_parametrization(linear, "bias", nn.Identity())
    poetx.prepare(linear, poetx.POETXConfig(block_size=4))
    for name in linear.parametrizations:
        descriptor = inspect.getattr_static(type(linear), name)
        assert inspect.isfunction(inspect.getattr_static(type(descriptor), "__set__"))


def test_excluded_it_trains_densely():
    """The third, for a model that nobody prepared too: what writes its weight is left dense."""
    model = Written(WRITES["data"])
    before = model.inner.weight.detach().clone()
    compiled(model)(X).sum().backward()
    assert equivalence_of(model.inner) is None
    assert_close(model.inner.weight, before * 0.5)


def test_a_function_of_its_own_is_refused_once_the_rotations_are_in_the_model():
    model = nn.Sequential(nn.Linear(12, 12))
    run, write = compiled(model), compiled(lambda linear: WRITES["data"](linear))
    before = model[0].weight.detach().clone()
    write(model[0])
    assert_close(model[0].weight, before * 0.5)
    run(X).sum().backward()
    assert equivalence_of(model[0]) is not None
    refusal(lambda: write(model[0]))


def test_a_write_inside_of_a_checkpoint_is_refused():
    model = prepared(WRITES["method"])
    run = compiled(lambda x: checkpoint(model, x, use_reentrant=False))
    refusal(lambda: run(X))


@pytest.mark.parametrize(
    "read",
    [
        no_grad(lambda weight: weight.clone().mul_(0.5)),
        no_grad(lambda weight: (weight * 2).zero_()),
        lambda linear: torch.zeros(12, 12).add_(linear.weight),
        lambda linear: torch.ops.aten.add_.Tensor(torch.zeros(12, 12), linear.weight),
        lambda linear: linear.bias.data.mul_(0.5),
    ],
)
def test_what_writes_elsewhere_is_not_refused(read: Callable[[nn.Linear], None]):
    model = prepared(read)
    expected = model(X)
    model.inner.bias.data.mul_(2.0)
    bias = model.inner.bias.detach().clone()
    y = compiled(model)(X)
    assert y.shape == expected.shape
    assert model.inner.bias.shape == bias.shape
    assert y.requires_grad


def test_a_branch_that_reads_a_weight_is_not_refused():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(12, 12)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.inner(x), lambda x: x * 1.0, (x,))

    model = Branch()
    poetx.prepare(model, poetx.POETXConfig(block_size=4))
    assert_close(compiled(model)(X.abs()), model.inner(X.abs()))
