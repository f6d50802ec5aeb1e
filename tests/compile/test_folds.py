"""Folded weights kept over the micro-batches of a step: folded again only after a change."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.compile import folds as fold_cache
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.ops import OPS
from poetx_compile.optim.merge import merge
from tests.helpers.graph_of import prepared
from tests.helpers.models import SwiGLU
from tests.helpers.tolerances import assert_close, relative_error

OPTIONS = {"stage": "aot_eager", "formulation": "folded", "keep_folded": "step"}


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """The shapes of the weights that were folded, in order."""
    seen: list[torch.Size] = []
    op = OPS["fold_weight"]
    reference = op.reference

    def counting(weight, *args):
        seen.append(weight.shape)
        return reference(weight, *args)

    monkeypatch.setattr(op, "reference", counting)
    fold_cache.forget()
    yield seen
    fold_cache.forget()


def folded(model: nn.Module | None = None) -> nn.Module:
    return prepared((model or SwiGLU()).double(), formulation="folded")


def compiled(model: nn.Module, **options) -> nn.Module:
    return torch.compile(
        model, backend=poetx.poetx_backend, fullgraph=True, options=OPTIONS | options
    )


def batch(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 16).double()


def skew_of(model: nn.Module) -> nn.Parameter:
    return next(e.skew_in for _, _, e in prepared_linears(model))


class ThroughData(torch.optim.Optimizer):
    """Writes past the versions of its parameters."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.copy_(p.data - 0.1 * p.grad)


def step_of(kind: type, **options) -> Callable[[nn.Module], None]:
    def step(model: nn.Module) -> None:
        kind([p for p in model.parameters() if p.requires_grad], **options).step()

    return step


def edit(model: nn.Module) -> None:
    with torch.no_grad():
        skew_of(model).mul_(2)


def edit_stored(model: nn.Module) -> None:
    with torch.no_grad():
        model.up_proj.parametrizations.weight.original.mul_(2)


def exchange(model: nn.Module) -> None:
    skew_of(model).data = 2 * skew_of(model).data


def load(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})


def forget(model: nn.Module) -> None:
    skew_of(model).data.mul_(2)
    fold_cache.forget()


CHANGES = {
    "sgd": step_of(torch.optim.SGD, lr=0.1),
    "fused": step_of(torch.optim.AdamW, lr=0.1, fused=True),
    "through .data": step_of(ThroughData),
    "merge": merge,
    "load_state_dict": load,
    "an edit of a skew": edit,
    "an edit of a weight": edit_stored,
    "other memory": exchange,
    "forget": forget,
}


def test_once_a_step_and_again_when_something_changed(folds):
    model = folded()
    run = compiled(model)
    for name, change in {"nothing yet": lambda _: None, **CHANGES}.items():
        change(model)
        model.zero_grad()
        folds.clear()
        for x in (batch(), batch()):
            y = run(x)
            y.square().sum().backward()
        assert_close(y, model(x), what=f"output after {name}")
        assert len(folds) == 3, name


def test_steps_of_four_micro_batches_over_two_merges(folds):
    def train(call: Callable[[nn.Module], nn.Module]) -> tuple[list[float], list[dict]]:
        torch.manual_seed(0)
        model = SwiGLU().double()
        poetx.prepare(model, poetx.POETXConfig(block_size=8, merge_interval=2, redraw_interval=2))
        run = call(model)
        optimizer = torch.optim.SGD(poetx.param_groups(model, lr=0.1, poetx_lr=0.02), momentum=0.9)
        schedule = poetx.attach(optimizer, model)
        losses, gradients = [], []
        for _ in range(5):
            for _ in range(4):
                loss = (run(batch()) - batch()).square().mean()
                (loss / 4).backward()
                losses.append(loss.item())
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            gradients.append(grads)
            optimizer.step()
            optimizer.zero_grad()
        assert schedule.merges == 2
        assert skew_of(model).abs().max() > 1e-3, "the rotations moved"
        return losses, gradients

    expected, expected_gradients = train(lambda model: model)
    assert not folds
    losses, gradients = train(compiled)
    assert len(folds) == 5 * 3, "three weights a step, five steps"
    assert relative_error(torch.tensor(losses), torch.tensor(expected)) < 1e-5
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        for name, gradient in mine.items():
            assert relative_error(gradient, theirs[name]) < 1e-5, name


def test_instances_that_share_code_keep_their_own(folds):
    models = [folded(), folded()]
    edit(models[1])
    torch._dynamo.utils.counters.clear()
    runs = [compiled(model) for model in models]
    for _ in range(3):
        for model, run in zip(models, runs, strict=True):
            x = batch()
            assert_close(run(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(folds) == 6


def test_stand_ins_that_reach_shared_code_are_folded_for_at_each_call(folds):
    model, codes = folded(), []

    def backend(gm, inputs):
        codes.append((poetx.poetx_backend(gm, inputs, options=OPTIONS), inputs))
        return codes[-1][0]

    torch.compile(model, backend=backend, fullgraph=True)(batch())
    ((code, inputs),) = codes
    gathered = [nn.Parameter(2 * t) if isinstance(t, nn.Parameter) else t for t in inputs]
    fold_cache.forget()
    folds.clear()
    (first,) = code(*gathered)
    for tensor in gathered[1:]:  # as FSDP writes them: past their versions
        if isinstance(tensor, nn.Parameter):
            tensor.data.zero_()
    (second,) = code(*gathered)
    assert len(folds) == 6
    assert not torch.equal(first, second)
    assert not fold_cache._cache


def test_blocks_compiled_one_by_one(folds):
    model = folded(nn.Sequential(SwiGLU(), SwiGLU(), SwiGLU()))
    reference = copy.deepcopy(model)
    for block in model:
        block.compile(backend=poetx.poetx_backend, fullgraph=True, options=OPTIONS)
    for _ in range(2):
        x = batch()
        y, expected = model(x), reference(x)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert_close(y, expected)
    assert len(folds) == 3 * 3
    for (name, p), q in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if q[1].grad is not None:
            assert_close(p.grad, q[1].grad, what=name)


def test_an_evaluation_folds_once_and_sees_weights_that_were_exchanged_for_it(folds):
    model = folded()
    run = compiled(model)
    skew = skew_of(model)
    run(batch()).sum().backward()
    own = skew.detach().clone()
    skew.data.mul_(0.5)  # an average of the weights, as some tools put it in
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(3):
                x = batch()
                assert_close(run(x), model(x), what=mode.__name__)
    skew.data.copy_(own)
    for _ in range(2):
        x = batch()
        y = run(x)
        assert_close(y, model(x))
        y.square().sum().backward()
    assert len(folds) == 3 * 3, "training, the evaluations, training"
    fold_cache.forget()
    with torch.inference_mode(), torch.enable_grad():
        run(batch())
    run(batch()).sum().backward()
    assert len(folds) == 4 * 3, "what inference mode has folded serves a backward"


def test_dynamic_shapes_take_the_weights_over(folds):
    model = folded()
    run = compiled(model)
    torch._dynamo.utils.counters.clear()
    for rows in (3, 5, 7, 9):
        x = batch(rows)
        y = run(x)
        assert_close(y, model(x))
        y.square().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one static, one dynamic"
    assert len(folds) == 3


def test_weights_are_freed(folds, monkeypatch):
    model = folded()
    run = compiled(model)
    run(batch()).sum().backward()

    def weights() -> list[weakref.ref]:
        return [weakref.ref(w) for found in fold_cache._cache.values() for w in found.weights]

    first = weights()
    assert len(first) == 3
    assert all(w() is not None for w in first)
    alive: list[int] = []
    before = OPS["fold_weight"].reference

    def looking(*args):
        alive.append(sum(w() is not None for w in first))
        return before(*args)

    monkeypatch.setattr(OPS["fold_weight"], "reference", looking)
    edit(model)
    run(batch())
    assert alive == [0, 0, 0], "the old weights are gone before the new ones are built"
    second = weights()
    optimizer = torch.optim.SGD([skew_of(model)], lr=0.1)
    gone: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: gone.append(all(w() is None for w in second)))
    optimizer.step()
    assert gone == [True], "an optimiser has the memory to itself"
    run(batch())
    third = weights()
    assert len(third) == 3
    del model, run, optimizer
    gc.collect()
    assert not fold_cache._cache
    assert all(w() is None for w in third)


def test_unloading_frees_them(folds):
    model = folded()
    run = compiled(model)
    with torch.no_grad():
        run(batch())
    parameters = list(model.parameters())  # an optimiser that is still there
    assert fold_cache._cache
    poetx.merge_and_unload(model)
    assert not fold_cache._cache
    del parameters


def test_explaining_keeps_nothing(folds):
    model = folded()
    poetx.explain(model, batch(), options=OPTIONS)
    assert folds
    assert not fold_cache._cache


def test_inductor():
    fold_cache.forget()
    model = prepared(nn.Linear(16, 24), formulation="folded")
    run = compiled(model, stage="inductor")
    with torch.no_grad():
        for _ in range(2):
            for _ in range(2):
                x = torch.randn(6, 16)
                assert_close(run(x), model(x))
            edit(model)
    assert len(fold_cache._cache) == 1


@pytest.mark.gpu
def test_inductor_on_a_gpu_with_gradients():
    model = prepared(SwiGLU().cuda(), formulation="folded")
    reference = copy.deepcopy(model)
    run = compiled(model, stage="inductor")
    for _ in range(2):
        for _ in range(2):
            x = torch.randn(6, 16, device="cuda")
            y, expected = run(x), reference(x)
            assert_close(y, expected)
            # No sum of squares: rotations of the outputs keep it, and their gradients cancel.
            y.pow(3).sum().backward()
            expected.pow(3).sum().backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            if q.grad is not None:
                assert_close(p.grad, q.grad, what=name)
        edit(model)
        edit(reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_folded": "always"}, "keep_folded = 'always' is not allowed"),
        ({"keep_folded": "step", "variant": "mem"}, "variant = 'mem' is there to keep less"),
        ({"keep_folded": "step", "memory_budget": 0.5}, "memory_budget = 0.5 is there to keep"),
    ],
)
def test_contradictions_raise(options, message):
    with pytest.raises(Exception, match=f"ConfigError.*{message}|{message}"):
        poetx.explain(prepared(nn.Linear(16, 16)), torch.randn(3, 16), options=options)
