"""Adopted weights settle: their states move into the model, and their optimisers take them over.

This happens at the end of the first backward; compiled autograd runs no callback there, and then it
happens at the next step of any optimiser. From then on the model is a prepared one, with its
rotations in ``parameters()`` and ``state_dict()``, and Dynamo compiles it once more as such.
"""

from __future__ import annotations

import logging

from torch import Tensor, nn
from torch.optim import Optimizer

from poetx_compile._torch import _current_graph_task_id
from poetx_compile.adoption.adopter import reused, reused_dense
from poetx_compile.adoption.awaiting import Awaiting, drain
from poetx_compile.adoption.eligibility import EligibilityCheck, Place
from poetx_compile.config import POETXConfig
from poetx_compile.layers.live_objects import LiveObjects
from poetx_compile.layers.prepare import move_adopted
from poetx_compile.layers.registry import registry
from poetx_compile.optim.hooks import Before, step_hooks
from poetx_compile.optim.takeover import take_over_all

log = logging.getLogger("poetx_compile")


def settle(late: bool = False) -> None:
    """Move the states of awaiting weights into their modules, and into the optimisers of these.

    Args:
        late: this is not the end of the backward. What scales and clips gradients has not seen
            those of the rotations: they are dropped, and train from the next backward on.

    Raises:
        AdoptionError: code that Dynamo reused met a weight that it should have left alone, or the
            other way round; an optimiser that holds adopted weights cannot train rotations.
    """
    awaiting = {weight: told for weight, told in drain().items() if _waits(weight, told)}
    if not any(told.adopted for told in awaiting.values()):
        return
    live = LiveObjects()
    checks: dict[POETXConfig, EligibilityCheck] = {}
    models: dict[tuple[int, POETXConfig], list[Place]] = {}
    for weight, told in awaiting.items():
        check = checks.setdefault(told.config, EligibilityCheck(told.config, live))
        found = check(weight)
        if told.adopted and found.place is not None and found.reason is None:
            key = id(found.place.root), told.config
            models.setdefault(key, []).append(found.place)
        elif told.adopted and (found.place is not None or live.optimised(weight)):
            raise reused(told.layer, found.reason or "")
        elif not told.adopted and found.reason is None:
            raise reused_dense(told.layer)
    layers: list[nn.Linear] = []
    for (_, config), places in models.items():
        modules = [place.module for place in places]
        if late:
            for state in filter(None, (registry.adopted.get(module.weight) for module in modules)):
                for parameter in state.parameters():
                    parameter.grad = None
        move_adopted(places[0].root, modules, config)
        layers += modules
    trained = take_over_all(live, layers)
    if rest := len(layers) - trained:
        log.info(
            "%d nn.Linear of a model that nobody prepared train through rotations as soon as an "
            "optimiser holds them (model.parameters() does)",
            rest,
        )


def _waits(weight: Tensor, told: Awaiting) -> bool:
    """Whether a weight is where it was in the forward: it may have settled since."""
    return registry.adopted.get(weight) is not None or not told.adopted


def _settle_late(optimizer: Optimizer) -> None:
    if _current_graph_task_id() == -1:  # in no backward
        settle(late=True)


step_hooks.before(Before.SETTLE, _settle_late)
