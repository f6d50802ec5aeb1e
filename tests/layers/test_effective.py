"""The effective weight in eager mode: kept while nothing changes, and written through."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from poetx_compile.config import POETXConfig
from poetx_compile.errors import EffectiveWeightError
from poetx_compile.layers import effective
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.prepare import prepare
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.optim import POETXAdamW
from poetx_compile.optim.merge import merge
from tests.helpers.models import TinyLM
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close

LAYERS = 7  # prepared ones of a model with one block
TOKENS = torch.arange(12).reshape(2, 6)
Computed = list[OrthogonalEquivalence]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    """The layers whose effective weight was computed, in order."""
    calls: Computed = []
    real = OrthogonalEquivalence.effective

    def spy(self: OrthogonalEquivalence, *tensors: Tensor) -> Tensor:
        calls.append(self)
        return real(self, *tensors)

    monkeypatch.setattr(OrthogonalEquivalence, "effective", spy)
    return calls


def prepared(model: nn.Module, **config) -> nn.Module:
    prepare(model, POETXConfig(**({"block_size": 4} | config)))
    turn(model)
    return model


def kept(model: nn.Module) -> int:
    return sum(e in effective._cache for _, _, e in prepared_linears(model))


# Kept


def test_evaluation_computes_each_weight_once(computed: Computed) -> None:
    model = prepared(TinyLM(layers=1))
    expected = model(TOKENS)
    model.eval()
    del computed[:]
    with torch.no_grad():
        for _ in range(5):
            assert torch.equal(model(TOKENS), expected)
    assert len(computed) == len(set(computed)) == LAYERS
    with torch.inference_mode():
        assert torch.equal(model(TOKENS), expected)
    assert len(computed) == LAYERS
    model(TOKENS).sum().backward()  # gradients are wanted: nothing kept is used
    assert len(computed) == 2 * LAYERS
    assert equivalence_of(model.layers[0].mlp.up_proj).skew_in.grad.any()


@pytest.mark.parametrize("mode", ["training", "gradients", "opted out"])
def test_nothing_is_kept_where_weights_may_train(computed: Computed, mode: str) -> None:
    model = prepared(TinyLM(layers=1), keep_in_eval=mode != "opted out")
    model.train(mode == "training")
    with torch.set_grad_enabled(mode == "gradients"):
        for _ in range(2):
            model(TOKENS)
    assert len(computed) == 2 * LAYERS
    assert kept(model) == 0


def _step(model: nn.Module) -> None:
    optimizer = POETXAdamW(model, lr=1e-3)
    model(TOKENS).square().sum().backward()
    optimizer.step()


def _in_place_past_the_version(model: nn.Module) -> None:
    """As optimisers with kernels of their own do: only the step itself tells."""
    model(TOKENS).square().sum().backward()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            parameter.data.add_(parameter.grad, alpha=-1e-3)
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()


def _assign(model: nn.Module) -> None:
    model.layers[0].mlp.up_proj.weight = torch.randn(40, 16)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a step": _step,
    "a step that leaves the versions": _in_place_past_the_version,
    "a merge": lambda model: (turn(model, 0.2), merge(model, redraw=True)),
    "a load": lambda model: model.load_state_dict(prepared(TinyLM(layers=1)).state_dict()),
    "a load by assignment": lambda model: model.load_state_dict(
        prepared(TinyLM(layers=1)).state_dict(), assign=True
    ),
    "plain weights": lambda model: model.load_state_dict(TinyLM(layers=1).state_dict()),
    "an assigned weight": _assign,
    "a weight written in place": lambda model: nn.init.normal_(model.layers[0].mlp.up_proj.weight),
    "a cast": lambda model: model.bfloat16(),
    "turned rotations": lambda model: turn(model, 0.1),
    "data behind train() and eval()": lambda model: (
        equivalence_of(model.layers[0].mlp.up_proj).skew_in.data.add_(0.1),
        model.train(),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_is_never_stale(change: str) -> None:
    model = prepared(TinyLM(layers=1)).eval()
    with torch.no_grad():
        before = model(TOKENS)
    CHANGES[change](model)
    model.eval()
    expected = copy.deepcopy(model).train()(TOKENS)
    with torch.no_grad():
        for _ in range(2):
            actual = model(TOKENS)
            assert torch.equal(actual, expected)
    assert not torch.equal(actual, before)


def _data(tensor: Tensor) -> None:
    tensor.data = tensor.detach() * 1.002


def _data_three_times(tensor: Tensor) -> None:
    """The second may be where the first was, were it not kept with the weight."""
    for _ in range(3):
        _data(tensor)


@torch.no_grad()
def _set(tensor: Tensor) -> None:
    with torch.autograd._unsafe_preserve_version_counter(tensor):
        tensor.set_(tensor * 1.002)


@pytest.mark.parametrize("write", [_data, _data_three_times, _set])
@pytest.mark.parametrize("which", ["skew_in", "skew_out", "stored"])
def test_what_is_kept_notices_other_memory_without_a_version(write, which: str) -> None:
    model = prepared(nn.Linear(12, 12)).eval()
    e, x = equivalence_of(model), torch.randn(3, 12)
    tensor = stored_weight(model) if which == "stored" else getattr(e, which)
    version = tensor._version
    with torch.no_grad():
        before = model(x)
        write(tensor)
        assert tensor._version == version
        after = model(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(model).train()(x))


@pytest.mark.parametrize("freed_by", ["train", "eval", "step", "deletion"])
def test_what_is_kept_is_freed(freed_by: str) -> None:
    model = prepared(TinyLM(layers=1)).eval()
    with torch.no_grad():
        model(TOKENS)
    assert kept(model) == LAYERS
    if freed_by == "step":
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()
    elif freed_by == "deletion":
        weights = [weakref.ref(effective._cache[e][1]) for _, _, e in prepared_linears(model)]
        del model
        gc.collect()
        assert not any(weight() is not None for weight in weights)
        return
    else:
        getattr(model, freed_by)()
    assert kept(model) == 0


def test_a_copy_shares_nothing_that_is_kept() -> None:
    model = prepared(TinyLM(layers=1)).eval()
    with torch.no_grad():
        expected = model(TOKENS)
        copied = copy.deepcopy(model)
        turn(copied, 0.3)
        assert not torch.equal(copied(TOKENS), expected)
        assert torch.equal(model(TOKENS), expected)


def test_stand_ins_of_a_functional_call_are_not_kept(computed: Computed) -> None:
    model = prepared(TinyLM(layers=1)).eval()
    others = {k: v.detach() * 0.5 for k, v in model.named_parameters()}
    with torch.no_grad():
        expected = model(TOKENS)
        first = functional_call(model, others, (TOKENS,))
        assert not torch.equal(first, expected)
        assert torch.equal(functional_call(model, others, (TOKENS,)), first)
        assert torch.equal(model(TOKENS), expected)
    assert len(computed) == 3 * LAYERS


def test_ensembles_of_prepared_models_run_as_one() -> None:
    """torch.func.stack_module_state: every tensor is a stand-in, buffers included."""
    models = [prepared(nn.Linear(12, 8), seed=seed) for seed in range(3)]
    x = torch.randn(5, 12)
    state = stack_module_state(models)
    base = copy.deepcopy(models[0])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no batching rule: one after the other
        together = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(*state)
    for model, output in zip(models, together, strict=True):
        assert_close(output, model(x))


# Written through


def _in_no_grad(write: Callable[[Tensor], object]) -> Callable[[nn.Linear], None]:
    @torch.no_grad()
    def run(linear: nn.Linear) -> None:
        write(linear.weight)

    return run


def _replace_data(linear: nn.Linear) -> None:
    linear.weight.data = torch.ones(8, 12)


def _augment(linear: nn.Linear) -> None:
    linear.weight += 1


def _several_times(weight: Tensor) -> None:
    weight.zero_()
    weight.add_(3.0)
    weight[1:3] *= 2


WRITES: dict[str, Callable[[nn.Linear], object]] = {
    "init": lambda linear: nn.init.xavier_uniform_(linear.weight),
    "truncated": lambda linear: nn.init.trunc_normal_(linear.weight, std=0.02),
    "orthogonal": lambda linear: nn.init.orthogonal_(tensor=linear.weight),
    "reset_parameters": lambda linear: linear.reset_parameters(),
    "data": lambda linear: linear.weight.data.normal_().clamp_(-1, 1),
    "data is assigned": _replace_data,
    "detached": lambda linear: linear.weight.detach().fill_(2.0),
    "copy": _in_no_grad(lambda weight: weight.copy_(torch.ones(8, 12))),
    "a row": _in_no_grad(lambda weight: weight.__setitem__(3, 7.0)),
    "a view": _in_no_grad(lambda weight: weight.t()[2:5].view(3, 8).mul_(2)),
    "parts": _in_no_grad(lambda weight: [row.zero_() for row in weight.chunk(4)]),
    "several times": _in_no_grad(_several_times),
    "several at once": _in_no_grad(lambda weight: torch._foreach_mul_([weight], 2.0)),
    "augmented": _in_no_grad(lambda weight: weight.__iadd__(1)),
    "augmented attribute": torch.no_grad()(_augment),
    "gradients on": lambda linear: linear.weight.mul_(2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_in_place_is_stored(write: str, training: bool) -> None:
    torch.manual_seed(4)
    plain, linear = nn.Linear(12, 8), nn.Linear(12, 8)
    linear.load_state_dict(plain.state_dict())
    prepare(linear, POETXConfig(block_size=4))
    linear.train(training)
    with torch.no_grad():
        assert torch.equal(linear.weight, plain.weight)  # kept in evaluation
    turn(linear)
    linear.weight = plain.weight.detach()
    parameter = stored_weight(linear)
    for module in (plain, linear):
        torch.manual_seed(5)
        if module is plain and write == "gradients on":
            with torch.no_grad():
                plain.weight.mul_(2)
        else:
            WRITES[write](module)
    assert torch.equal(linear.weight, plain.weight)
    with torch.no_grad():
        assert torch.equal(linear.weight, plain.weight)
    x = torch.randn(3, 12)
    assert torch.equal(linear(x), plain(x))
    e = equivalence_of(linear)
    assert torch.equal(stored_weight(linear), e.stored_form(plain.weight))
    assert stored_weight(linear) is parameter
    assert not e.skew_in.any()
    assert not e.skew_out.any()


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode_reads_and_writes_alike(training: bool) -> None:
    linear, x = prepared(nn.Linear(12, 8)).train(training), torch.randn(3, 12)
    expected = linear(x)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(linear(x), expected)
        nn.init.ones_(linear.weight)
        assert torch.equal(linear.weight, torch.ones(8, 12))
    assert torch.equal(linear.weight, torch.ones(8, 12))
    linear(x).sum().backward()


@pytest.mark.parametrize("change", [lambda linear: turn(linear, 0.1), merge])
def test_an_old_effective_weight_cannot_be_written(change) -> None:
    linear = prepared(nn.Linear(12, 8))
    weight = linear.weight
    change(linear)
    with pytest.raises(EffectiveWeightError, match=r"read linear\.weight again"):
        nn.init.zeros_(weight)


def test_a_weight_of_another_shape_is_refused() -> None:
    linear = prepared(nn.Linear(12, 8))
    before = linear.weight.detach().clone()
    with pytest.raises(ValueError, match=r"a weight of shape \[12, 8\] is not one of \[8, 12\]"):
        linear.weight = torch.ones(12, 8)
    assert torch.equal(linear.weight, before)


def test_everything_else_is_that_of_a_tensor() -> None:
    linear = prepared(nn.Linear(12, 8))
    weight, x = linear.weight, torch.randn(3, 12)
    for result in (weight + 1, weight.clone(), weight @ x.T, linear(x), weight.double()):
        assert type(result) is Tensor
    file = io.BytesIO()
    torch.save(weight.detach(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is type(copy.deepcopy(weight.detach())) is Tensor
    assert torch.equal(loaded, weight)
    assert torch.equal(torch.from_numpy(weight.detach().numpy()), weight)


def test_another_kind_of_tensor_keeps_its_own_rules() -> None:
    class Named(Tensor):
        pass

    linear = prepared(nn.Linear(12, 8))
    assert type(linear(torch.randn(3, 12).as_subclass(Named))) is Named


def test_an_effective_weight_as_an_argument_of_compiled_code_is_refused_or_right() -> None:
    linear = prepared(nn.Linear(12, 8))
    skew = equivalence_of(linear).skew_in

    def function(weight: Tensor) -> Tensor:
        return (weight[0] * torch.arange(12.0)).sum()

    compiled = torch.compile(function, backend="aot_eager")
    try:
        loss = compiled(linear.weight)  # torch 2.11
    except Exception as error:
        if "give it linear.weight.clone()" not in str(error):  # torch 2.13
            raise
        loss = compiled(linear.weight.clone())
    expected = function(linear.weight)
    assert_close(loss, expected)
    (actual,), (wanted,) = (torch.autograd.grad(value, skew) for value in (loss, expected))
    assert wanted.abs().max() > 0.1
    assert_close(actual, wanted)


def test_compiled_code_and_traces_see_a_plain_tensor() -> None:
    linear = prepared(nn.Linear(12, 8)).eval()
    x = torch.randn(3, 12)
    expected = linear(x)
    compiled = torch.compile(lambda x: linear(x) + linear.weight.sum(), backend="eager")
    assert torch.equal(compiled(x), expected + linear.weight.sum())
    with torch.no_grad():
        linear(x)
        assert torch.equal(torch.jit.trace(linear, x)(x), expected)
