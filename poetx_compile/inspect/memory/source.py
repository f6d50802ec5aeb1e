"""What `estimate` is given: a module, a Hugging Face configuration, or a path to one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from poetx_compile.errors import ConfigError, EstimateError
from poetx_compile.inspect.memory.meta import copied
from poetx_compile.layers.eligibility import unwrap_compiled


def model_on_meta(source: Any) -> nn.Module:
    """The model on the meta device, in training mode, with nothing of `source` changed.

    Args:
        source: an `nn.Module`; a `transformers.PretrainedConfig`; the path of a ``config.json`` or
            of the folder it is in.

    Raises:
        ConfigError: there is no such file, or it is not the configuration of a model.
        EstimateError: transformers is not installed, or has no such model.
    """
    if isinstance(source, nn.Module):
        model = copied(unwrap_compiled(source))
    elif isinstance(source, str | Path):
        model = from_config(read_config(Path(source)))
    elif hasattr(source, "model_type") and hasattr(source, "to_dict"):
        model = from_config(source)
    else:
        raise ConfigError(
            f"a {type(source).__name__} is no model: give an nn.Module, a Hugging Face "
            "configuration, or the path of a config.json"
        )
    return model.train()


def checkpoint_layers(model: nn.Module) -> None:
    """Have a model of transformers checkpoint its layers, as the Trainer does where it is asked to.

    Raises:
        ConfigError: the model has no switch for it.
    """
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new and old
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise ConfigError(
            f"checkpointing=True: {type(model).__name__} has no switch for it. Use "
            "torch.utils.checkpoint in the model itself"
        )
    enable({"use_reentrant": False})


def read_config(path: Path) -> Any:
    """The Hugging Face configuration in a file, or in ``config.json`` of a folder."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"there is no file {file}: give the path of a Hugging Face config.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{file} is not JSON ({error}): give a Hugging Face config.json"
        ) from error
    kind = values.pop("model_type", None) if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise ConfigError(
            f"{file} has no model_type: it is not a Hugging Face configuration. Give the nn.Module "
            "for a model of your own, or --factory module:function on the command line"
        )
    transformers = _transformers()
    try:
        return transformers.AutoConfig.for_model(kind, **values)
    except (ValueError, KeyError) as error:
        raise EstimateError(
            f"transformers {transformers.__version__} has no model of type {kind!r}: install a "
            "version that has, or give the nn.Module"
        ) from error


def from_config(config: Any) -> nn.Module:
    """The architecture that a Hugging Face configuration names, or its language model."""
    transformers = _transformers()
    (name, *_) = getattr(config, "architectures", None) or ("",)
    architecture = getattr(transformers, name, None) if name else None
    with torch.device("meta"):
        if architecture is not None:
            return architecture._from_config(config)
        try:
            return transformers.AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise EstimateError(
                f"the configuration names no architecture that transformers "
                f"{transformers.__version__} has ({name or 'none'}), and "
                f"{type(config).__name__} has no language model: give the nn.Module"
            ) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EstimateError(
            "a Hugging Face configuration needs transformers: install it, or give the nn.Module"
        ) from error
    return transformers
