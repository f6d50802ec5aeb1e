"""The plugin in axolotl's own manager and trainer, whose pins keep it out of the `test` extra."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from datasets import Dataset

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers import huggingface

PLUGIN = "poetx_compile.integrations.axolotl.POETXPlugin"


def test_the_plugin_trains_as_the_yaml_file_says(tmp_path: Path):
    pytest.importorskip("axolotl", reason="pins other versions: axolotl")
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    manager = PluginManager.get_instance()
    manager.register(PLUGIN)
    module, name = manager.get_input_args()[-1].rsplit(".", 1)
    given = {
        "poetx": {"block_size": 8, "merge_interval": 2},
        "poetx_lr": 3e-3,
        "poetx_options": {"stage": "eager"},
    }
    cfg = DictDefault(getattr(importlib.import_module(module), name)(**given).model_dump())
    model = huggingface.llama()
    manager.cfg = cfg
    manager.post_model_load(cfg, model)
    args = AxolotlTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, report_to="none", use_cpu=True
    )
    rows = {k: v.repeat(12, 1).tolist() for k, v in huggingface.inputs(huggingface.llama).items()}
    data = Dataset.from_dict(rows).with_format("torch")
    trainer = AxolotlTrainer(model=model, args=args, train_dataset=data)
    manager.post_trainer_create(cfg, trainer)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is poetx.POETXMuon
    assert optimizer.schedule.merges == 1
    assert {g["name"]: g["initial_lr"] for g in optimizer.param_groups}["poetx b=8"] == 3e-3
    assert all(e.skew_in.abs().max() > 0 for _, _, e in prepared_linears(trainer.model))
    poetx.merge_and_unload(trainer.model)
    assert not any("parametrizations" in name for name in trainer.model.state_dict())

    with pytest.raises(ConfigError, match="adapter: lora"):
        manager.post_model_load(DictDefault(adapter="lora"), huggingface.llama())
