"""The Trainer's own argument `optimizer_cls_and_kwargs`: no subclass, no callback, no setup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import poetx_compile as poetx
from poetx_compile.errors import ConfigError, IncompatibleStateError
from poetx_compile.integrations.huggingface import OptimizerFactory
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers import huggingface
from tests.helpers.trainer import CONFIG, arguments, logged, padded, samples, trainer

HOW = {"gradient_accumulation_steps": 1, "warmup_steps": 0}


def by_factory(folder: Path, model: Any = None, *, settings: Any = None, **given: Any) -> Trainer:
    args = arguments(folder, **HOW | (settings or {}))
    kwargs = {"args": args, "config": CONFIG, "options": {"stage": "eager"}, "dynamic": True}
    return Trainer(
        model,
        args,
        data_collator=padded,
        train_dataset=samples(18),
        optimizer_cls_and_kwargs=(OptimizerFactory, kwargs | given.pop("kwargs", {})),
        **given,
    )


def test_it_trains_as_for_trainer_does(tmp_path, graphs):
    torch.manual_seed(0)
    done = by_factory(tmp_path / "a", huggingface.llama())
    done.train()
    assert graphs() == 1
    torch.manual_seed(0)
    args = arguments(tmp_path / "b", **HOW)
    other = trainer(huggingface.llama(), args, dynamic=True, options={"stage": "eager"})
    other.train_dataset = samples(18)
    other.train()
    assert logged(done, "loss") == logged(other, "loss")
    assert done.optimizer.optimizer.schedule.merges == 2


def test_it_takes_the_model_of_model_init_and_resumes_one_that_is_prepared(tmp_path):
    def made() -> torch.nn.Module:
        model = huggingface.llama()
        poetx.prepare(model, CONFIG)
        return model

    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = by_factory(tmp_path, model_init=made, settings=saving)
    whole.train()
    resumed = by_factory(tmp_path, model_init=made, settings=saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    late = by_factory(tmp_path, huggingface.llama(), settings=saving)
    with pytest.raises(
        IncompatibleStateError, match=r"call poetx_compile.prepare\(model, config\)"
    ):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_trainers_own_compilation_is_refused(tmp_path):
    model = huggingface.llama()
    args = arguments(tmp_path)
    args.torch_compile = True
    with pytest.raises(ConfigError, match="leave it out"):
        OptimizerFactory()(model, args, CONFIG)
    assert not any(True for _ in prepared_linears(model))
