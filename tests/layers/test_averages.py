"""Averages of weights over merges: those of effective weights are right, all others are noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import poetx_compile as poetx
from poetx_compile.errors import IncompatibleStateError
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from poetx_compile.optim.merge import merge
from tests.helpers.models import MLP
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def prepared() -> MLP:
    torch.manual_seed(0)
    model = MLP()
    poetx.prepare(model, poetx.POETXConfig(block_size=4))
    turn(model)
    return model


def through_data(target: nn.Module, source: nn.Module, rate: float) -> None:
    """As Stable-Baselines3 does: no version counts it."""
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.data.copy_((1 - rate) * t.data + rate * s.data)


@torch.no_grad()
def in_place(target: nn.Module, source: nn.Module, rate: float) -> None:
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.lerp_(s, rate)


UPDATES = pytest.mark.parametrize("update", [through_data, in_place])
USES: dict[str, Callable[[nn.Module], object]] = {
    "a forward without gradients": lambda m: torch.no_grad()(m)(X),
    "a forward of a frozen copy": lambda m: m.requires_grad_(False)(X),
    "a merge": merge,
    "state_dict": lambda m: m.state_dict(),
    "plain_state_dict": poetx.plain_state_dict,
    "merge_and_unload": poetx.merge_and_unload,
}


@pytest.mark.parametrize("use", USES)
@UPDATES
def test_a_target_that_is_averaged_over_a_merge_is_noticed(update, use: str) -> None:
    model = prepared()
    target = copy.deepcopy(model)
    update(target, model, 0.005)  # within an interval an average of rotations is one
    merge(model, redraw=True)
    turn(model)
    for _ in range(3):
        update(target, model, 0.005)
    with pytest.raises(IncompatibleStateError, match=r"average effective weights, .*plain model"):
        USES[use](target)
    assert torch.isfinite(model(X)).all()


@UPDATES
def test_a_compiled_target_looks_after_each_step(update) -> None:
    model = prepared()
    target = copy.deepcopy(model)
    optimizer = torch.optim.SGD(poetx.param_groups(model, lr=1e-3), lr=1e-3)
    poetx.attach(optimizer, model)
    compiled = [
        torch.compile(m, backend="poetx", options={"stage": "eager"}) for m in (model, target)
    ]
    with torch.no_grad():
        for forward in compiled:
            forward(X)
    merge(model, redraw=True)
    turn(model)
    for _ in range(3):
        update(target, model, 0.005)
    optimizer.step()
    with torch.no_grad():
        compiled[0](X)
        with pytest.raises(IncompatibleStateError, match="average effective weights"):
            compiled[1](X)
    compiled[0](X).sum().backward()


@UPDATES
def test_an_average_that_is_copied_back_over_a_merge_is_noticed(update) -> None:
    """As libraries of moving averages do for an evaluation; and it can be taken back."""
    model = prepared()
    shadow = copy.deepcopy(model)
    merge(model, redraw=True)
    turn(model)
    own = [p.detach().clone() for p in model.parameters()]
    update(model, shadow, 1.0)
    for use in (lambda: torch.no_grad()(model)(X), model.state_dict):
        with pytest.raises(IncompatibleStateError, match="average effective weights"):
            use()
    for p, value in zip(model.parameters(), own, strict=True):
        p.data.copy_(value)
    model.state_dict()
    merge(model, redraw=True)


def test_averages_within_an_interval_are_used_and_kept() -> None:
    model = prepared()
    target = copy.deepcopy(model)
    for _ in range(200):
        through_data(target, model, 0.05)
    with torch.no_grad():
        assert_close(target(X), model(X))
    poetx.plain_state_dict(target)
    merge(target, redraw=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.load_state_dict(prepared().state_dict()),
        lambda m: m.load_state_dict(MLP().state_dict()),
        lambda m: nn.init.orthogonal_(m.up.weight),
        lambda m: setattr(m.up, "weight", torch.randn(22, 12)),
        lambda m: m.up.weight.data.mul_(3.0),
        lambda m: m.up.reset_parameters(),
        lambda m: m.bfloat16().float(),
        lambda m: m.double(),
        lambda m: merge(m, redraw=True),
    ],
)
def test_documented_writes_are_no_foreign_ones(write: Callable[[nn.Module], object]) -> None:
    model = prepared()
    with torch.no_grad():
        model(X)
    write(model)
    turn(model)
    with torch.no_grad():
        model(X.to(next(model.parameters()).dtype))
    copy.deepcopy(model).state_dict()
    merge(model, redraw=True)


def test_weights_that_come_from_another_process_before_the_first_step_are_taken() -> None:
    """DistributedDataParallel gives every process the weights of the first, rotations at zero."""
    torch.manual_seed(1)
    model = MLP()
    config = poetx.POETXConfig(block_size=4, merge_interval=2, max_angle=None)
    optimizer = poetx.POETXAdamW(model, config=config)
    for _, module, _ in prepared_linears(model):
        stored_weight(module).data.copy_(torch.randn_like(stored_weight(module)))
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
    assert optimizer.schedule.merges == 1


# --- the recipe -----------------------------------------------------------------------------------


class Tied(nn.Module):
    """A tied embedding, a prepared layer, and buffers of integers and floats."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 12)
        self.mlp = MLP()
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.mlp(self.embedding(tokens))))


def test_the_recipe_for_averages_is_right_for_tied_weights_and_integer_buffers() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(9)
    config = poetx.POETXConfig(block_size=4, merge_interval=2, max_angle=None)
    optimizer = poetx.POETXAdamW(model, lr=1e-2, config=config)

    plain = poetx.merge_and_unload(copy.deepcopy(model))
    averaged = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.6))
    expected: dict[str, Tensor] = {}
    for _ in range(5):
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.load_state_dict(poetx.plain_state_dict(model))
        averaged.update_parameters(plain)
        for name, parameter in poetx.merge_and_unload(copy.deepcopy(model)).named_parameters():
            now = parameter.detach().double()
            expected[name] = 0.6 * expected[name] + 0.4 * now if name in expected else now
    assert optimizer.schedule.merges == 2
    assert averaged.module.head.weight is averaged.module.embedding.weight
    for name, parameter in averaged.module.named_parameters():
        assert_close(parameter, expected[name].float())
        assert not torch.equal(parameter, dict(plain.named_parameters())[name])
    assert averaged.module.norm.num_batches_tracked == 5
    averaged(tokens)
