"""`clip_grad_norm_`: clipping by the norm, tighter for some steps after a merge."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from poetx_compile.errors import ConfigError
from poetx_compile.optim.schedule import schedule_of, unwrap_optimizer


def clip_grad_norm_(
    optimizer: Optimizer,
    max_norm: float,
    *,
    start: float = 0.1,
    ramp: int = 10,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the gradients of all parameters of an attached optimiser, between backward and step.

    The limit is `max_norm`, except after a redraw that reset the moments (``moments="reset"``):
    there the first steps have moments of a single gradient and turn far, so it rises linearly from
    `start` to `max_norm` over `ramp` steps (POET-X, arXiv 2603.05500: from 0.1, over 10). After
    any other merge it is `max_norm`. With a `GradScaler`, unscale the gradients first.

    Args:
        optimizer: one that merges: `POETXAdamW`, `POETXMuon`, or any after `attach` or `adopt`.
        max_norm: > 0, limit of the norm of all gradients together.
        start: > 0, limit in the first step after such a redraw, where it is below `max_norm`.
        ramp: steps after a redraw until the limit is `max_norm` again; 0 for no ramp.
        norm_type, error_if_nonfinite, foreach: as in `torch.nn.utils.clip_grad_norm_`.

    Returns:
        The norm before clipping, a scalar.

    Raises:
        ConfigError: the optimiser does not merge, or an argument is out of range.
    """
    optimizer = unwrap_optimizer(optimizer)
    schedule = schedule_of(optimizer)
    if schedule is None:
        raise ConfigError(
            f"{type(optimizer).__name__} merges nothing: call poetx_compile.attach(optimizer, "
            "model) first, or clip by torch.nn.utils.clip_grad_norm_"
        )
    for name, value in (("max_norm", max_norm), ("start", start)):
        if not value > 0:
            raise ConfigError(f"{name} = {value!r} is not allowed: use a number > 0")
    if ramp < 0:
        raise ConfigError(f"ramp = {ramp!r} is not allowed: use an int ≥ 0")
    limit = max_norm
    if schedule.config.moments == "reset" and schedule.last_redraw > 0:
        since = schedule.step - schedule.last_redraw
        if since < ramp:
            limit = min(max_norm, start + (max_norm - start) * since / ramp)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(
        parameters, limit, norm_type, error_if_nonfinite=error_if_nonfinite, foreach=foreach
    )
