"""Prepared language models with our optimisers, and their training steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers.models import TinyLM

both = pytest.mark.parametrize("optimizer_class", [poetx.POETXAdamW, poetx.POETXMuon])


def build(optimizer_class, model: nn.Module | None = None, lr: float = 1e-3, **fields) -> Any:
    """(model, optimiser) over a prepared model."""
    model = TinyLM(layers=1) if model is None else model
    kwargs = {k: fields.pop(k) for k in ("poetx_lr", "fused") if k in fields}
    interval = fields.get("merge_interval", 200)
    fields = {"block_size": 8, "max_angle": None, "redraw_interval": interval, **fields}
    return model, optimizer_class(model, lr=lr, config=poetx.POETXConfig(**fields), **kwargs)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 24, (4, 9), generator=generator)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def draw(model: nn.Module) -> int:
    """The draw of the permutations, the same one in every layer."""
    (value,) = {e.draw for _, _, e in prepared_linears(model)}
    return value
