"""What trains densely although its model went to the compiler is told, once, by name."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.compile import dense
from poetx_compile.layers.eligibility import ZEROS
from tests.helpers.models import MLP

OPTIONS = {"stage": "eager", "block_size": 4}


class Recurrent(nn.Module):
    """Dynamo skips the frame of a loop that breaks by values, linears and all."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for _ in range(3):
            x = x.tanh()
            if x.abs().max() < 0.1:
                break
        return self.down(x)


class Mixture(nn.Module):
    """As many mixtures are written: sizes that depend on values, in a loop."""

    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(12, 12), nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        chosen, y = self.gate(x).argmax(-1), x
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            y = y.index_add(0, rows, expert(x[rows]))
        return y


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.branch = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return torch.cond(x.sum() > 0, lambda x: self.branch(x), lambda x: self.branch(-x), (x,))


class Disabled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.compiler.disable(self.outside)(self.inside(x))


class Broken(nn.Module):
    """A break that is no loss: both parts are graphs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="poetx", options=OPTIONS)


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="poetx", options=OPTIONS)
    return model


def train(run: Callable[[Tensor], Tensor], model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        run(torch.ones(5, 12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r for r in caplog.records if r.name == "poetx_compile"]
    messages = [r.getMessage() for r in found if r.levelno == logging.WARNING]
    return [message for message in messages if "from now on" not in message]  # a takeover


@pytest.mark.parametrize(
    ("make", "through", "told"),
    [
        (Recurrent, compiled, "2 of 2 nn.Linear of Recurrent train densely: up, down."),
        (Recurrent, in_place, "2 of 2 nn.Linear of Recurrent train densely: up, down."),
        (Mixture, compiled, "4 of 5 nn.Linear of Mixture train densely: up, experts.0-2."),
        (Conditional, compiled, "1 of 2 nn.Linear of Conditional train densely: branch."),
        (Disabled, compiled, "1 of 2 nn.Linear of Disabled train densely: outside."),
        (
            Disabled,
            lambda model: compiled(lambda x: model(x)),
            "1 of 2 nn.Linear of Disabled train densely: outside.",
        ),
    ],
)
def test_layers_outside_of_the_graphs_are_named_once(make, through, told, caplog):
    model = make()
    train(through(model), model)
    (text,) = warnings(caplog)
    assert text.startswith(told)
    assert "poetx_compile.prepare(model)" in text


def test_parts_that_were_compiled_answer_for_themselves(caplog: pytest.LogCaptureFixture):
    """What the user gave to nobody's compiler, or to another backend, is meant to train densely."""
    model = nn.Sequential(MLP(), nn.Linear(12, 12), MLP())
    in_place(model[0])
    model[2].compile(backend="eager")
    train(model, model)
    assert warnings(caplog) == []


@pytest.mark.parametrize("make", [MLP, Broken])
def test_a_model_that_is_adopted_as_a_whole_is_not_told_of(make, caplog):
    model = make()
    train(compiled(model), model)
    assert warnings(caplog) == []


@pytest.mark.parametrize("make", [Recurrent, Mixture, Conditional])
def test_rotations_of_a_prepared_model_train_there(make, caplog):
    """The way out."""
    model = make()
    poetx.prepare(model, poetx.POETXConfig(block_size=4))
    optimizer = poetx.POETXAdamW(model, lr=1e-3)
    run = torch.compile(model, backend="poetx", options={"stage": "eager"})
    run(torch.ones(5, 12)).square().mean().backward()
    optimizer.step()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    prepared = [m for m in linears if hasattr(m, "parametrizations")]
    assert len(prepared) >= len(linears) - 1
    moved = [m.parametrizations.weight[0].skew_in.any().item() for m in prepared]
    assert sum(moved) >= 2
    assert not any("densely" in text for text in warnings(caplog))


def test_excluded_and_frozen_layers_are_no_news(caplog: pytest.LogCaptureFixture):
    model = Disabled()
    options = OPTIONS | {"exclude_modules": ["outside"]}
    train(torch.compile(model, backend="poetx", options=options), model)
    assert warnings(caplog) == []


def test_weights_of_zeros_are_named_with_the_reason(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "poetx_compile")
    model = MLP()
    nn.init.zeros_(model.down.weight)
    train(compiled(model), model)
    assert f"down: {ZEROS}" in caplog.text
    assert warnings(caplog) == []


def test_where_our_backend_was_given_nothing_nothing_is_searched(monkeypatch: pytest.MonkeyPatch):
    def refused() -> None:
        raise AssertionError("the live objects were looked for")

    monkeypatch.setattr(dense, "LiveObjects", refused)
    held = in_place(MLP())  # by nobody else
    assert dense._compiles()
    del held
    # As in a process of its own, without what other tests left over.
    monkeypatch.setattr(gc, "get_referrers", lambda backend: [{"found_by_name": backend}])
    monkeypatch.setattr(dense, "enrolled", list)
    model = MLP()
    train(model, model)
