"""``base="int8"``: what prepared layers store, show, save and load."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.errors import IncompatibleStateError
from poetx_compile.inspect.diagnostics import effective_weight
from poetx_compile.layers import effective
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.optim.merge import merge
from tests.helpers.models import SwiGLU
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close, relative_error

X = torch.randn(6, 80, generator=torch.Generator().manual_seed(1))


def plain(dtype: torch.dtype = torch.float32) -> SwiGLU:
    """Rows of 80 and 100 columns: a group of 64, and a shorter one."""
    torch.manual_seed(0)
    return SwiGLU(80, 100).to(dtype)


def prepared(model: nn.Module | None = None, **config) -> nn.Module:
    model = plain() if model is None else model
    poetx.prepare(model, poetx.POETXConfig(**{"block_size": 8, "base": "int8"} | config))
    return model


def weights(model: nn.Module) -> list[Tensor]:
    return [m.weight.detach().clone() for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepare_stores_int8_and_shows_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = plain(dtype)
    before, parameters = weights(model), [m.weight for m in model.children()]
    report = poetx.prepare(model, poetx.POETXConfig(block_size=8, base="int8"))
    assert "base='int8': a frozen weight takes 1." in str(report)
    assert f"in place of {dtype.itemsize}" in str(report)
    for linear, parameter, old in zip(model.children(), parameters, before, strict=True):
        stored = stored_weight(linear)
        assert stored is parameter  # whoever holds the weight holds no dense copy
        assert (stored.dtype, stored.untyped_storage().nbytes()) == (torch.int8, old.numel())
        assert equivalence_of(linear).scale.dtype == linear.weight.dtype == dtype
        assert 0.003 < relative_error(linear.weight, old) < 0.007
    assert report.total == sum(w.numel() for w in before)
    before = weights(model)
    merge(model)
    assert all(map(torch.equal, before, weights(model)))


def test_moves_and_casts() -> None:
    model = turn(prepared())
    expected = weights(model)
    assert all(map(torch.equal, expected, weights(copy.deepcopy(model))))
    model.bfloat16()
    e = equivalence_of(model.up_proj)
    assert model.up_proj.weight.dtype == e.scale.dtype == torch.bfloat16
    assert (e.skew_in.dtype, stored_weight(model.up_proj).dtype) == (torch.float32, torch.int8)
    for one, two in zip(weights(model), expected, strict=True):
        assert_close(one, two, torch.bfloat16)


def test_evaluation_keeps_no_dense_copy() -> None:
    model = prepared().eval()
    with torch.no_grad():
        model(X)
    assert not any(e in effective._cache for _, _, e in prepared_linears(model))


def test_a_weight_that_is_assigned_or_written_is_quantised() -> None:
    model = turn(prepared())
    value = torch.randn(100, 80)
    model.up_proj.weight = value
    assert relative_error(model.up_proj.weight, value) < 0.007
    with torch.no_grad():
        model.gate_proj.weight.copy_(value)
    assert torch.equal(model.gate_proj.weight, model.up_proj.weight)
    assert torch.equal(effective_weight(model.gate_proj), model.gate_proj.weight)
    assert stored_weight(model.up_proj).dtype == torch.int8


def test_unloading_gives_a_plain_model_that_trains() -> None:
    model = turn(prepared())
    expected, state = weights(model), poetx.plain_state_dict(model)
    poetx.merge_and_unload(model)
    assert all(map(torch.equal, expected, weights(model)))
    assert model.up_proj.weight.requires_grad
    assert torch.equal(state["up_proj.weight"], expected[1])
    assert set(state) == set(plain().state_dict())


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "int8, another seed": lambda: turn(prepared(seed=5)),
    "dense": lambda: turn(prepared(base="dense", seed=5)),
    "merged in every step": lambda: prepared(base="dense", merge_interval=1, seed=5),
    "plain": plain,
}


@pytest.mark.parametrize("source", OTHERS)
def test_every_state_is_loaded(source: str) -> None:
    other, model = OTHERS[source](), turn(prepared(), seed=3)
    model.load_state_dict(copy.deepcopy(other.state_dict()))
    for one, two in zip(weights(model), weights(other), strict=True):
        exact = source.startswith("int8")
        assert torch.equal(one, two) if exact else relative_error(one, two) < 0.007
    assert abs(poetx.diagnostics(model)["norm_drift_max"]) < 1e-6
    moved = any(skew.any() for _, _, e in prepared_linears(model) for skew in e.skews)
    assert moved == (source in ("int8, another seed", "dense"))


@pytest.mark.parametrize("fields", [{}, {"merge_interval": 1}])
def test_a_dense_model_loads_the_state_of_an_int8_one(fields: dict) -> None:
    model, other = turn(prepared(seed=5)), prepared(base="dense", **fields)
    other.load_state_dict(model.state_dict())
    for one, two in zip(weights(model), weights(other), strict=True):
        assert_close(two, one)


def test_a_state_without_its_scales_is_refused() -> None:
    model = prepared()
    state = model.state_dict()
    del state["up_proj.parametrizations.weight.0.scale"]
    with pytest.raises(IncompatibleStateError, match=r"not up_proj.*scale, and a part of them"):
        model.load_state_dict(state)
    with pytest.raises(IncompatibleStateError, match=r"no up_proj.*scale: give the whole state"):
        poetx.plain_state_dict(state)


def test_prepared_on_meta_and_filled_by_a_dense_checkpoint() -> None:
    state = plain().state_dict()
    with torch.device("meta"):
        model = SwiGLU(80, 100)
    prepared(model)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.int8}
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert all(map(torch.equal, weights(model), weights(prepared())))


def test_training_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        config = {"merge_interval": 2, "redraw_interval": 2, "max_angle": None}
        model = prepared(plain(torch.bfloat16), **config)
        return model, poetx.POETXMuon(model, lr=0.02)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        for _ in range(3):
            loss = (model(X.bfloat16()).float() - X).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    run = build()
    first = steps(*run)
    poetx.save_checkpoint(tmp_path / "file", *run)
    last = steps(*run)
    assert last < first
    again = build()
    poetx.load_checkpoint(tmp_path / "file", *again)
    assert steps(*again) == last
    for mine, theirs in zip(
        run[0].state_dict().values(), again[0].state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
