"""Rotations of the merged form, simulated from dense gradients, to try what the package lacks.

With a dense gradient dW the skew gradients of all planes are known, ``dWᵀ W − Wᵀ dW`` of the inputs
and ``W dWᵀ − dW Wᵀ`` of the outputs, and not those of the blocks alone. Without options the losses
are those of `POETXMuon` with ``merge_interval=1`` but for rounding and the permutations that are
drawn; a test says so. Layers of one shape are stepped together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.baselines.adamw import BETAS
from poetx_compile import POETXConfig
from poetx_compile.layers.initialise import initialise
from poetx_compile.layers.permutation import chunk_size
from poetx_compile.ops.newton_schulz import newton_schulz
from poetx_compile.ops.orthogonalize import orthogonalize
from poetx_compile.ops.polynomial import polynomial

MUON_STEP = (3.4445, -4.7750, 2.0315)

EARLY = (1, 20)
"""Steps after which a subspace is taken before the first redraw: it begins by chance."""


class Side:
    """The rotations of the inputs (dim 2) or outputs (dim 1) of weights [N, n, m].

    Attributes:
        order: int64 [N, size], coordinates by block.
        basis: of ``planes="subspace"`` in place of `order`: [N, size, r], orthonormal columns.
        momentum: [N, blocks, b, b], skew.
    """

    def __init__(self, weights: Tensor, names: list[str], dim: int, owner: Variant):
        self.owner, self.dim, self.size = owner, dim, weights.shape[dim]
        o, device = owner.options, weights.device
        narrow = min(weights.shape[1:])
        b = o["wide_block"] or owner.block if self.size > narrow else owner.block
        self.b = min(b, self.size)
        self.blocks = self.size // self.b
        self.all = torch.arange(len(weights), device=device)[:, None, None, None]
        rates = [owner.rate_of(name, "in" if dim == 2 else "out") for name in names]
        self.rates = torch.tensor(rates, device=device)[:, None, None, None]
        self.basis: Tensor | None = None
        if o["planes"] == "subspace":
            self.b, self.blocks = round(math.sqrt(self.size * self.b)), 1  # as many planes
            start = torch.randn(len(weights), self.size, self.b, device=device)
            self.basis = torch.linalg.qr(start)[0]
        self.order = self.draw()
        self.momentum = torch.zeros(len(weights), self.blocks, self.b, self.b, device=device)
        self.fresh: tuple[Tensor, Tensor] | None = None

    def draw(self) -> Tensor:
        """Coordinates in a new order, in chunks as the package's."""
        count, device = len(self.all), self.all.device
        if self.b == self.size:
            return torch.arange(self.size, device=device).expand(count, -1)
        chunk = chunk_size(self.size, "chunked", self.owner.block)
        chunks = torch.rand(count, self.size // chunk, device=device).argsort(1)
        return (chunks[:, :, None] * chunk + torch.arange(chunk, device=device)).flatten(1)

    def _index(self, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = order[:, : self.blocks * self.b].view(-1, self.blocks, self.b)
        return self.all, at[..., :, None], at[..., None, :]

    def restricted(self, full: Tensor, order: Tensor) -> Tensor:
        """The blocks [N, blocks, b, b] of [N, size, size]."""
        if self.basis is not None:
            return (self.basis.mT @ full @ self.basis).unsqueeze(1)
        return full[self._index(order)]

    def gradient(self, weights: Tensor, gradients: Tensor) -> Tensor:
        """As the package's packed gradients, on both sides of the diagonal."""
        product = gradients.mT @ weights if self.dim == 2 else weights @ gradients.mT
        self.full = 2 * (product - product.mT)
        if self.owner.options["fresh"]:
            order = self.draw()
            self.fresh = order, self.restricted(self.full, order)
        return self.restricted(self.full, self.order)

    def direction(self, gradient: Tensor) -> Tensor:
        """The momentum, brought up to date, whitened."""
        o = self.owner.options
        self.momentum.lerp_(gradient, 1 - o["momentum"])
        ahead = gradient.lerp(self.momentum, o["nesterov"] or o["momentum"])
        direction = whitened(ahead, o["whitening"])
        if o["cautious"]:  # arXiv 2411.16085, at an equal norm
            mask = (direction * gradient > 0).to(direction.dtype)
            share = mask.mean((2, 3), keepdim=True).clamp_min(1e-3)
            direction = direction * mask / share.sqrt()
        if o["by_size"]:  # larger angles where gradients are larger, of an equal mean square
            sizes = _norm(ahead) ** o["by_size"]
            direction = direction * sizes / sizes.square().mean(1, keepdim=True).sqrt()
        return direction

    def turned(self, weights: Tensor, direction: Tensor, lr: float, order: Tensor) -> Tensor:
        """``R_outᵀ W`` or ``W R_inᵀ`` for the step ``−lr · direction``."""
        step = (-lr * self.rates * direction).flatten(0, 1)
        rotation = polynomial(step, 3).view_as(direction)
        w = weights if self.dim == 2 else weights.mT  # [N, other, size]; R_outᵀ W is (Wᵀ R_out)ᵀ
        r = rotation.mT if self.dim == 2 else rotation
        if self.basis is not None:
            inside = w @ self.basis
            w = w + (inside @ r[:, 0] - inside) @ self.basis.mT
        else:
            at = order[:, None, : self.blocks * self.b].expand(-1, w.shape[1], -1)
            blocks = w.gather(2, at).view(*w.shape[:2], self.blocks, self.b).transpose(1, 2)
            w = w.scatter(2, at, (blocks @ r).transpose(1, 2).reshape(at.shape))
        return w if self.dim == 2 else w.mT.contiguous()

    def redraw(self) -> None:
        """Other planes; the momentum of pairs that stay together stays."""
        if self.basis is not None:
            old, self.basis = self.basis, self._leading()
            turn = (self.basis.mT @ old).unsqueeze(1)
            self.momentum = turn @ self.momentum @ turn.mT
        elif self.b < self.size:
            full = torch.zeros_like(self.full)
            full[self._index(self.order)] = self.momentum
            self.order = self.draw()
            self.momentum = self.restricted(full, self.order)

    def _leading(self) -> Tensor:
        """A basis of where the last gradient is largest, and of chance for the rest."""
        chance = round(self.owner.options["chance"] * self.b)
        x = torch.randn(len(self.full), self.size, self.b - chance, device=self.full.device)
        for _ in range(3):
            x = torch.linalg.qr(self.full @ (self.full.mT @ x))[0]
        rest = torch.randn(len(x), self.size, chance, device=x.device)
        return torch.linalg.qr(torch.cat([x, rest], 2))[0]


class Variant(torch.optim.Optimizer):
    """The merged form on the weights of `layers`, AdamW on the rest, clipped together.

    Args:
        groups: of the rest; the first one's rate is not that of the rotations.
        layers: linears by name.
        lr: of the rotations.
        options: see `OPTIONS`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        layers: dict[str, nn.Linear],
        lr: float,
        config: POETXConfig,
        clip: float,
        options: dict[str, Any],
    ):
        self.options, self.block, self.clip, self.config = options, config.block_in, clip, config
        alike: dict[torch.Size, list[str]] = defaultdict(list)
        for name, module in layers.items():
            alike[module.weight.shape].append(name)
        self.stacks = [
            Stack({name: layers[name].weight for name in names}, self) for names in alike.values()
        ]
        gains = [g for s in self.stacks for g in s.gains.values()]
        groups = [*groups, *([{"params": gains, "weight_decay": 0.0}] if gains else [])]
        self.adamw = torch.optim.AdamW(groups, lr=groups[0]["lr"], betas=BETAS, fused=True)
        weights: list[Tensor] = [w for stack in self.stacks for w in stack.weights]
        super().__init__(
            [{"params": weights, "name": f"poetx b={self.block}", "lr": lr}, *groups], {}
        )
        # AdamW steps what it is given here: the same dicts, so that a rate reaches it.
        self.adamw.param_groups = self.param_groups[1:]
        for group in self.adamw.param_groups:
            for key, value in self.adamw.defaults.items():
                group.setdefault(key, value)
        self.number = 0

    def rate_of(self, name: str, side: str) -> float:
        """The product of the factors of ``rates`` that a side of a layer has."""
        own = (f for key, f in self.options["rates"].items() if key == side or name.endswith(key))
        return math.prod(own)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step. No closures."""
        found: list[tuple[Stack, list[tuple[Side, Tensor]]]] = []
        for stack in self.stacks:
            own = stack.gradients()
            found.append((stack, [(side, side.gradient(stack.inner, own)) for side in stack.sides]))
        rest = [p.grad for g in self.param_groups[1:] for p in g["params"] if p.grad is not None]
        squares = [g.square().sum() / 2 for _, sides in found for _, g in sides]  # of packed values
        squares += [n.square() for n in torch._foreach_norm(rest)]
        scale = (self.clip / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(rest, scale)
        lr, fresh = self.param_groups[0]["lr"], self.options["fresh"]
        for stack, sides in found:
            for side, gradient in sides:
                direction = side.direction(gradient * scale)
                stack.inner = side.turned(stack.inner, direction, lr, side.order)
                if side.fresh is not None:
                    order, now = side.fresh
                    stack.inner = side.turned(stack.inner, whitened(now, 0), fresh * lr, order)
        self.adamw.step()
        self.number += 1
        every = self.config.redraw_interval
        for stack in self.stacks:
            for side in stack.sides:
                early = side.basis is not None and self.number in EARLY
                if early or (every and self.number % every == 0):
                    side.redraw()
            stack.write()


class Stack:
    """Weights of one shape: ``gain_out · inner · gain_in``, what the model sees."""

    def __init__(self, weights: dict[str, Tensor], owner: Variant):
        self.weights: list[Tensor] = list(weights.values())
        for name, weight in weights.items():
            initialise(weight, owner.config)
            factors = (f for key, f in owner.options["scales"].items() if name.endswith(key))
            weight.data *= math.prod(factors)
        self.inner = torch.stack([w.detach() for w in self.weights])
        self.sides = [Side(self.inner, list(weights), dim, owner) for dim in (1, 2)]
        count, n, m = self.inner.shape
        shapes = {"out": (count, n, 1), "in": (count, 1, m)}
        device = self.inner.device
        self.gains = {
            side: nn.Parameter(torch.ones(shapes[side], device=device))
            for side in owner.config.gained_sides
        }

    def gradients(self) -> Tensor:
        """Of `inner` [N, n, m]; those of the gains go to them."""
        seen = torch.stack([w.grad for w in self.weights if w.grad is not None])
        for side, gain in self.gains.items():
            others = [g for other, g in self.gains.items() if other != side]
            without = math.prod(others, start=self.inner)  # type: ignore[call-overload]
            gain.grad = (seen * without).sum(2 if side == "out" else 1, keepdim=True)
        return math.prod(self.gains.values(), start=seen)  # type: ignore[call-overload]

    def write(self) -> None:
        """Let the model see the weights."""
        seen = math.prod(self.gains.values(), start=self.inner)  # type: ignore[call-overload]
        torch._foreach_copy_(self.weights, list(seen.unbind()))


def whitened(blocks: Tensor, steps: int) -> Tensor:
    """`orthogonalize`, or so many of Muon's steps at the same norm, which whiten less."""
    if not steps:
        return orthogonalize(blocks.flatten(0, 1)).to(blocks.dtype).view_as(blocks)
    x = newton_schulz((blocks / _norm(blocks)).flatten(0, 1), (MUON_STEP,) * steps).view_as(blocks)
    return x * (0.92 * math.sqrt(x.shape[-1]) / _norm(x))


def _norm(blocks: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(blocks, keepdim=True).clamp_min(1e-30)


OPTIONS: dict[str, Any] = {
    "momentum": 0.95,
    "nesterov": 0.0,  # share of the momentum in a step; 0 for that of the momentum itself
    "whitening": 0,  # steps of Muon's iteration; 0 for the package's
    "cautious": False,
    "by_size": 0.0,  # angle of a block ∝ its gradient's norm to this power
    "fresh": 0.0,  # rate of blocks of chance, others in each step, without momentum
    "planes": "blocks",  # or "subspace": one block, where the gradient is largest
    "chance": 0.0,  # of the subspace's directions
    "wide_block": 0,  # b of the sides that are wider than the others of their weight
    "rates": {},  # end of a name, "in" or "out" → factor
    "scales": {},  # end of a name → factor of the initial weights
}
"""What may be otherwise, and its default."""


def optimizer(
    model: nn.Module,
    *,
    lr: float,
    poetx_lr: float,
    weight_decay: float,
    clip: float,
    config: POETXConfig,
    **options: Any,
) -> Variant:
    """The variant of a model whose head is called ``lm_head``; its layers are initialised."""
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and not name.endswith("lm_head")
    }
    taken = {m.weight for m in layers.values()}
    rest = [p for p in model.parameters() if p not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]
    return Variant(groups, layers, poetx_lr, config, clip, OPTIONS | options)
