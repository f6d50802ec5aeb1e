"""One small training run, as one process does it and as several do, for the checks to compare."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import poetx_compile as poetx
from poetx_compile.distributed import shards
from poetx_compile.inspect.diagnostics import diagnostics
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers.models import SwiGLU, TinyLM
from tests.helpers.tolerances import assert_close

COMPILED = {"backend": poetx.poetx_backend, "options": {"stage": "aot_eager"}}
SEQUENCES = 4
"""In a batch of all processes."""


def build(
    dtype: torch.dtype = torch.float32, layers: int = 1, small: bool = False, **fields: Any
) -> nn.Module:
    """A prepared model, the same in every process; two merges in five steps.

    Blocks of seven linears; a `small` one has one of three, for what compiles.
    """
    torch.manual_seed(0)
    model = TinyLM(layers=layers)
    if small:
        model.layers = nn.ModuleList([SwiGLU()])
    model.to(dtype)
    config = {"block_size": 8, "merge_interval": 2, "redraw_interval": 2, "max_angle": None}
    config |= {"variant": "mem", "gains": "both"}
    poetx.prepare(model, poetx.POETXConfig(**{**config, **fields}))
    return model


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return poetx.POETXMuon(model, lr=5e-3)


def muon8(model: nn.Module) -> torch.optim.Optimizer:
    return poetx.POETXMuon(model, lr=5e-3, momentum_dtype="int8")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return poetx.POETXAdamW(model, lr=5e-3)


def attached(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(poetx.param_groups(model, lr=5e-3), foreach=True)
    poetx.attach(optimizer, model)
    return optimizer


def adopted(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    poetx.adopt(optimizer, model)
    return optimizer


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def batch(step: int) -> Tensor:
    """Tokens of all processes: int64 [SEQUENCES, 9]."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 24, (SEQUENCES, 9), generator=generator)


def loss_of(forward: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    logits = forward(tokens[:, :-1]).flatten(0, 1).float()
    return F.cross_entropy(logits, tokens[:, 1:].flatten())


def train(
    forward: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: range = range(5),
    alone: bool = False,
) -> list[float]:
    """The loss of the whole batch at each step; each process takes its part, one `alone` all."""
    parts = 1 if alone else world()
    size = SEQUENCES // parts
    losses = []
    for step in steps:
        start = 0 if alone else rank() * size
        loss = loss_of(forward, batch(step)[start : start + size])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.detach().clone()
        if not alone and world() > 1:
            dist.all_reduce(value)
        losses.append(value.item() / parts)
    return losses


@functools.cache
def alone(make: Callable[[nn.Module], Any] = muon, steps: int = 5, **fields: Any) -> list[float]:
    """The losses of one process."""
    model = build(**fields)
    return train(model, make(model), range(steps), alone=True)


def assert_alike(losses: list[float], expected: list[float], dtype=torch.float32) -> None:
    """Two runs have the same losses, within the rounding of `dtype`."""
    actual, wanted = torch.tensor(losses).double(), torch.tensor(expected).double()
    assert_close(actual, wanted, dtype, f"{losses} against {expected}")
    assert abs(losses[-1] - losses[0]) > 0.01, f"nothing was learnt: {losses}"


def digest(model: nn.Module) -> str:
    """A hash of every parameter and buffer, whole."""
    result = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        result.update(name.encode())
        result.update(
            shards.whole(tensor).contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return result.hexdigest()


def same_everywhere(value: Any) -> bool:
    """Whether all processes have an equal value."""
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return all(v == value for v in values)


class Collectives(TorchDispatchMode):
    """Records the collectives that run inside: (name, number of elements they reduce or gather)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.calls.append((func._schema.name.split("::")[1], max(map(Tensor.numel, tensors))))
        return func(*args, **(kwargs or {}))


@contextmanager
def raises(error: type[BaseException], words: str) -> Iterator[None]:
    """As `pytest.raises`; an error that Dynamo wrapped counts by its cause."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        yield
    found: BaseException | None = caught.value
    while found is not None and not isinstance(found, error):
        found = found.__cause__ or found.__context__
    assert found is not None, f"no {error.__name__}, but {caught.value!r}"
    assert words in str(found), str(found)


def assert_early_merges_as_alone(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """The angle guard merges at the same steps as in one process, in all processes alike."""
    fields: dict[str, Any] = {"merge_interval": 100, "redraw_interval": None, "max_angle": 0.05}
    runs = []
    for single in (False, True):
        model = build(**fields)
        forward = model if single else wrap(model)
        optimizer = muon(forward)
        steps = []
        for step in range(8):
            train(forward, optimizer, range(step, step + 1), alone=single)
            schedule = optimizer.schedule
            merges = schedule.merges, schedule.redraws, prepared_draw(model)
            steps.append((merges, schedule.angle, diagnostics(forward)))
        assert schedule.early_merges >= 2
        runs.append(steps)
    assert same_everywhere(runs[0])
    for (merges, angle, figures), other in zip(*runs, strict=True):
        merges_alone, angle_alone, figures_alone = other
        assert merges == merges_alone
        assert abs(angle - angle_alone) < 1e-4
        for key, value in figures.items():
            assert abs(value - figures_alone[key]) < 1e-4, key
    assert max(figures["angle_mean"] for _, _, figures in runs[0]) > 0.01


def prepared_draw(model: nn.Module) -> int:
    (draw,) = {e.draw for _, _, e in prepared_linears(model)}
    return draw
