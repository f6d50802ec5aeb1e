"""Plain weights out of prepared models: `plain_state_dict`, and Hugging Face's own files."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.errors import IncompatibleStateError, InterruptedMergeError
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.optim.merge import merge
from tests.helpers.models import TinyLM
from tests.helpers.rotations import trained, turn
from tests.helpers.tolerances import relative_error, tolerance

TOKENS = torch.arange(12).reshape(2, 6)
CONFIG = poetx.POETXConfig(block_size=8)


# plain_state_dict


def test_it_is_the_state_of_the_plain_model() -> None:
    model = trained(TinyLM(tied=True))
    expected = model(TOKENS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain, fresh = poetx.plain_state_dict(model), TinyLM(tied=True)
    assert list(plain) == list(fresh.state_dict())
    assert plain["lm_head.weight"].data_ptr() == plain["embedding.weight"].data_ptr()
    for name, linear, _ in prepared_linears(model):
        assert torch.equal(plain[f"{name}.weight"], linear.weight)
    assert not any(value.requires_grad for value in plain.values())
    fresh.load_state_dict(plain)
    assert torch.equal(fresh(TOKENS), expected)
    for key, value in model.state_dict().items():  # which trains on
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("compiled", ["whole", "blocks"])
def test_names_are_the_users_where_the_model_or_its_parts_are_compiled(compiled: str) -> None:
    model = trained(TinyLM())
    names = list(TinyLM().state_dict())
    if compiled == "whole":
        assert list(poetx.plain_state_dict(torch.compile(model, backend="eager"))) == names
        return
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend="eager")
    assert any("_orig_mod" in key for key in model.state_dict())
    assert list(poetx.plain_state_dict(model)) == names


def test_a_saved_state_gives_the_same_without_a_model() -> None:
    model = trained(TinyLM(), permutation="chunked", block_size=(4, 8), neumann_order=4)
    state = copy.deepcopy(model.state_dict())
    here, there = poetx.plain_state_dict(model), poetx.plain_state_dict(state)
    assert here.keys() == there.keys()
    assert all(torch.equal(value, there[key]) for key, value in here.items())


def test_a_state_gathered_by_distributed_checkpoint_is_a_saved_state() -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = trained(TinyLM())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(torch.compile(model, backend="eager"), options=options)
    plain = poetx.plain_state_dict(gathered)
    assert all(torch.equal(v, plain[k]) for k, v in poetx.plain_state_dict(model).items())


def test_what_is_shared_is_one_tensor_wherever_it_goes() -> None:
    linear = nn.Linear(12, 12)
    model = nn.Sequential(linear, nn.Tanh(), linear)
    poetx.prepare(model, poetx.POETXConfig(block_size=4))
    for device in (None, "meta"):
        plain = poetx.plain_state_dict(model, device=device)
        assert list(plain) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert plain["0.weight"] is plain["2.weight"]
        assert plain["0.bias"] is plain["2.bias"]
        assert plain["0.weight"].is_meta is (device == "meta")


def test_a_plain_model_gives_its_own_state() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    plain, state = poetx.plain_state_dict(model), model.state_dict()
    assert list(plain) == list(state)
    assert all(v.data_ptr() == plain[k].data_ptr() for k, v in state.items())


def test_a_state_without_all_of_a_layer_is_refused() -> None:
    state = trained(TinyLM()).state_dict()
    key = "layers.0.mlp.up_proj.parametrizations.weight.0.layout"
    del state[key]
    with pytest.raises(IncompatibleStateError, match=f"the state dict has no {key}"):
        poetx.plain_state_dict(state)
    model = trained(TinyLM())
    equivalence = next(e for _, _, e in prepared_linears(model))
    equivalence.interrupted = True
    with pytest.raises(InterruptedMergeError):
        poetx.plain_state_dict(model)


def test_a_second_parametrization_of_a_weight_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * self.scale

    model = nn.Sequential(nn.Linear(8, 8))
    poetx.prepare(model, CONFIG)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Scale())
    with pytest.raises(IncompatibleStateError, match=r"1\.scale belongs to another parametriz"):
        poetx.plain_state_dict(model)


# Hugging Face: a Llama small enough for a test, trained a little, saved and loaded


def llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that was trained densely."""
    torch.manual_seed(0)
    model = llama(tied=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("pretrained")
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def test_logits_of_a_pretrained_model_are_identical_after_prepare(pretrained: Path) -> None:
    model = load(pretrained)
    expected = logits(model)
    poetx.prepare(model, CONFIG)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.train()), expected)
    moved = [not torch.equal(m.parametrizations.weight.original, m.weight)
             for _, m, _ in prepared_linears(model)]  # fmt: skip
    assert len(moved) == 14
    assert all(moved)


def test_logits_of_a_pretrained_model_survive_a_merge(pretrained: Path) -> None:
    model = load(pretrained)
    poetx.prepare(model, CONFIG)
    before = logits(model)
    merge(model, redraw=True)
    assert relative_error(logits(model), before) <= tolerance(torch.float32)
    turn(model, angle := 0.08)
    turned = logits(model)
    assert relative_error(turned, before) > 0.01
    merge(model, redraw=True)
    # 14 layers, each within 2θ⁴.
    assert relative_error(logits(model), turned) <= 14 * (tolerance(torch.float32) + 2 * angle**4)


_LOAD = """
import sys
sys.modules["poetx_compile"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    saved = torch.load(f"{folder}/logits.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(model(saved["tokens"]).logits, saved["logits"]), folder
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    print(folder)
"""


def test_exports_are_loaded_by_auto_model_without_this_package(tmp_path: Path) -> None:
    """Tied and untied; while training goes on, of a compiled model, unloaded, from a checkpoint."""
    folders = []

    def save(name: str, expected: torch.Tensor, model: Any, state: Any = None) -> None:
        folder = tmp_path / name
        model.save_pretrained(folder, state_dict=state)
        torch.save({"tokens": TOKENS, "logits": expected}, folder / "logits.pt")
        folders.append(str(folder))

    for tied in (False, True):
        model = llama(tied)
        poetx.prepare(model, CONFIG)
        turn(model)
        merge(model, redraw=True)
        turn(model)
        expected = logits(model.eval())
        compiled = torch.compile(model, backend="eager")
        save(f"training{tied}", expected, model, poetx.plain_state_dict(compiled))
        poetx.save_checkpoint(tmp_path / "c.pt", model)
        state = torch.load(tmp_path / "c.pt", weights_only=True)["model"]
        save(f"checkpoint{tied}", expected, llama(tied), poetx.plain_state_dict(state))
        assert torch.equal(logits(model), expected)
        save(f"unloaded{tied}", expected, poetx.merge_and_unload(model))
    command = [sys.executable, "-c", _LOAD, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == folders


def test_save_pretrained_of_a_prepared_model_is_its_own_state(tmp_path: Path) -> None:
    """What the Trainer saves to resume from: not an export, and never taken for one in silence."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = llama(tied=True)
    poetx.prepare(model, CONFIG)
    turn(model)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    resumed = llama(tied=True)
    poetx.prepare(resumed, CONFIG)
    resumed.load_state_dict(state, strict=False)  # lm_head is tied and not in the file
    assert torch.equal(logits(resumed), logits(model))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == 14
    plain = llama(tied=True)
    plain.load_state_dict(poetx.plain_state_dict(state), strict=False)
    assert torch.equal(logits(plain), logits(model))
