"""AdamW on every parameter: `torch.optim.AdamW`, fused where that exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.95)


def optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, **options: Any
) -> torch.optim.Optimizer:
    """AdamW; weight decay for what has two dimensions or more."""
    settings: dict[str, Any] = {"betas": BETAS, "fused": True} | options
    return torch.optim.AdamW(groups(model, weight_decay), lr=lr, **settings)


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, everything else without; only what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
