"""examples/hf_trainer.py end to end, on a model and a text small enough for a test."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_trainer

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def test_from_text_to_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hf_trainer, "SIZES", SIZES)
    monkeypatch.setattr(hf_trainer, "VOCABULARY", 280)
    monkeypatch.setattr(hf_trainer, "LENGTH", 16)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    for name in "ab":
        text = " ".join(words[(i * i + i // 7) % 6] for i in range(1000))
        (tmp_path / f"{name}.txt").write_text(text)

    out = tmp_path / "out"
    data = [str(tmp_path / f"{name}.txt") for name in "ab"]
    how = ["--out", str(out), "--steps", "12", "--stage", "eager"]
    sentence = hf_trainer.main(["--data", *data, *how])

    assert sentence.startswith(hf_trainer.PROMPT)
    assert len(sentence) > len(hf_trainer.PROMPT)
    printed = capsys.readouterr().out
    assert re.search(r"^validation loss: \d\.\d{3} nats per token$", printed, re.MULTILINE)
    history = json.loads((out / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    rates = [e["learning_rate/poetx b=8"] for e in history if "learning_rate/poetx b=8" in e]
    assert max(rates) == pytest.approx(6e-3)
    plain = AutoModelForCausalLM.from_pretrained(out / "export")
    assert not any("parametrizations" in name for name in plain.state_dict())
    assert plain(torch.zeros(1, 4, dtype=torch.long)).logits.shape[-1] == plain.config.vocab_size
