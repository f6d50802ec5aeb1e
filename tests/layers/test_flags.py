"""`requires_grad` as users toggle it: the frozen weights stay what they are, rotations obey."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from poetx_compile.optim.groups import BLOCK
from poetx_compile.optim.schedule import schedule_of
from poetx_compile.optim.takeover import FOLLOWS
from tests.helpers.models import MLP, SwiGLU
from tests.helpers.rotations import skews, turn
from tests.helpers.tolerances import assert_close

CONFIG = poetx.POETXConfig(block_size=4, merge_interval=100, max_angle=None)
FORMS = ["eager", "auto", "input_centric", "folded"]


def stores(model: nn.Module) -> list[nn.Parameter]:
    return [stored_weight(m) for _, m, _ in prepared_linears(model)]


def toggle(model: nn.Module) -> None:
    """What GAN loops do at each step, and fine-tuning callbacks once."""
    model.requires_grad_(False)
    model.requires_grad_(True)


def prepared(form: str = "auto", **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    fields.setdefault("max_angle", 0.25 if form == "folded" else None)
    fields["formulation"] = "auto" if form == "eager" else form
    model = MLP()
    poetx.prepare(model, poetx.POETXConfig(block_size=4, **fields))
    return turn(model)


def ready(model: nn.Module, form: str, stage: str = "aot_eager", **options: Any) -> Any:
    if form == "eager":
        return model
    options = {"stage": stage, **options}
    return torch.compile(model, backend=poetx.poetx_backend, options=options)


def gradients(model: nn.Module, run: Any, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours: dict[str, Tensor | None], reference: dict[str, Tensor | None]) -> None:
    for name, expected in reference.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            actual = ours[name]
            assert actual is not None, name
            assert_close(actual, expected, what=name)


# --- the frozen weights -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fast", "mem"])
@pytest.mark.parametrize("form", FORMS)
def test_an_unfrozen_store_gets_no_gradient_and_changes_none(form: str, variant: str) -> None:
    x = torch.randn(5, 12)
    model = prepared(form, variant=variant)
    reference = gradients(model, model, x)
    toggle(model)
    assert all(s.requires_grad for s in stores(model))
    ours = gradients(model, ready(model, form), x)
    assert_same(ours, reference)
    assert all(s.grad is None for s in stores(model))
    if form == "eager":
        for name, expected in reference.items():
            assert expected is None or torch.equal(ours[name], expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["read by another op", "in a checkpoint", "in a transform"])
def test_wherever_the_weight_is_read(how: str) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = prepared()

        def forward(self, x: Tensor) -> Tensor:
            if how == "read by another op":
                return x @ self.inner.up.weight.mT
            if how == "in a checkpoint":
                from torch.utils.checkpoint import checkpoint

                return checkpoint(self.inner, x, use_reentrant=False)
            return torch.vmap(lambda row: F.linear(row, self.inner.up.weight))(x)

    x = torch.randn(5, 12)
    model = Reader()
    reference = gradients(model, model, x)
    toggle(model)
    for form in ("eager", "auto"):
        assert_same(gradients(model, ready(model, form), x), reference)


def test_folds_that_outlive_a_call_are_those_of_an_unfrozen_store_as_well() -> None:
    x = torch.randn(5, 12)
    model = prepared("folded")
    reference = gradients(model, model, x)
    toggle(model)
    run = ready(model, "folded", keep_folded="step")
    assert_same(gradients(model, run, x), reference)
    assert_same(gradients(model, run, x), reference)


def test_a_transform_takes_the_store_for_a_constant() -> None:
    model = prepared()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (torch.ones(2, 12),)).sum()

    found = torch.func.grad(loss)(parameters)
    for name, gradient in found.items():
        assert bool(gradient.any()) == (not name.endswith("original")), name


@pytest.mark.parametrize("form", FORMS)
def test_a_side_of_size_one_gets_no_gradient(form: str) -> None:
    model = nn.Linear(12, 1)
    fields = {"formulation": "auto" if form == "eager" else form}
    poetx.prepare(model, poetx.POETXConfig(block_size=4, **fields))
    toggle(model)
    ready(model, form)(torch.randn(3, 12)).sum().backward()
    assert model.parametrizations.weight[0].skew_in.grad is not None
    assert model.parametrizations.weight[0].skew_out.grad is None
    groups = poetx.param_groups(model, lr=1e-3)
    assert all(p.numel() for group in groups for p in group["params"])
    poetx.attach(torch.optim.SGD(groups, lr=0.1), model)


OPTIMISERS = {
    "POETXAdamW": lambda model: poetx.POETXAdamW(model, lr=1e-2, weight_decay=0.5),
    "POETXMuon": lambda model: poetx.POETXMuon(model, lr=1e-2, weight_decay=0.5),
    "param_groups": lambda model: _attached(
        torch.optim.AdamW(poetx.param_groups(model, lr=1e-2, weight_decay=0.5)), model
    ),
    "attach": lambda model: _attached(
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5), model
    ),
    "attach, trainable ones": lambda model: _attached(
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), model
    ),
    "adopt": lambda model: _adopted(
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5), model
    ),
}


def _attached(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    poetx.attach(optimizer, model)
    return optimizer


def _adopted(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    poetx.adopt(optimizer, model)
    return optimizer


def held(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    return {p for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_no_optimiser_holds_an_unfrozen_store(name: str) -> None:
    model = prepared()
    toggle(model)
    optimizer = OPTIMISERS[name](model)
    before = [s.clone() for s in stores(model)]
    for s in stores(model):
        s.grad = torch.ones_like(s)  # as if something gave them a gradient after all
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    assert held(optimizer) == {*skews(model), model.up.bias, model.down.bias}
    assert all(map(torch.equal, stores(model), before))
    assert not set(stores(model)) & set(optimizer.state)
    copy = OPTIMISERS[name](model)
    copy.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("clip", ["torch", "ours"])
def test_the_norm_that_is_clipped_is_that_of_what_trains(clip: str) -> None:
    def norm(toggled: bool) -> Tensor:
        model = prepared()
        optimizer = poetx.POETXAdamW(model)
        if toggled:
            toggle(model)
        model(torch.ones(3, 12)).square().sum().backward()
        if clip == "ours":
            return poetx.clip_grad_norm_(optimizer, 1.0)
        return nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    assert torch.equal(norm(True), norm(False))


# --- what users do with flags -------------------------------------------------------------------


@pytest.mark.parametrize("form", ["eager", "auto"])
def test_a_gan_loop_trains_as_one_that_toggles_nothing(form: str, graphs: Any) -> None:
    def train(toggles: bool) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        generator, critic = MLP(), MLP()
        for model in (generator, critic):
            poetx.prepare(model, CONFIG)
        optimizers = [poetx.POETXAdamW(m, lr=1e-2) for m in (generator, critic)]
        g, d = (ready(m, form, stage="eager") for m in (generator, critic))
        frozen = [s.clone() for s in stores(critic)]
        for step in range(3):
            z = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
            for player, optimizer in enumerate(optimizers):
                if toggles:
                    critic.requires_grad_(player == 1)
                fake = g(z) if player == 0 else g(z).detach()
                loss = d(fake).mean() * (1 - 2 * player)
                critic.zero_grad()
                generator.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_((generator, critic)[player].parameters(), 0.1)
                optimizer.step()
        assert all(map(torch.equal, stores(critic), frozen))
        return [*generator.parameters()], [*critic.parameters()]

    toggled, plain = train(True), train(False)
    for ours, reference in zip(toggled, plain, strict=True):
        assert all(map(torch.equal, ours, reference))
    if form == "auto":
        assert graphs() <= 6, "two forms of the critic, and not one more at each step"


def test_a_gan_loop_over_models_that_nobody_prepared() -> None:
    """The critic is frozen when it is compiled first, and is adopted all the same."""
    generator, critic = MLP(), MLP()
    models = generator, critic
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.5) for m in models]
    options = {"stage": "eager", "block_size": 4}
    g, d = (torch.compile(m, backend=poetx.poetx_backend, options=options) for m in models)
    for step in range(3):
        for player, optimizer in enumerate(optimizers):
            critic.requires_grad_(player == 1)
            z = torch.randn(6, 12)
            fake = g(z) if player == 0 else g(z).detach()
            generator.zero_grad()
            critic.zero_grad()
            (d(fake).mean() * (1 - 2 * player)).backward()
            optimizer.step()
        if step == 0:
            frozen = [s.clone() for m in models for s in stores(m)]
    for model, optimizer in zip(models, optimizers, strict=True):
        assert held(optimizer) == {*skews(model), model.up.bias, model.down.bias}
        assert all(bool(s.any()) for s in skews(model))
    assert all(map(torch.equal, (s for m in models for s in stores(m)), frozen))


@pytest.mark.parametrize("form", ["eager", "auto"])
def test_a_layer_frozen_after_compiling_stands_still_and_the_others_do_not(form: str) -> None:
    model = SwiGLU(8, 10)
    poetx.prepare(model, CONFIG)
    optimizer = poetx.POETXAdamW(model, lr=1e-2)
    run = ready(model, form)
    x = torch.randn(5, 8)
    for frozen in (None, "gate_proj", None):
        for name, module, _ in prepared_linears(model):
            module.requires_grad_(name != frozen)
        before = {n: m.weight.detach().clone() for n, m, _ in prepared_linears(model)}
        optimizer.zero_grad()
        run(x).square().sum().backward()
        optimizer.step()
        for name, module, e in prepared_linears(model):
            assert torch.equal(module.weight, before[name]) == (name == frozen), (name, frozen)
            assert (e.skew_in.grad is None) == (name == frozen)
            assert stored_weight(module).grad is None


def test_the_flag_of_a_weight_is_that_of_its_rotations() -> None:
    model = prepared()
    x = torch.randn(3, 12)
    model.up.weight.requires_grad_(False)
    model.down.weight.requires_grad = False
    assert not any(s.requires_grad for s in skews(model))
    assert not model.up.weight.requires_grad
    model.up.weight.requires_grad_()
    assert model.up.weight.requires_grad
    assert not model.down.weight.requires_grad
    found = gradients(model, model, x)
    assert {n for n, g in found.items() if g is not None and "skew" in n} == {
        "up.parametrizations.weight.0.skew_in",
        "up.parametrizations.weight.0.skew_out",
    }


def test_the_flag_of_what_is_made_of_a_weight_is_its_own() -> None:
    model = prepared()
    leaf = model.up.weight.detach().requires_grad_()
    leaf.sum().backward()
    assert leaf.grad is not None
    model.up.requires_grad_(False)
    model.up.weight[0].requires_grad_()
    model.up.weight.data.requires_grad_()
    assert not model.up.weight.requires_grad


def test_a_frozen_layer_is_unloaded_as_a_frozen_layer() -> None:
    model = prepared()
    toggle(model)
    model.up.requires_grad_(False)
    poetx.merge_and_unload(model)
    assert not model.up.weight.requires_grad
    assert model.down.weight.requires_grad


def test_reports_do_not_count_an_unfrozen_store_as_trained() -> None:
    model = prepared()
    before = poetx.prepare(model)
    toggle(model)
    assert poetx.prepare(model).trainable == before.trainable


# --- callbacks that unfreeze and add what is there ----------------------------------------------


def unfreeze_and_add(optimizer: torch.optim.Optimizer, module: nn.Module, lr: float) -> None:
    """As the fine-tuning callbacks of trainers do it."""
    module.requires_grad_(True)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    if new:
        optimizer.add_param_group({"params": new, "lr": lr})


@pytest.mark.parametrize("name", ["POETXAdamW", "POETXMuon", "param_groups", "attach", "adopt"])
def test_an_unfrozen_layer_that_was_held_trains_on_as_before(name: str) -> None:
    model = prepared()
    optimizer = OPTIMISERS[name](model)
    groups = [g.get("name") for g in optimizer.param_groups]
    rates = [g["lr"] for g in optimizer.param_groups]
    before = [s.clone() for s in stores(model)]
    model.up.requires_grad_(False)
    unfreeze_and_add(optimizer, model.up, 1.0)
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    assert held(optimizer) == {*skews(model), model.up.bias, model.down.bias}
    assert [g.get("name") for g in optimizer.param_groups if g["params"]] == groups
    assert [g["lr"] for g in optimizer.param_groups if g["params"]] == rates
    assert all(map(torch.equal, stores(model), before))


RATIO_OF = {"POETXAdamW": 64 / 4, "POETXMuon": 2 + math.log2(12 / (2 * 4)) / 3}  # b = 4, d = 12


@pytest.mark.parametrize("name", RATIO_OF)
def test_rotations_that_are_added_get_a_group_and_a_rate_of_their_own(name: str) -> None:
    model = prepared(merge_interval=2)
    model.up.requires_grad_(False)
    optimizer = OPTIMISERS[name](model)
    layer = model.up.parametrizations.weight[0]
    assert not {layer.skew_in, layer.skew_out} & held(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    unfreeze_and_add(optimizer, model.up, 1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = model.up.weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(3, 12)).square().sum().backward()
        optimizer.step()
        user, ours = optimizer.param_groups[-2:]
        assert user["lr"] == pytest.approx(1e-3 / (1 + step))
        assert ours["lr"] == pytest.approx(RATIO_OF[name] * user["lr"])
        scheduler.step()
    assert user["params"] == [model.up.bias]
    assert set(ours["params"]) == {layer.skew_in, layer.skew_out}
    assert (ours[BLOCK], ours["weight_decay"]) == (4, 0.0)
    assert FOLLOWS in ours
    assert not torch.equal(model.up.weight, before)
    schedule = schedule_of(optimizer)
    assert schedule is not None
    assert (schedule.step, schedule.merges) == (3, 1)


def test_groups_that_were_added_are_saved_and_loaded_without_a_step_between() -> None:
    def unfrozen() -> tuple[nn.Module, Any]:
        model = prepared()
        model.up.requires_grad_(False)
        optimizer = poetx.POETXAdamW(model)
        unfreeze_and_add(optimizer, model.up, 1e-3)
        return model, optimizer

    saved = unfrozen()[1].state_dict()
    model, optimizer = unfrozen()
    optimizer.load_state_dict(saved)
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    assert held(optimizer) == {*skews(model), model.up.bias, model.down.bias}


def test_unfrozen_rotations_that_no_group_holds_are_told(caplog: Any) -> None:
    model = prepared()
    model.up.requires_grad_(False)
    optimizer = poetx.POETXAdamW(model)
    model.requires_grad_(True)
    for _ in range(3):
        optimizer.zero_grad()
        model.zero_grad()
        model(torch.randn(3, 12)).sum().backward()
        optimizer.step()
    assert caplog.text.count("rotations of 1 prepared layer(s) had gradients") == 1


def test_an_optimiser_over_a_frozen_model_is_looked_at_again_when_it_is_unfrozen() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    poetx.prepare(model, CONFIG)
    model.requires_grad_(False)
    model.up.bias.requires_grad_(True)
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    model.requires_grad_(True)
    with pytest.raises(poetx.errors.UnownedRotationsError, match="built before prepare"):
        optimizer.step()
