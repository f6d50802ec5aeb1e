"""`save_pretrained`: what `from_pretrained` reads, and a word where it could not."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from tests.helpers.rotations import turn

transformers = pytest.importorskip("transformers")

CONFIG = poetx.POETXConfig(block_size=8)
TOKENS = torch.arange(6)[None]


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_the_folder_is_a_plain_model_with_the_configuration_beside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tied_llama()
    poetx.prepare(model, CONFIG)
    turn(model)
    expected = model(TOKENS).logits
    assert poetx.save_pretrained(torch.compile(model), tmp_path) == tmp_path
    assert caplog.records == []
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(TOKENS).logits, expected)
    assert torch.equal(model(TOKENS).logits, expected), "it trains on"
    saved = json.loads((tmp_path / "poetx_config.json").read_text())
    assert poetx.POETXConfig.from_dict(saved) == CONFIG
    poetx.prepare(loaded, poetx.POETXConfig.from_dict(saved))


def test_saving_by_habit_says_once_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tied_llama()
    poetx.prepare(model, CONFIG)
    model.save_pretrained(tmp_path / "plain", state_dict=poetx.plain_state_dict(model))
    model.save_pretrained(tmp_path / "checkpoint-20")  # the Trainer's, to resume from
    assert caplog.records == []
    for _ in range(2):
        model.save_pretrained(tmp_path / "state")
    (record,) = [r for r in caplog.records if r.name == "poetx_compile"]
    assert "fill LlamaForCausalLM with random weights" in record.getMessage()
    assert "Use poetx_compile.save_pretrained(model, folder)" in record.getMessage()
    caplog.clear()
    copied = copy.deepcopy(model)
    assert copied.save_pretrained.__self__ is copied
    poetx.merge_and_unload(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path / "unloaded")
    assert caplog.records == []


def test_other_models_are_told_of_plain_state_dict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"save what poetx_compile\.plain_state_dict"):
        poetx.save_pretrained(nn.Linear(2, 2), tmp_path)
