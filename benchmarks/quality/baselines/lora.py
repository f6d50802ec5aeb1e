"""A low-rank run: frozen weights and ``B A`` of rank r beside them (LoRA), merged every so often
(ReLoRA, arXiv 2307.05695). Everything that is no hidden matrix trains in full, as with POET-X.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.baselines import adamw

REWARM = 10
"""Steps over which the rate rises again after a restart."""


class LowRankLinear(nn.Module):
    """``x (W + B A)ᵀ`` with W frozen; B is zero at first, so that nothing changes.

    Args:
        linear: without a bias; its weight is taken over.
        rank: r; A is [r, in], B is [out, r].
    """

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.frozen = linear.weight.requires_grad_(False)
        out_features, in_features = self.frozen.shape
        self.a = nn.Parameter(self.frozen.new_empty(rank, in_features))
        self.b = nn.Parameter(self.frozen.new_empty(out_features, rank))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """A as `nn.Linear` starts, B zero."""
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.b.zero_()

    @torch.no_grad()
    def merge(self) -> None:
        """Add ``B A`` to the weight, and start again."""
        self.frozen += self.b @ self.a
        self.reset()

    @property
    def weight(self) -> Tensor:
        """The weight that is applied, [out, in]."""
        return self.frozen + self.b @ self.a

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.frozen) + F.linear(F.linear(x, self.a), self.b)


def prepare(model: nn.Module, rank: int) -> list[LowRankLinear]:
    """Replace every `nn.Linear` of `model` but ``lm_head``, in place."""
    found = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                found.append(LowRankLinear(child, min(rank, *child.weight.shape)))
                setattr(parent, name, found[-1])
    return found


def optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, **options: Any
) -> torch.optim.Optimizer:
    """AdamW on what is trained."""
    return adamw.optimizer(model, lr=lr, weight_decay=weight_decay, **options)


class Restarts:
    """Merges every `interval` steps, with fresh moments and a rate that rises again.

    The paper drops most of the moments; here all of A's and B's start at zero.
    """

    def __init__(
        self, layers: list[LowRankLinear], optimizer: torch.optim.Optimizer, interval: int | None
    ):
        self.layers, self.optimizer, self.interval = layers, optimizer, interval

    def after(self, step: int, steps: int) -> None:
        """After optimiser step `step`, counted from 1: merge where it is time, not at the end."""
        if self.interval is None or step % self.interval or step >= steps:
            return
        for layer in self.layers:
            layer.merge()
            for p in (layer.a, layer.b):
                self.optimizer.state.pop(p, None)

    def rate(self, step: int) -> float:
        """Share of the scheduled rate at `step`, counted from 0."""
        if self.interval is None or step < self.interval:
            return 1.0
        return min(1.0, (step % self.interval + 1) / REWARM)


@torch.no_grad()
def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights as the plain model names them."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    state = {
        name: value
        for name, value in model.state_dict().items()
        if name.rpartition(".")[0] not in layers
    }
    return state | {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}
