"""One optimiser step of both copies, with the gradients of the eager one, and what it may move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import poetx_compile as poetx
from poetx_compile.optim.schedule import schedule_of
from tests.helpers.tolerances import tolerance
from tests.play.invariants import (
    close,
    gradient_scale,
    no_gradients_where_none_belong,
    require,
    trained,
)
from tests.play.world import PRODUCTS, SHARED, Copy, World, loss_of


def shared(world: World) -> Sequence[Any]:
    return SHARED if world.setup.shared else ()


def backward(copy: Copy, batches: Sequence[Tensor]) -> Tensor:
    """Accumulate the mean gradient of the batches; the last loss."""
    loss = torch.zeros(())
    for tokens in batches:
        loss = loss_of(copy.run(tokens), tokens)
        (loss / len(batches)).backward()
    return loss.detach()


def drop_gradients_of_nobody(copy: Copy) -> None:
    """Parameters of a group that was deleted take gradients, and no optimiser zeroes them.

    Rotations do not count: they are in a group wherever they are trained.
    """
    held = {id(p) for group in copy.optimizer.param_groups for p in group["params"]}
    for name, p in copy.model.named_parameters():
        if id(p) not in held and ".parametrizations." not in name:
            p.grad = None


def backward_if(copy: Copy, world: World) -> None:
    """A backward, where something trains."""
    if trained(copy):
        backward(copy, [world.batch()])


def step(
    world: World,
    micro: int,
    clip: str | None,
    closure: bool,
    zeros: bool,
    batches: Sequence[Tensor] | None = None,
) -> None:
    """A step of both copies, checked."""
    batches = batches or [world.batch() for _ in range(micro)]
    allowed = PRODUCTS * tolerance(world.dtype)
    losses: list[Tensor] = []
    gradients: dict[str, Tensor] = {}

    def work(copy: Copy) -> Tensor:
        copy.optimizer.zero_grad(set_to_none=not zeros)
        drop_gradients_of_nobody(copy)
        losses.append(backward(copy, batches))
        no_gradients_where_none_belong(copy, after_backward=True)
        named = {n: p for n, p in copy.model.named_parameters() if p.grad is not None}
        if copy is world.eager:
            gradients.update({n: p.grad.clone() for n, p in named.items()})
        else:
            require(named.keys() == gradients.keys(), "compiled: gradients of other parameters")
            scale = gradient_scale(gradients, world.dtype)
            for name, p in named.items():
                what = f"compiled: gradient of {name}"
                close(p.grad, gradients[name], 2 * allowed, what, scale)
                p.grad.copy_(gradients[name])
        if clip == "poetx" and world.kind != "dense":
            poetx.clip_grad_norm_(copy.optimizer, 0.5)
        elif clip is not None:
            torch.nn.utils.clip_grad_norm_(copy.model.parameters(), 0.5)
        return losses[-1]

    for copy in world.copies:
        before = None
        if closure:
            work(copy)  # an adopted model has its rotations from here on
            before = _Before(copy)
            losses.clear() if copy is world.eager else losses.pop()
            copy.optimizer.step(lambda copy=copy: work(copy))
        else:
            work(copy)
            before = _Before(copy)
            copy.optimizer.step()
        before.check(world)
        if copy.scheduler is not None:
            copy.scheduler.step()
        copy.optimizer.zero_grad()
    close(losses[1], losses[0], allowed, "compiled: loss")


def _merges(copy: Copy) -> int:
    """How often its optimiser has merged all of its layers, or drawn their permutations again."""
    schedule = schedule_of(copy.optimizer)
    return 0 if schedule is None else schedule.merges + schedule.redraws


class _Before:
    """A copy before a step: `check` tells what has moved and should not have, or the reverse."""

    def __init__(self, copy: Copy):
        self.copy, self.merges = copy, _merges(copy)
        self.values = {n: p.detach().clone() for n, p in copy.model.named_parameters()}
        self.buffers = {n: b.clone() for n, b in copy.model.named_buffers()}

    def check(self, world: World) -> None:
        copy, merged = self.copy, _merges(self.copy) != self.merges
        rates = {p: float(g["lr"]) for g in copy.optimizer.param_groups for p in g["params"]}
        turned = {
            name: any(
                rates.get(s, 0.0) > 0 and s.grad is not None and bool(s.grad.any()) for s in e.skews
            )
            for name, _, e in copy.layers()
            if e.merged
        }
        for name, p in copy.model.named_parameters():
            moved = not torch.equal(p, self.values[name])
            layer, _, part = name.partition(".parametrizations.weight.")
            # A step of the merged form turns the weight, and its rotations are zero.
            if layer in turned and (part == "original" or "skew_" in part):
                if part != "original":
                    require(not p.any(), f"{copy.name}: {name} is not zero")
                elif p.dtype != torch.bfloat16 or not turned[layer]:
                    require(moved == turned[layer], f"{copy.name}: {name} moved: {moved}")
                continue
            if merged and ".parametrizations.weight." in name:
                continue  # checked where it was merged
            trains = rates.get(p, 0.0) > 0 and p.grad is not None and bool(p.grad.any())
            # The step of a dense parameter may be lost in the rounding of bf16.
            if trains and p.dtype != torch.bfloat16:
                require(moved, f"{copy.name}: {name} trains and has not moved")
            if not p.requires_grad or not rates.get(p):
                require(not moved, f"{copy.name}: {name} moved and should not")
        for name, buffer in copy.model.named_buffers():
            if not (merged and ".parametrizations." in name):
                require(torch.equal(buffer, self.buffers[name]), f"{copy.name}: {name} moved")
