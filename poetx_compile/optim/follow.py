"""Param groups of rotations that follow a group of the user's: its options, and a rate in a ratio.

The group that is followed carries a number (`GROUP`), and the other one the same number
(`FOLLOWS`), so that groups may be removed, inserted, reordered and saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from poetx_compile.errors import ConfigError
from poetx_compile.optim.groups import RATIO

GROUP = "poetx_group"
"""Key of a user's group that is followed: its number among these."""

FOLLOWS = "poetx_follows"
"""Key of a group of ours: the number of the user's group that it follows."""

KEPT = "poetx_kept"
"""Key of a group of ours: the options it does not take from the group it follows."""

_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Options that are learning rates; all but the first are kept in the groups by schedulers."""


def number(optimizer: Optimizer, group: dict[str, Any]) -> int:
    """The number of a user's group, given to it here if it has none: its position, while free."""
    groups = optimizer.param_groups
    if GROUP not in group:
        taken = {g[GROUP] for g in groups if GROUP in g}
        position = next(i for i, g in enumerate(groups) if g is group)
        group[GROUP] = position if position not in taken else max(taken) + 1
    return group[GROUP]


def followed(optimizer: Optimizer, ours: dict[str, Any]) -> dict[str, Any]:
    """The user's group that a group of ours follows.

    Raises:
        ConfigError: it was removed, or copied.
    """
    found = [g for g in optimizer.param_groups if g.get(GROUP) == ours[FOLLOWS]]
    if len(found) != 1:
        raise ConfigError(
            f"the param group {ours.get('name')!r} of rotations follows the group with "
            f"{GROUP} = {ours[FOLLOWS]}, which {len(found)} groups have. Where that group was "
            f"removed, remove the group of rotations too, or delete its key {FOLLOWS!r} to give it "
            f"a rate of its own; where it was copied, delete the key {GROUP!r} of the copy"
        )
    return found[0]


@torch.no_grad()
def follow(ours: dict[str, Any], group: dict[str, Any]) -> None:
    """Bring a group of ours up to date with the user's group that it follows."""
    for key, value in group.items():
        if key in ("params", "param_names", "name", *ours[KEPT]) or key.startswith("poetx_"):
            continue
        if key not in _RATES:
            ours[key] = value
        elif isinstance(ours.get(key), Tensor):
            ours[key].copy_(value * ours[RATIO])
        else:
            ours[key] = value * ours[RATIO]


def follow_all(optimizer: Optimizer) -> None:
    """Bring all groups of ours up to date: before each step, whoever has set the rates since."""
    for group in optimizer.param_groups:
        if FOLLOWS in group:
            follow(group, followed(optimizer, group))


def ratio_to(optimizer: Optimizer, group: dict[str, Any], poetx_lr: float) -> float:
    """`poetx_lr` divided by the rate of a user's group, or by what it is where a warm-up has begun.

    Raises:
        ConfigError: that rate is 0, and nothing says what it is going to be.
    """
    known = [group.get(key) for key in ("initial_lr", "max_lr", "lr")]
    rates = (float(r) for r in (*known, optimizer.defaults.get("lr")) if r is not None)
    rate = next((r for r in rates if r > 0), 0.0)
    if poetx_lr > 0 and rate == 0:
        raise ConfigError(
            f"poetx_lr = {poetx_lr!r} is in no ratio to a learning rate of 0: call adopt when the "
            "group has its rate or a scheduler, set group['initial_lr'] to the rate that its "
            "warm-up ends at, or leave poetx_lr out"
        )
    return poetx_lr / rate if poetx_lr > 0 else 0.0
