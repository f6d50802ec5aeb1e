"""Telling of one learning rate that something writes into all param groups.

It is right for dense parameters and loses the ratio of the rotations (`param_groups`). A schedule
that scales each group's own rate may bring all of them to one value, a common floor, and two
schedules may cross: so one rate is told where it was written before the first step, or where it
has changed and is one rate still.
"""

from __future__ import annotations

import logging
from typing import Any

from torch.optim import Optimizer

from poetx_compile.optim.follow import FOLLOWS
from poetx_compile.optim.groups import BLOCK, RATIO

log = logging.getLogger("poetx_compile")


class RateWatch:
    """Looks at the rates of each step, and warns once."""

    def __init__(self) -> None:
        self._first, self._last = True, 0.0
        self._told = False

    def loaded(self, optimizer: Optimizer) -> None:
        """Other rates are in force, those of a checkpoint."""
        self._first, self._last = False, _one_rate(optimizer.param_groups)

    def look(self, optimizer: Optimizer) -> None:
        """Called at each step, when the rates are those it takes."""
        if self._told:
            return
        first, last = self._first, self._last
        self._first, self._last = False, _one_rate(optimizer.param_groups)
        if self._last and (first or (last and last != self._last)):
            self._told = True
            ratios = {g.get("name"): g[RATIO] for g in optimizer.param_groups if _own_ratio(g)}
            log.warning(
                "one learning rate, now %g, is written into all param groups, and rotations lose "
                "theirs: %s. Scale the rate that each group has (group['lr'] = "
                "group['initial_lr'] * factor; OneCycleLR, CyclicLR and SWALR take a list), build "
                "a torch optimiser over model.parameters() and call poetx_compile.adopt, which "
                "keeps the ratio, or give poetx_lr=lr if one rate is meant",
                self._last,
                ", ".join(f"{ratio:.3g} x lr of {name!r}" for name, ratio in ratios.items()),
            )


def _own_ratio(group: dict[str, Any]) -> bool:
    """Whether a group of rotations has a rate of its own, and not that of dense parameters."""
    return BLOCK in group and FOLLOWS not in group and group.get(RATIO, 1.0) != 1.0


def _one_rate(groups: list[dict[str, Any]]) -> float:
    """The rate of dense groups and of those of rotations, where it is one and > 0; 0 otherwise."""
    dense = {float(g["lr"]) for g in groups if BLOCK not in g and g["params"]}
    ours = {float(g["lr"]) for g in groups if _own_ratio(g)}
    return max(dense) if len(dense) == 1 and dense == ours else 0.0
