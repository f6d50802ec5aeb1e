"""A small model of the merged form (``merge_interval=1``), its optimisers and a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears, stored_weight

B = 5


class Net(nn.Module):
    """Two layers that share an input, odd sizes, a side of size 1, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(13, 21, bias=False), nn.Linear(13, 21)
        self.out = nn.Linear(21, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q(x)) * self.k(x))


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 13, generator=generator, dtype=torch.float64)
    return x.to(dtype), x[:, :1].sin().to(dtype)


def net(dtype: torch.dtype = torch.float64, **fields: Any) -> Net:
    torch.manual_seed(0)
    model = Net().to(dtype)
    fields = {"block_size": B, "merge_interval": 1, "exclude_modules": (), **fields}
    poetx.prepare(model, poetx.POETXConfig(**fields))
    return model


def attached(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        groups = poetx.param_groups(model, lr=0.01, poetx_lr=0.02, weight_decay=0.0)
        optimizer = kind(groups, lr=0.01, **options)
        poetx.attach(optimizer, model)
        return optimizer

    return make


def ours(kind: Any, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: kind(model, lr=0.01, poetx_lr=0.02, weight_decay=0.0, **options)


OPTIMISERS = {
    "SGD": attached(torch.optim.SGD, momentum=0.9),
    "AdamW": attached(torch.optim.AdamW),
    "POETXAdamW": ours(poetx.POETXAdamW),
    "POETXMuon": ours(poetx.POETXMuon),
    "POETXMuon, turn_every": ours(poetx.POETXMuon, turn_every=3),
}


def step(model: nn.Module, optimizer: Any, forward: Any = None, factor: float = 1.0) -> Tensor:
    x, y = data(next(model.parameters()).dtype)
    optimizer.zero_grad()
    loss = ((model if forward is None else forward)(x) - y).square().mean() * factor
    loss.backward()
    optimizer.step()
    return loss.detach()


def weights(model: nn.Module) -> list[Tensor]:
    return [stored_weight(m).detach().clone() for _, m, _ in prepared_linears(model)]
