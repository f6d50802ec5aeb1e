"""A prepared model that is saved by `save_pretrained`: told that nobody else can read the result.

`from_pretrained` takes the stored weights and packed rotations for nothing it knows, and fills the
weights with random values. A Trainer resumes from such a folder, so it is written all the same; of
the folders that it names ``checkpoint-<step>``, which serve nothing else, nothing is said.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn

from poetx_compile.layers.prepared import prepared_linears

log = logging.getLogger("poetx_compile")

_NAME = "save_pretrained"
_TOLD = "_poetx_told_of_saving"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
"""The Trainer's name of a folder to resume from."""


def watch_saving(model: nn.Module) -> None:
    """Have `model.save_pretrained` warn, where it has one and is prepared."""
    if hasattr(type(model), _NAME) and _NAME not in vars(model):
        setattr(model, _NAME, MethodType(save_pretrained, model))


def unwatch_saving(model: nn.Module) -> None:
    """Give a model that is plain again its own method."""
    method = vars(model).get(_NAME)
    if getattr(method, "__func__", None) is save_pretrained:
        delattr(model, _NAME)
    vars(model).pop(_TOLD, None)


def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The method of the model's class, after a word where what it writes is not plain."""
    warn_of_saving(model, *args, **kwargs)
    return type(model).save_pretrained(model, *args, **kwargs)


def warn_of_saving(
    model: nn.Module,
    save_directory: str | os.PathLike[str] = "",
    *_: Any,
    state_dict: Mapping[str, Any] | None = None,
    **__: Any,
) -> None:
    """Say once that the state of a prepared model is no plain model.

    Takes the arguments of `save_pretrained`. Says nothing of a plain `state_dict`, nor of a
    checkpoint of the Trainer.
    """
    if state_dict is not None and not any(".parametrizations." in f".{n}" for n in state_dict):
        return
    if _CHECKPOINT.fullmatch(os.path.basename(os.path.normpath(save_directory))):
        return
    if vars(model).get(_TOLD) or next(iter(prepared_linears(model)), None) is None:
        return
    vars(model)[_TOLD] = True
    log.warning(
        "save_pretrained writes the state that training resumes from, which from_pretrained cannot "
        "read: it would fill %s with random weights. Use poetx_compile.save_pretrained(model, "
        "folder) for a plain model",
        type(model).__name__,
    )
