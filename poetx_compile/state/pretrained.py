"""`save_pretrained`: a prepared Hugging Face model as a plain one, and its configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from poetx_compile.errors import ConfigError
from poetx_compile.layers.eligibility import unwrap_compiled
from poetx_compile.layers.prepare import config_of
from poetx_compile.state.files import write_atomically
from poetx_compile.state.plain import plain_state_dict

CONFIG_FILE = "poetx_config.json"


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], **kwargs: Any) -> Path:
    """Write a model of transformers to `folder` with plain weights; it trains on as it is.

    ``AutoModelForCausalLM.from_pretrained(folder)`` reads it in a process that has never heard of
    this package. The configuration of POET-X, by which the model may be prepared again, is in
    ``poetx_config.json`` beside it: ``POETXConfig.from_dict(json.loads(...))``.

    Args:
        model: of transformers (it has a `save_pretrained`), prepared or not, compiled or not.
        kwargs: of the model's own `save_pretrained`; a ``state_dict`` may be a gathered one.

    Returns:
        The folder.

    Raises:
        ConfigError: the model has no `save_pretrained`.
        IncompatibleStateError: the model is sharded: gather its state (docs/how-to/export.md).
        InterruptedMergeError: a merge was cut off.
    """
    inner: Any = unwrap_compiled(model)
    if not hasattr(inner, "save_pretrained"):
        raise ConfigError(
            f"a {type(inner).__name__} has no save_pretrained: save what "
            "poetx_compile.plain_state_dict(model) gives"
        )
    source = kwargs.pop("state_dict", None)
    state = plain_state_dict(inner if source is None else source)
    folder = Path(folder)
    type(inner).save_pretrained(inner, folder, state_dict=state, **kwargs)
    config = config_of(inner)
    if config is not None and kwargs.get("is_main_process", True):
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        write_atomically(
            folder / CONFIG_FILE, lambda temporary: Path(temporary).write_text(text, "utf-8")
        )
    return folder
