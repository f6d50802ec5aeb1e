"""Models whose parts are compiled by themselves: no name of theirs has ``_orig_mod`` in it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.distributed.wrappers import user_name
from poetx_compile.errors import ConfigError, IncompatibleStateError, NothingToTrainError
from poetx_compile.layers.eligibility import linears
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers.models import MLP, TinyLM
from tests.helpers.rotations import turn

CONFIG = poetx.POETXConfig(block_size=4)
TOKENS = torch.arange(10).reshape(2, 5)


def compiled_parts(model: nn.Module) -> nn.Module:
    """A block, and in the other block a single linear, compiled by themselves."""
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    attention = model.layers[1].attention
    attention.q_proj = torch.compile(attention.q_proj, backend="eager")
    return model


def tiny(how: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = TinyLM()
    if how == "parts first":
        compiled_parts(model)
    poetx.prepare(model, CONFIG)
    return compiled_parts(model) if how == "parts after" else model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {user_name(name): value.clone() for name, value in model.state_dict().items()}


def test_names_lose_whole_parts_alone():
    assert user_name("_orig_mod.a._orig_mod.b._orig_mod") == "a.b"
    assert user_name("a.my_orig_mod.b") == "a.my_orig_mod.b"
    assert user_name("_orig_mod") == ""


HOWS = ("plain", "parts first", "parts after")


@pytest.mark.parametrize("way", ["state", "plain state", "checkpoint"])
@pytest.mark.parametrize("there", HOWS)
@pytest.mark.parametrize("here", HOWS)
def test_states_fit_whatever_is_compiled(here, there, way, tmp_path):
    saved, loaded = turn(tiny(here)), tiny(there, seed=1)
    if way == "checkpoint":
        poetx.save_checkpoint(tmp_path / "file", saved)
        poetx.load_checkpoint(tmp_path / "file", loaded)
    else:
        plain = way == "plain state"
        loaded.load_state_dict(poetx.plain_state_dict(saved) if plain else saved.state_dict())
    if way == "plain state":
        mine, theirs = poetx.plain_state_dict(loaded), poetx.plain_state_dict(saved)
    else:
        mine, theirs = state_of(loaded), state_of(saved)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("compiled", ["saved", "loaded"])
def test_checkpoints_of_models_nobody_prepared_fit_as_well(compiled, tmp_path):
    saved, loaded = TinyLM(), TinyLM()
    compiled_parts(saved if compiled == "saved" else loaded)
    poetx.save_checkpoint(tmp_path / "file", saved)
    poetx.load_checkpoint(tmp_path / "file", loaded)
    mine, theirs = state_of(loaded), state_of(saved)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_compiled_whole_loads_into_the_model_and_back(tmp_path):
    saved, loaded = turn(tiny("parts first")), tiny("plain", seed=1)
    loaded.load_state_dict(torch.compile(saved, backend="eager").state_dict())
    assert all(torch.equal(v, state_of(saved)[n]) for n, v in state_of(loaded).items())
    poetx.save_checkpoint(tmp_path / "file", loaded)
    other = torch.compile(tiny("parts after", seed=2), backend="eager")
    poetx.load_checkpoint(tmp_path / "file", other)
    assert all(torch.equal(v, state_of(saved)[n]) for n, v in state_of(other).items())


def test_what_does_not_fit_is_refused_as_without_compiled_parts():
    model = tiny("parts first")
    state = state_of(model) | {"layers.0.mlp.extra": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="extra"):
        model.load_state_dict(state)
    del state["layers.0.mlp.extra"], state["norm.weight"]
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        model.load_state_dict(state)


def test_a_part_of_the_model_takes_its_part_of_the_state():
    saved, loaded = turn(tiny("plain")), tiny("parts first", seed=1)
    loaded.layers[0]._orig_mod.load_state_dict(saved.layers[0].state_dict())
    mine, theirs = loaded.layers[0].state_dict(), saved.layers[0].state_dict()
    assert all(torch.equal(value, theirs[user_name(name)]) for name, value in mine.items())


def test_linears_that_share_an_input_do_so_whatever_is_compiled():
    layouts = [
        {name: e.layout.tolist() for name, _, e in prepared_linears(tiny(how))} for how in HOWS
    ]
    assert layouts[0] == layouts[1] == layouts[2]
    assert list(layouts[0]) == [n for n in linears(TinyLM()) if n != "lm_head"]


def test_reports_say_the_user_s_names():
    def model(compiled: bool) -> nn.Module:
        parts = nn.Sequential(MLP(), MLP())
        if compiled:
            parts[0] = torch.compile(parts[0], backend="eager")
            parts[1].up = torch.compile(parts[1].up, backend="eager")
        return parts

    explained, expected = (poetx.explain(model(c), torch.randn(2, 12)) for c in (True, False))
    for part in ("before", "after"):
        assert getattr(explained, part) == getattr(expected, part)
    assert str(explained) == str(expected)
    reports = [poetx.prepare(tiny(how)) for how in HOWS]
    assert str(reports[0]) == str(reports[1]) == str(reports[2])


def test_messages_say_the_user_s_names(caplog):
    model = compiled_parts(TinyLM(tied=True))
    model.layers[0].mlp.up_proj.weight = model.layers[1].mlp.up_proj.weight
    with pytest.raises(NothingToTrainError) as error:
        poetx.prepare(model, poetx.POETXConfig(target_modules=["nothing"]))
    assert "_orig_mod" not in str(error.value)
    assert "_orig_mod" not in str(poetx.prepare(model, CONFIG))
    state = tiny("plain").state_dict()
    state["layers.0.mlp.up_proj.parametrizations.weight.original"] = torch.zeros(3, 3)
    with pytest.raises(IncompatibleStateError, match=r"layers\.0\.mlp") as error:
        tiny("parts first").load_state_dict(state)
    assert "_orig_mod" not in str(error.value)
    other = compiled_parts(TinyLM())
    with pytest.raises(ConfigError) as error:
        poetx.prepare(other, CONFIG, shared=[("q_proj.in", "down_proj.in")])
    assert "_orig_mod" not in str(error.value)


def test_what_the_compiler_adopts_fits_whatever_is_compiled(caplog):
    caplog.set_level(logging.DEBUG, "poetx_compile")
    model, plain = TinyLM(), TinyLM()
    options = {"stage": "eager", "block_size": 4}
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend=poetx.poetx_backend, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    poetx.prepare(plain, CONFIG)
    plain.load_state_dict(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(v, state_of(model)[n]) for n, v in state_of(plain).items())
    assert not any("_orig_mod" in r.getMessage() for r in caplog.records if r.levelno > 10)
