"""A weight of zeros: no rotation changes it, so it trains densely, or an error says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.errors import AdoptionError, NothingToTrainError
from poetx_compile.layers.eligibility import ZEROS
from poetx_compile.layers.prepared import equivalence_of
from tests.helpers.models import MLP

CONFIG = poetx.POETXConfig(block_size=4, merge_interval=3)
OPTIONS = {"stage": "eager", "block_size": 4, "merge_interval": 3}

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))


def zero_initialised() -> MLP:
    """Its output layer starts at zero, as that of many residual branches does."""
    model = MLP()
    nn.init.zeros_(model.down.weight)
    return model


class LoRA(nn.Module):
    """A frozen linear with a low-rank update from plain linears; B starts at zero."""

    def __init__(self, width: int = 12, rank: int = 4):
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.A, self.B = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(x))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="poetx", options=OPTIONS)


def train(
    run: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, steps: int = 8
) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(run(X), TARGET)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_prepare_leaves_it_dense_with_the_reason():
    model = zero_initialised()
    report = poetx.prepare(model, CONFIG)
    assert {row.name: (row.status, row.reason) for row in report}["down"] == ("skipped", ZEROS)
    assert equivalence_of(model.up) is not None
    train(model, poetx.POETXAdamW(model, lr=1e-2), 2)
    assert model.down.weight.any()


def test_a_model_of_zeros_alone_has_nothing_to_train():
    layer = nn.Linear(8, 8)
    nn.init.zeros_(layer.weight)
    with pytest.raises(NothingToTrainError, match="the weight is all zeros"):
        poetx.prepare(layer)


def test_one_entry_is_enough_to_be_rotated():
    layer = nn.Linear(8, 8)
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.weight[5, 2] = 1
    (row,) = poetx.prepare(layer)
    assert row.status == "prepared"


def test_lora_trained_through_the_backend_falls_as_in_eager_mode():
    """Its B trains densely for good, also in graphs that are compiled when it is zero no more."""
    falls = []
    for through in (lambda model: model, compiled):
        torch.manual_seed(3)
        model = LoRA()
        losses = train(through(model), torch.optim.AdamW(model.parameters(), lr=1e-2), 20)
        falls.append(losses[0] - losses[-1])
    assert falls[0] > 0.1
    assert falls[1] > 0.5 * falls[0]
    assert equivalence_of(model.A) is not None
    assert equivalence_of(model.B) is None
    again = compiled(model)
    F.mse_loss(again(X[:3]), TARGET[:3]).backward()
    assert equivalence_of(model.B) is None


def test_where_nothing_else_is_adopted_it_stays_dense_too():
    model = nn.Sequential(nn.Linear(12, 12))
    nn.init.zeros_(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(compiled(model), optimizer, 2)
    torch._dynamo.reset()
    losses = train(compiled(model), optimizer, 3)
    assert equivalence_of(model[0]) is None
    assert losses[-1] < losses[0]


def test_code_of_a_weight_of_zeros_is_not_reused_for_another():
    blocks = [nn.Sequential(nn.Linear(12, 12)) for _ in range(2)]
    nn.init.zeros_(blocks[0][0].weight)
    run = torch.compile(lambda block, x: block(x), backend="poetx", options=OPTIONS)
    run(blocks[0], X)
    with pytest.raises(AdoptionError, match="left alone, was reused for a layer that is not"):
        run(blocks[1], X)


def test_explain_says_it_and_leaves_no_trace():
    model = zero_initialised()
    explanation = poetx.explain(model, X, options=OPTIONS)
    assert [row.reason for row in explanation.rows] == ["", ZEROS]
    nn.init.ones_(model.down.weight)
    explanation = poetx.explain(model, X, options=OPTIONS)
    assert [row.status for row in explanation.rows] == ["rewritten", "rewritten"]


# --- values that come after `prepare` -----------------------------------------------------------


def from_meta() -> MLP:
    with torch.device("meta"):
        model = MLP()
    poetx.prepare(model, CONFIG)
    model.to_empty(device="cpu")
    model.up.reset_parameters()
    nn.init.zeros_(model.down.weight)
    nn.init.zeros_(model.down.bias)
    return model


def written() -> MLP:
    model = MLP()
    poetx.prepare(model, CONFIG)
    nn.init.zeros_(model.down.weight)
    return model


def loaded() -> MLP:
    model = MLP()
    poetx.prepare(model, CONFIG)
    model.load_state_dict(zero_initialised().state_dict())
    return model


LATE = pytest.mark.parametrize("make", [from_meta, written, loaded])


@LATE
@pytest.mark.parametrize(
    "build", [poetx.POETXAdamW, lambda m: torch.optim.SGD(m.parameters(), 0.1)]
)
def test_values_that_come_later_are_refused_at_the_first_step(make, build):
    model = make()
    optimizer = build(model)
    with pytest.raises(NothingToTrainError, match="the weight of down is all zeros"):
        train(model, optimizer, 1)
    with pytest.raises(NothingToTrainError, match="the weight of down is all zeros"):
        optimizer.step()


@LATE
def test_the_way_out_that_the_error_names(make):
    """Unloaded alone, the layer trains densely beside rotations, and a checkpoint has both."""
    model = make()
    poetx.merge_and_unload(model.down)
    optimizer = poetx.POETXAdamW(model, lr=1e-2)
    losses = train(compiled(model), optimizer)
    assert losses[-1] < losses[0]
    assert equivalence_of(model.down) is None
    assert equivalence_of(model.up) is not None
    assert set(dict(model.named_parameters())) >= {
        "down.weight",
        "up.parametrizations.weight.0.skew_in",
    }


def test_zeros_written_while_training_goes_on_are_noticed():
    model = MLP()
    poetx.prepare(model, CONFIG)
    optimizer = poetx.POETXAdamW(model, lr=1e-3)
    train(model, optimizer, 4)  # a merge among them
    with torch.no_grad():
        model.up.weight.zero_()
    with pytest.raises(NothingToTrainError, match="the weight of up is all zeros"):
        train(model, optimizer, 1)


def test_a_step_at_a_rate_of_zero_may_come_before_the_values():
    """As torch.distributed.checkpoint takes it, to have the optimiser's state made."""
    model = written()
    optimizer = poetx.POETXAdamW(model, lr=0.0)
    train(model, optimizer, 1)
    nn.init.ones_(model.down.weight)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    train(model, optimizer, 1)


def test_weights_are_looked_at_when_they_were_written_and_not_at_every_step(
    monkeypatch: pytest.MonkeyPatch,
):
    from poetx_compile.optim import watch

    looked: list[int] = []
    check = watch._check_weights

    def count(layers: Any) -> None:
        looked.extend([len(layers)] * bool(layers))
        check(layers)

    monkeypatch.setattr(watch, "_check_weights", count)
    model = MLP()
    poetx.prepare(model, CONFIG)
    optimizer = poetx.POETXAdamW(model, lr=1e-3)
    train(model, optimizer)
    assert looked == [], "prepare has seen them"
    model.load_state_dict(MLP().state_dict())
    train(model, optimizer)
    assert looked == [2]


# --- less than zeros: rank ----------------------------------------------------------------------


def test_rows_and_columns_of_zeros_are_reported_with_the_rank_they_leave():
    layer = nn.Linear(12, 9)
    with torch.no_grad():
        layer.weight[[1, 4]] = 0
        layer.weight[:, 3:9] = 0
    (row,) = poetx.prepare(layer, CONFIG)
    assert row.reason.endswith(
        "2 of 9 rows and 6 of 12 columns are zeros: the rank stays at most 6"
    )


def test_rotations_keep_the_rank_that_dense_training_raises():
    """Through redraws: what the report says of a rank, and why."""
    ranks = []
    for rotated in (False, True):
        torch.manual_seed(3)
        layer = nn.Linear(12, 12).double()
        with torch.no_grad():
            layer.weight[:9] = 0
        if rotated:
            poetx.prepare(layer, dataclasses.replace(CONFIG, redraw_interval=3))
            optimizer = poetx.POETXAdamW(layer, lr=1e-3)
        else:
            optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        for _ in range(12):
            F.mse_loss(layer(X.double()), TARGET.double()).backward()
            optimizer.step()
            optimizer.zero_grad()
        ranks.append(int(torch.linalg.matrix_rank(layer.weight.detach())))
        assert layer.weight.any(1).all(), "no row is zero any more"
    assert ranks == [12, 3]
