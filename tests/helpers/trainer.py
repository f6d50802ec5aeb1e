"""A Trainer of Hugging Face transformers with a tiny model and batches of different lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import poetx_compile as poetx
from poetx_compile.integrations.huggingface import for_trainer
from tests.helpers import huggingface

CONFIG = poetx.POETXConfig(block_size=8, merge_interval=3, redraw_interval=3)
AOT = {"stage": "aot_eager"}


def samples(count: int) -> list[dict[str, Tensor]]:
    """Token sequences of different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 10, (count,), generator=generator).tolist()
    high = huggingface.VOCABULARY
    return [{"input_ids": torch.randint(1, high, (n,), generator=generator)} for n in lengths]


def padded(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pads to the longest of a batch."""
    rows = [sample["input_ids"] for sample in batch]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return {"input_ids": tokens, "labels": labels, "attention_mask": (labels >= 0).long()}


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "learning_rate": 2e-2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**common | settings)


def trainer(model: nn.Module, args: TrainingArguments, **settings: Any) -> Trainer:
    settings = {"config": CONFIG, "options": AOT} | settings
    data = {"train_dataset": samples(38), "eval_dataset": samples(7), "data_collator": padded}
    return Trainer(**data, **for_trainer(model, args, **settings))


def logged(done: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in done.state.log_history if key in entry]
