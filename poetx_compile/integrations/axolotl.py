"""A plugin for axolotl: name it in the YAML file of a run, and nothing else changes.

    plugins:
      - poetx_compile.integrations.axolotl.POETXPlugin
    poetx:                # fields of POETXConfig
      block_size: 256
    poetx_optimizer: muon # or adamw, the paper's

Read against axolotl 0.19.0, where nothing calls a plugin's `create_optimizer`: the optimiser goes
in by `post_trainer_create`, as the Trainer's own argument `optimizer_cls_and_kwargs`.
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import nn

from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError
from poetx_compile.integrations.huggingface import OptimizerFactory
from poetx_compile.layers.prepare import prepare
from poetx_compile.optim import POETXAdamW, POETXMuon


class POETXArgs(BaseModel):
    """What the plugin adds to the YAML file: the configuration, the optimiser and its rate."""

    poetx: dict[str, Any] | None = None
    poetx_optimizer: Literal["muon", "adamw"] = "muon"
    poetx_lr: float | None = None
    poetx_options: dict[str, Any] | None = None


class POETXPlugin(BasePlugin):
    """Prepares the model where axolotl has loaded it, and makes the Trainer's optimiser."""

    def get_input_args(self) -> str:
        return f"{POETXArgs.__module__}.{POETXArgs.__qualname__}"

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Prepare; `ConfigError` beside an adapter, whose weights would be rotated."""
        if cfg.adapter:
            raise ConfigError(f"adapter: {cfg.adapter}: remove it, or the POET-X plugin")
        prepare(model, POETXConfig.from_dict(dict(cfg.poetx or {})))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Let the Trainer make the optimiser by `OptimizerFactory`, instead of ``optimizer:``."""
        given = {"poetx_lr": cfg.poetx_lr} if cfg.poetx_lr is not None else {}
        optimizer = POETXAdamW if cfg.poetx_optimizer == "adamw" else POETXMuon
        trainer.optimizer_cls_and_kwargs = (
            OptimizerFactory,
            {"optimizer": optimizer, "options": cfg.poetx_options, **given},
        )
