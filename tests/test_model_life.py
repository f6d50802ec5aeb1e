"""What may happen to a prepared model while it trains: moves, copies, averages, new layers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import poetx_compile as poetx
from poetx_compile.errors import (
    IncompatibleStateError,
    StaleOptimizerError,
    UnownedRotationsError,
)
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.optim import POETXAdamW, POETXMuon, attach, param_groups
from poetx_compile.optim.merge import merge
from tests.helpers.models import SwiGLU, TinyLM
from tests.helpers.rotations import skews, turn
from tests.helpers.tolerances import relative_error, tolerance
from tests.helpers.training import both, build, train_step

TOKENS = torch.arange(12).reshape(2, 6)


def small(optimizer_class: Any = POETXAdamW, **fields: Any) -> tuple[nn.Module, Any]:
    return build(optimizer_class, TinyLM(layers=1), **fields)


@pytest.mark.parametrize("how", ["eager", "compiled", "kept", "adopted", "unloaded"])
def test_a_model_that_is_deleted_is_freed(how: str) -> None:
    """No registry of the process keeps a model, a parameter of it or its optimiser."""

    def trained() -> list[weakref.ref]:
        model = TinyLM(layers=1)
        model.layers[0] = SwiGLU()
        options = {"stage": "aot_eager"}
        if how == "kept":
            options |= {"keep_folded": "step", "formulation": "folded"}
        if how == "adopted":
            options |= {"block_size": 8, "merge_interval": 2, "redraw_interval": 2}
            optimizer = torch.optim.AdamW(model.parameters())
        else:
            poetx.prepare(
                model, poetx.POETXConfig(block_size=8, merge_interval=2, redraw_interval=2)
            )
            optimizer = POETXMuon(model)
        run: Any = model
        if how != "eager":
            run = torch.compile(model, backend=poetx.poetx_backend, options=options)
        for _ in range(3):
            run(TOKENS).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            run(TOKENS)
            model.eval()(TOKENS)
        assert len(list(prepared_linears(model))) == 3
        if how == "unloaded":
            poetx.merge_and_unload(model)
        return [weakref.ref(part) for part in (*model.modules(), *model.parameters(), optimizer)]

    parts = trained()
    torch._dynamo.reset()  # its compiled code is not ours to free
    gc.collect()
    assert [type(part()).__name__ for part in parts if part() is not None] == []


# Casts and moves, the optimiser built before


@both
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        nn.Module.half,
        pytest.param(nn.Module.cuda, marks=pytest.mark.gpu),
        pytest.param(lambda m: m.to("cuda", torch.bfloat16), marks=pytest.mark.gpu),
    ],
    ids=["bfloat16", "half", "cuda", "cuda and bfloat16"],
)
def test_an_optimiser_built_before_a_move_trains_on(optimizer_class, move: Callable) -> None:
    model = TinyLM(layers=1)
    for part in model.modules():  # AdamW's eps is zero in fp16
        if isinstance(part, nn.RMSNorm | nn.Embedding) or part is model.lm_head:
            part.requires_grad_(False)
    fields = {"merge_interval": 2, "max_angle": 0.25, "fused": False}
    model, optimizer = build(optimizer_class, model, **fields)
    parameters = list(skews(model))
    move(model)
    assert list(skews(model)) == parameters
    device = next(model.parameters()).device
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(0, 24, (2, 5), generator=generator).to(device)
        logits = model(tokens[:, :-1]).float()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for skew in skews(model):
            assert (skew.dtype, skew.device) == (torch.float32, device)
            assert all(v.dtype == torch.float32 for v in optimizer.state[skew].values())
            assert bool(skew.any()) is (i % 2 == 0)
    assert optimizer.schedule.merges == 1
    for _, linear, e in prepared_linears(model):
        assert stored_weight(linear).dtype == model.embedding.weight.dtype
        assert e.perm_in.pair.device == e.layout.device == device
        assert e.layout.tolist()[2] == e.draw == 2


def test_a_move_that_makes_new_parameters_is_noticed_at_the_next_step() -> None:
    model, optimizer = small()
    train_step(model, optimizer)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with pytest.raises(StaleOptimizerError, match=r"load_state_dict\(assign=True\) was called"):
        train_step(model, optimizer)
    train_step(model, POETXAdamW(model, lr=1e-3))


# Copies


@both
def test_a_copied_model_trains_apart_with_an_optimiser_of_its_own(optimizer_class) -> None:
    model, optimizer = small(optimizer_class, merge_interval=2)
    for i in range(3):
        train_step(model, optimizer, i)
    copied = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = optimizer_class(copied, lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = [train_step(copied, other, i) for i in range(3, 5)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert losses == [train_step(model, optimizer, i) for i in range(3, 5)]
    assert optimizer.schedule.last_merge == other.schedule.last_merge == 4
    for a, b in zip(model.state_dict().values(), copied.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@both
@pytest.mark.parametrize(
    "take",
    [copy.deepcopy, pickle.dumps, lambda value: torch.save(value, io.BytesIO())],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copied_optimiser_is_refused_because_it_would_never_merge(optimizer_class, take) -> None:
    model, optimizer = small(optimizer_class)
    with pytest.raises(StaleOptimizerError, match=r"build a new one for the copied model"):
        take(optimizer)
    attached = torch.optim.SGD(param_groups(model, lr=0.1), lr=0.1)
    attach(attached, model)
    with pytest.raises(StaleOptimizerError, match="would never merge"):
        take((model, attached) if take is copy.deepcopy else attached)
    take(optimizer.state_dict())


def test_pickling_a_prepared_model_is_refused_and_an_unloaded_one_is_plain() -> None:
    model, _ = small()
    for take in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            take(model)
    expected = model(TOKENS)
    plain = pickle.loads(pickle.dumps(poetx.merge_and_unload(model)))
    assert torch.equal(plain(TOKENS), expected)


# Averages of weights


def test_averaged_effective_weights_are_those_of_averaged_plain_models() -> None:
    """Across merges; the reference is torch's own average of unloaded copies."""
    model, optimizer = small(POETXMuon, merge_interval=2, lr=1e-2)
    ema = get_ema_multi_avg_fn(0.6)
    mean = copy.deepcopy(poetx.plain_state_dict(model))
    reference = AveragedModel(poetx.merge_and_unload(copy.deepcopy(model)), multi_avg_fn=ema)
    reference.update_parameters(poetx.merge_and_unload(copy.deepcopy(model)))
    for i in range(4):
        train_step(model, optimizer, i)
        for name, value in poetx.plain_state_dict(model).items():
            mean[name].lerp_(value, 1 - 0.6)
        reference.update_parameters(poetx.merge_and_unload(copy.deepcopy(model)))
    assert optimizer.schedule.merges == 2
    averaged = TinyLM(layers=1)
    averaged.load_state_dict(mean)
    assert relative_error(averaged(TOKENS), reference(TOKENS)) <= tolerance(torch.float32)
    assert relative_error(averaged(TOKENS), model(TOKENS)) > 0.01


def _averaged_model(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return averaged, lambda: averaged.update_parameters(model)


def _averaged_state(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    """As many scripts do it: every tensor of the state dict, whatever it is."""
    averaged = copy.deepcopy(model)

    @torch.no_grad()
    def update() -> None:
        for mine, theirs in zip(
            averaged.state_dict().values(), model.state_dict().values(), strict=True
        ):
            mine.copy_(0.999 * mine + 0.001 * theirs)

    return averaged, update


@pytest.mark.parametrize("kind", [_averaged_model, _averaged_state])
def test_averaging_a_prepared_models_own_tensors_across_a_merge_is_refused(kind) -> None:
    model, optimizer = small(merge_interval=3)
    averaged, update = kind(model)
    averaged.eval()
    for i in range(3):
        if i > 0 and kind is _averaged_model:
            update()  # within an interval an average of rotations is one
            assert torch.isfinite(averaged(TOKENS)).all()
        train_step(model, optimizer, i)
    update()
    assert optimizer.schedule.merges == 1
    averaged.to("cpu")  # hides nothing
    for use in (
        lambda: averaged(TOKENS),
        averaged.state_dict,
        lambda: merge(averaged, redraw=True),
    ):
        with pytest.raises(IncompatibleStateError, match=r"average poetx\.plain_state_dict\(model"):
            use()
    assert torch.isfinite(model(TOKENS)).all()


# New layers


def test_a_new_layer_trains_densely_until_prepare_takes_it_in() -> None:
    model, optimizer = small(merge_interval=100)
    apart = POETXAdamW(model, lr=1e-3)  # never hears of the new layer
    x = torch.randn(5, 16)
    model.extra = nn.Linear(16, 16)
    optimizer.add_param_group({"params": list(model.extra.parameters()), "lr": 1e-3})

    def step(optimizer: Any) -> None:
        (model(TOKENS).square().sum() + model.extra(x).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    before = model.extra.weight.detach().clone()
    step(optimizer)
    assert not torch.equal(model.extra.weight, before)
    expected = model.extra(x)
    report = poetx.prepare(model)
    assert [row.status for row in report if row.name == "extra"] == ["prepared"]
    assert torch.equal(model.extra(x), expected)
    # At once, not at the next merge.
    with pytest.raises(UnownedRotationsError, match="it was built before prepare"):
        step(optimizer)
    with pytest.raises(StaleOptimizerError, match="build a new optimiser"):
        step(apart)
    stored = stored_weight(model.extra).clone()
    step(POETXAdamW(model, lr=1e-3))
    assert equivalence_of(model.extra).skew_in.any()
    assert torch.equal(stored_weight(model.extra), stored)


def test_a_fresh_head_in_the_place_of_a_prepared_one() -> None:
    """Fine-tuning: the old head's state is gone with it, the new one trains densely."""
    model = TinyLM(layers=1)
    poetx.prepare(
        model,
        poetx.POETXConfig(block_size=8, exclude_modules=(), merge_interval=2, redraw_interval=2),
    )
    optimizer = POETXAdamW(model, lr=1e-3)
    train_step(model, optimizer)
    model.lm_head = nn.Linear(16, 24)
    turn(model)
    forward = torch.compile(model, backend="poetx", options={"stage": "aot_eager"})
    with pytest.raises(StaleOptimizerError):
        train_step(model, optimizer)
    optimizer = POETXAdamW(model, lr=1e-3)
    head = model.lm_head.weight.detach().clone()
    train_step(forward, optimizer)
    assert type(model.lm_head) is nn.Linear
    assert not torch.equal(model.lm_head.weight, head)
    merge(model, redraw=True)


def test_a_mixture_added_later_is_taken_in_without_its_router() -> None:
    model, _ = small()
    model.mixture = nn.ModuleDict({"gate": nn.Linear(16, 4)})
    model.mixture["experts"] = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    status = {row.name: (row.status, row.reason) for row in poetx.prepare(model)}
    assert status["mixture.gate"] == ("skipped", "router of a mixture of experts")
    assert {status[f"mixture.experts.{i}"] for i in range(4)} == {("prepared", "")}
    x = torch.randn(3, 16)
    model.mixture.gate(x).sum().backward()
    assert model.mixture.gate.weight.grad is not None


# Generation


def test_a_generated_sequence_is_that_of_the_plain_model_mid_training(monkeypatch) -> None:
    """Greedy decoding between steps and merges; every weight is built once a sequence."""
    model, optimizer = small(merge_interval=2)
    built: list[Tensor] = []
    real = torch.ops.poetx.orthogonal_equivalence

    def counted(*args: Any) -> Tensor:
        built.append(args[0])
        return real(*args)

    @torch.no_grad()
    def generate(model: nn.Module) -> Tensor:
        tokens = torch.zeros(1, 1, dtype=torch.int64)
        for _ in range(4):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
        return tokens

    for i in range(3):
        train_step(model, optimizer, i)
        plain = poetx.merge_and_unload(copy.deepcopy(model)).eval()
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops.poetx, "orthogonal_equivalence", counted)
            model.eval()
            assert torch.equal(generate(model), generate(plain))
        assert len(built) == 7 * (i + 1)
        model.train()
