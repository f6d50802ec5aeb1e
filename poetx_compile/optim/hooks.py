"""The one pair of hooks that this package puts into all optimisers, and the order of their work.

Before each step of any optimiser of the process:

1. `Before.SETTLE`: weights that the compiler adopted and no backward has settled move into their
   modules (`adoption.settling`).
2. `Before.OWN`: the optimiser takes over rotations whose weights it holds; what it cannot train is
   refused or told (`optim.watch`).
3. The caches of effective and folded weights are emptied: they are out of date after the step, and
   memory is short.

Then come the hooks of `attach`, which belong to one optimiser, around the step itself. After it:

4. The caches are emptied once more: a closure may have run the model.
5. `After.COUNT`: rotations that get gradients and that no optimiser holds (`optim.watch`).
6. `After.DENSE`: what trains densely in compiled models is told (`compile.dense`).

Trial steps of copies (`optim.probe`) are nobody's training: the hooks leave them out.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from poetx_compile._torch import _disable_dynamo
from poetx_compile.layers.registry import registry

Action = Callable[[Optimizer], None]


class Before(enum.IntEnum):
    """What happens before a step, in this order."""

    SETTLE = 1
    OWN = 2


class After(enum.IntEnum):
    """What happens after a step, in this order."""

    COUNT = 1
    DENSE = 2


class StepHooks:
    """The pair of hooks.

    Attributes:
        steps: how many steps the optimisers of this process have taken.
        trials: copies of optimisers that `optim.probe` steps.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.trials: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._before: dict[Before, Action] = {}
        self._after: dict[After, Action] = {}

    def before(self, when: Before, action: Action) -> None:
        """Let `action` be what happens there."""
        self._before[when] = action

    def after(self, when: After, action: Action) -> None:
        """Let `action` be what happens there."""
        self._after[when] = action

    def before_step(self, optimizer: Optimizer) -> None:
        """Do all that comes before a step."""
        if optimizer in self.trials:
            return
        for when in sorted(self._before):
            self._before[when](optimizer)
        registry.clear_caches()

    def after_step(self, optimizer: Optimizer) -> None:
        """Do all that comes after one."""
        if optimizer in self.trials:
            return
        self.steps += 1
        registry.clear_caches()
        for when in sorted(self._after):
            self._after[when](optimizer)


step_hooks = StepHooks()


# Where Dynamo compiles `optimizer.step`, the hooks stay out of its graphs. Not by
# `torch.compiler.disable`, which loads Dynamo when this package is imported.
@_disable_dynamo
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    step_hooks.before_step(optimizer)


@_disable_dynamo
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    step_hooks.after_step(optimizer)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
