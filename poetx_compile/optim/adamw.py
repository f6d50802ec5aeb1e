"""`POETXAdamW`: the paper's optimiser, `torch.optim.AdamW` with merges in `step()`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from poetx_compile.config import POETXConfig
from poetx_compile.optim.groups import ensure_prepared, param_groups
from poetx_compile.optim.schedule import MergeSchedule, attach

# Without torch's wrappers: the hooks of all optimisers shall see one step, not one for each batch.
adamw_step = inspect.unwrap(torch.optim.AdamW.step)


class POETXAdamW(torch.optim.AdamW):
    """AdamW over the skew parameters and the dense ones, which merges the rotations in `step()`.

    Param groups are those of `param_groups`: real torch groups with names, for any scheduler.

    Args:
        model: prepared here, with `config`, if nobody has; compiled or not.
        lr: learning rate of the dense parameters.
        poetx_lr: of the skew parameters; default ``lr · 64/b``.
        config: ``None``, or the configuration of the model.
        betas, eps: as in `torch.optim.AdamW`.
        weight_decay: of dense parameters with two dimensions or more; all others have none.
        fused: default: the fused kernel where every parameter is on a CUDA device.
        adamw: further arguments of `torch.optim.AdamW`.

    Attributes:
        schedule: the `MergeSchedule`.

    Raises:
        ConfigError: `config` is not the one the model was prepared with.
    """

    schedule: MergeSchedule
    poetx_rule = "adamw"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        poetx_lr: float | None = None,
        config: POETXConfig | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool | None = None,
        **adamw: Any,
    ):
        model = ensure_prepared(model, config)
        groups = param_groups(model, lr=lr, poetx_lr=poetx_lr, weight_decay=weight_decay)
        super().__init__(
            groups,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=fusible(groups) if fused is None and not adamw.get("foreach") else fused,
            **adamw,
        )
        self.schedule = attach(self, model, config)
        self.schedule.compile_early()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; with a closure it is called first, with gradients enabled, and returned."""
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            schedule = getattr(self, "schedule", None)  # a copy for a trial has none
            if schedule is None or schedule.turner is None:
                return adamw_step(self, closure)
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            schedule.turn_by_batches(self, lambda: adamw_step(self))
            return loss


def fusible(groups: Iterable[dict[str, Any]]) -> bool | None:
    """``True`` where every parameter is on CUDA, else ``None``: torch's own choice."""
    parameters = [p for group in groups for p in group["params"]]
    return True if parameters and all(p.is_cuda for p in parameters) else None
