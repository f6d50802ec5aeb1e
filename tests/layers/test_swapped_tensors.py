"""Moves, casts and loads by `torch.utils.swap_tensors`, which no weak reference may forbid.

Torch swaps where ``set_swap_module_params_on_conversion`` says so, and tensor subclasses (FSDP2's
shards) always.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import poetx_compile as poetx
from poetx_compile.layers.prepared import equivalence_of, prepared_linears
from tests.helpers.graph_of import prepared
from tests.helpers.models import MLP, TinyLM
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close

# Torch 2.11 swaps nothing that was compiled, whatever the backend.
AFTER_COMPILING = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "invalidate_compile_context_weakrefs"),
    reason="this torch keeps weak references to what it has compiled",
)
CONFIG = poetx.POETXConfig(block_size=4, merge_interval=2)
X = torch.linspace(-1, 1, 36).reshape(3, 12)


@pytest.fixture(autouse=True)
def _swap() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def trained(model: nn.Module, call=None) -> torch.optim.Optimizer:
    optimizer = poetx.POETXAdamW(model, lr=1e-4)
    for _ in range(3):
        (model if call is None else call)(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def evaluated(model: nn.Module, call=None) -> None:
    model.eval()
    with torch.no_grad():
        (model if call is None else call)(X)


def compiled(model: nn.Module, **options) -> nn.Module:
    options = {"stage": "aot_eager", **options}
    return torch.compile(model, backend=poetx.poetx_backend, options=options)


BEFORE = {
    "nothing": lambda model: None,
    "training": trained,
    "evaluation": evaluated,
    "weight read": lambda model: nn.init.normal_(model.up.weight),
}
COMPILED = {
    "compiled": lambda model: evaluated(model, compiled(model)),
    "compiled training": lambda model: trained(model, compiled(model)),
    "folds kept": lambda model: evaluated(
        model, compiled(model, keep_folded="step", formulation="folded")
    ),
    "explained": lambda model: poetx.explain(model, X),
}


@pytest.mark.parametrize(
    "before",
    [*BEFORE.values(), *(pytest.param(f, marks=AFTER_COMPILING) for f in COMPILED.values())],
    ids=[*BEFORE, *COMPILED],
)
def test_a_cast_keeps_parameters_and_outputs(before):
    model = prepared(MLP(), block_size=4, merge_interval=2)
    before(model)
    assert not [name for name, p in model.named_parameters() if weakref.getweakrefs(p)]
    parameters, expected = list(model.parameters()), model(X).detach()
    model.double()
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert_close(model(X.double()), expected, torch.float32)


@AFTER_COMPILING
def test_a_compiled_model_goes_on_after_a_cast():
    model = prepared(MLP())
    fast = compiled(model)
    fast(X).sum().backward()
    model.double()
    assert_close(fast(X.double()), model(X.double()))


def test_rotations_stay_in_fp32():
    model = prepared(MLP()).bfloat16()
    e = equivalence_of(model.up)
    assert (e.skew_in.dtype, model.up.weight.dtype) == (torch.float32, torch.bfloat16)
    assert e.skew_in.abs().max() > 0


@pytest.mark.parametrize("state", ["its own", "plain"])
@pytest.mark.parametrize("before", ["training", "evaluation"])
def test_states_load(state, before):
    saved, model = prepared(MLP()), prepared(MLP())
    BEFORE[before](model) if before == "evaluation" else model(X)
    model.load_state_dict(saved.state_dict() if state == "its own" else MLP().state_dict())
    if state == "its own":
        assert torch.equal(model(X), saved(X))
    saved.load_state_dict(model.state_dict())
    assert torch.equal(model(X), saved(X))


def test_an_optimiser_built_before_trains_on():
    model = MLP()
    poetx.prepare(model, CONFIG)
    optimizer = poetx.POETXAdamW(model, lr=1e-4)
    model.double()
    model(X.double()).square().sum().backward()
    optimizer.step()
    assert equivalence_of(model.up).skew_in.abs().max() > 0


def test_from_meta_and_copies():
    with torch.device("meta"):
        model = MLP()
    poetx.prepare(model, CONFIG)
    model.to_empty(device="cpu")
    model.load_state_dict(MLP().state_dict())
    copied = copy.deepcopy(turn(model))
    copied.double()
    assert_close(copied(X.double()), model(X), torch.float32)


def test_prepare_and_unload_while_a_graph_is_alive():
    model = MLP()
    out = model(X)
    poetx.prepare(model, CONFIG)
    expected = turn(model)(X)
    poetx.merge_and_unload(model)
    assert [type(p) for p in model.parameters()] == [nn.Parameter] * 4
    assert_close(model(X), expected)
    assert out.grad_fn is not None


@AFTER_COMPILING
def test_what_was_left_alone_or_unloaded_is_not_adopted_after_a_cast():
    model = TinyLM(layers=1)
    poetx.prepare(model, CONFIG)
    poetx.merge_and_unload(model)
    model.double()
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    compiled(model)(tokens).sum().backward()
    assert not list(prepared_linears(model))
    assert model.layers[0].mlp.up_proj.weight.grad is not None


@AFTER_COMPILING
def test_an_adopted_model_is_cast():
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    fast = compiled(model)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        for _ in range(2):
            fast(X.to(dtype)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert equivalence_of(model.up).skew_in.dtype == torch.float64


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_shards_are_moved(process_group):
    torch.__future__.set_swap_module_params_on_conversion(False)
    model = prepared(MLP(), block_size=4, merge_interval=2)
    torch.distributed.fsdp.fully_shard(model)
    optimizer = trained(model)
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert optimizer.schedule.step == 3
    model.to("cpu")
