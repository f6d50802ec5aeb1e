"""SCALE (arXiv 2506.16659): column-normalised SGD, with momentum on the head alone.

Written after the paper and its authors' published settings: each output unit's gradient is divided
by its root mean square (of an embedding: each feature's, over the vocabulary); the head's gradient
is averaged first; vectors are Adam's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-8
_ADAM = ("exp_avg", "exp_avg_sq")


class Scale(torch.optim.Optimizer):
    """SCALE over groups with ``kind``: ``"matrix"``, ``"embedding"``, ``"head"``, ``"vector"``."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step. No closures."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(self._direction(group, p, p.grad), alpha=group["lr"])

    def _direction(self, group: dict[str, Any], p: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[p]
        if group["kind"] == "vector":
            if not state:
                state.update({name: torch.zeros_like(p) for name in _ADAM}, step=0)
            state["step"] += 1
            first, second = group["betas"]
            mean = state["exp_avg"].lerp_(gradient, 1 - first) / (1 - first ** state["step"])
            square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - second)
            return mean / ((square / (1 - second ** state["step"])).sqrt() + EPS)
        if group["kind"] == "head":
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            gradient = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        axis = 0 if group["kind"] == "embedding" else 1
        return gradient / gradient.square().mean(axis, keepdim=True).sqrt().clamp_min(EPS)


def optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, **options: Any
) -> torch.optim.Optimizer:
    """SCALE on `model`, whose head is called ``lm_head``."""
    kinds: dict[str, list[Tensor]] = {"matrix": [], "embedding": [], "head": [], "vector": []}
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, p in model.named_parameters():
        if p.ndim < 2:
            kinds["vector"].append(p)
        elif p in embeddings:
            kinds["embedding"].append(p)
        else:
            kinds["head" if name.endswith("lm_head.weight") else "matrix"].append(p)
    groups = [
        {"params": found, "kind": kind, "weight_decay": 0.0 if kind == "vector" else weight_decay}
        for kind, found in kinds.items()
        if found
    ]
    return Scale(groups, lr, **options)
