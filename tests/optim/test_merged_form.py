"""``merge_interval=1`` turns plain weights in each step: the interval form merged by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from tests.helpers.merged import OPTIMISERS, B, data, net, step, weights

STEPS = 20


# --- the reference: plain torch, merged by hand --------------------------------------------------


POLYNOMIALS = (
    (8.3410, -24.5974, 18.2230),
    (3.9124, -2.8065, 0.5135),
    (3.3214, -2.4056, 0.4725),
    (2.1672, -1.5473, 0.3702),
)


class Muon:
    """Orthogonalised Nesterov momentum on packed skew blocks: outputs, inputs of each layer."""

    def __init__(self, parameters: list[Tensor], lr: float, period: int = 1):
        self.parameters, self.lr, self.period = parameters, lr, period
        self.momenta = [torch.zeros_like(p) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        rows, columns = torch.triu_indices(B, B, 1)
        self.steps += 1
        for i, (p, m) in enumerate(zip(self.parameters, self.momenta, strict=True)):
            if not p.numel():
                continue
            m += 0.05 * (p.grad - m)
            if (self.steps + i // 2 + (i % 2 == 0) * (self.period // 2)) % self.period:
                continue
            packed = 0.05 * p.grad + 0.95 * m
            x = p.new_zeros(len(p), B, B)
            x[:, rows, columns] = packed
            x = x - x.mT
            length = ((x @ x.mT).flatten(1).norm(dim=1) / 2**0.5).sqrt()
            x = x / (1.08 * length[:, None, None])
            for a, b, c in POLYNOMIALS:
                square = x @ x.mT
                x = a * x + (b * square + c * square @ square) @ x
            p -= self.lr * self.period * x[:, rows, columns]


REFERENCES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0),
    "POETXAdamW": lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0),
    "POETXMuon": lambda p: Muon(p, lr=0.02),
    "POETXMuon, turn_every": lambda p: Muon(p, lr=0.02, period=3),
}
DENSE = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "POETXAdamW": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    "POETXMuon": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
}
DENSE["POETXMuon, turn_every"] = DENSE["POETXMuon"]


def rotation(packed: Tensor, size: int) -> Tensor:
    """(I + Q)(I + Q + Q² + Q³) of all blocks as one matrix, the identity behind them."""
    rows, columns = torch.triu_indices(B, B, 1)
    q = torch.zeros(len(packed), B, B, dtype=packed.dtype)
    q = q.index_put((torch.arange(len(packed))[:, None], rows, columns), packed)
    q = q - q.mT
    eye = torch.eye(B, dtype=packed.dtype)
    blocks = (eye + q) @ (eye + q + q @ q + q @ q @ q)
    rest = torch.eye(size - B * len(packed), dtype=packed.dtype)
    return torch.block_diag(*blocks, rest)


def by_hand(name: str) -> tuple[list[float], list[Tensor]]:
    """Losses and final weights of the interval form, merged after every step."""
    model = net()
    order = [
        (e.perm_out.pair[0], e.perm_in.pair[0], e.blocks_out, e.blocks_in)
        for _, _, e in prepared_linears(model)
    ]
    stored = weights(model)
    biases = [model.k.bias.detach().clone(), model.out.bias.detach().clone()]
    for bias in biases:
        bias.requires_grad_()
    skews = [
        torch.zeros(blocks, B * (B - 1) // 2, dtype=torch.float64, requires_grad=True)
        for _, _, n, m in order
        for blocks in (n, m)
    ]
    rotations, dense = REFERENCES[name](skews), DENSE[name](biases)
    x, y = data()

    def effective() -> list[Tensor]:
        found = []
        for i, (rows, columns, _, _) in enumerate(order):
            s = stored[i][rows][:, columns]
            turned = (
                rotation(skews[2 * i], len(rows)).T @ s @ rotation(skews[2 * i + 1], len(columns)).T
            )
            found.append(turned[rows.argsort()][:, columns.argsort()])
        return found

    losses = []
    for _ in range(STEPS):
        for p in (*skews, *biases):
            p.grad = None
        q, k, out = effective()
        prediction = torch.tanh(x @ q.T) * (x @ k.T + biases[0]) @ out.T + biases[1]
        loss = (prediction - y).square().mean()
        loss.backward()
        rotations.step()
        dense.step()
        with torch.no_grad():
            stored = effective()
            for skew in skews:
                skew.zero_()
        losses.append(loss.item())
    return losses, stored


@pytest.mark.parametrize("stage", [None, "aot_eager"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_it_is_the_interval_form_merged_by_hand(name: str, stage: str | None) -> None:
    losses, stored = by_hand(name)
    assert losses[-1] < 0.9 * losses[0]
    model = net()
    optimizer = OPTIMISERS[name](model)
    forward: Any = model
    if stage is not None:
        forward = torch.compile(
            model, backend=poetx.poetx_backend, options={"stage": stage}, fullgraph=True
        )
    addresses = [stored_weight(m).data_ptr() for _, m, _ in prepared_linears(model)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for expected in losses:
            assert abs(step(model, optimizer, forward) - expected) < 1e-11
    for actual, expected in zip(weights(model), stored, strict=True):
        assert (actual - expected).abs().max() < 1e-11
    assert addresses == [stored_weight(m).data_ptr() for _, m, _ in prepared_linears(model)]
