"""Muon on the hidden matrices (`torch.optim.Muon`), AdamW on the rest, at one learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.quality.baselines.adamw import BETAS


class Pair(torch.optim.Optimizer):
    """Two optimisers as one: their groups together, both step."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer):
        self.parts = (first, second)
        super().__init__([g for part in self.parts for g in part.param_groups], {})
        # The parts step what they are given here: the same dicts, so that a rate reaches them.
        self.param_groups = [g for part in self.parts for g in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both; they share no parameters. No closures."""
        for part in self.parts:
            part.step()

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of both states."""
        return [
            value
            for part in self.parts
            for state in part.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]


def optimizer(model: nn.Module, *, lr: float, weight_decay: float, **options: Any) -> Pair:
    """Muon with ``match_rms_adamw``, so that AdamW's learning rates fit, and AdamW.

    Hidden matrices are the weights of `nn.Linear` but for the head, which like embeddings and
    norms is AdamW's (Jordan et al., 2024; arXiv 2502.16982).
    """
    hidden = [
        m.weight
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.rpartition(".")[2] != "lm_head"
    ]
    taken = set(hidden)
    rest = [p for p in model.parameters() if p.requires_grad and p not in taken]
    settings: dict[str, Any] = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"} | options
    adamw_groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    return Pair(
        torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, **settings),
        torch.optim.AdamW(adamw_groups, lr=lr, betas=BETAS, fused=True),
    )
