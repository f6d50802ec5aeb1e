"""Adopted weights settle: their states move into the model, and their optimisers take them over.

This happens at the end of the first backward; compiled autograd runs no callback there, and then it
happens at the next step of any optimiser. From then on the model is a prepared one, with its
rotations in ``parameters()`` and ``state_dict()``, and Dynamo compiles it once more as such.
"""

from __future__ import annotations

import logging

from torch import Tensor, nn

from poetx_compile import ownership
from poetx_compile.adoption import Judge, Place, Ripe, adopted_state, harvest, reused, reused_dense
from poetx_compile.census import Census
from poetx_compile.config import POETXConfig
from poetx_compile.optim.takeover import take_over_all
from poetx_compile.prepare import move_adopted

log = logging.getLogger("poetx_compile")


def settle(late: bool = False) -> None:
    """Move the states of ripe weights into their modules, and into the optimisers that hold them.

    Args:
        late: this is not the end of the backward. What scales and clips gradients has not seen
            those of the rotations: they are dropped, and train from the next backward on.

    Raises:
        AdoptionError: code that Dynamo reused met a weight that it should have left alone, or the
            other way round; an optimiser that holds adopted weights cannot train rotations.
    """
    ripe = {weight: told for weight, told in harvest().items() if _waits(weight, told)}
    if not any(told.adopted for told in ripe.values()):
        return
    census = Census()
    judges: dict[POETXConfig, Judge] = {}
    models: dict[tuple[int, POETXConfig], list[Place]] = {}
    for weight, told in ripe.items():
        judge = judges.setdefault(told.config, Judge(told.config, census))
        verdict = judge(weight)
        if told.adopted and verdict.place is not None and verdict.reason is None:
            key = id(verdict.place.root), told.config
            models.setdefault(key, []).append(verdict.place)
        elif told.adopted and (verdict.place is not None or census.optimised(weight)):
            raise reused(told.layer, verdict.reason or "")
        elif not told.adopted and verdict.reason is None:
            raise reused_dense(told.layer)
    layers: list[nn.Linear] = []
    for (_, config), places in models.items():
        modules = [place.module for place in places]
        if late:
            for state in filter(None, (adopted_state(module.weight) for module in modules)):
                state.skew_in.grad = state.skew_out.grad = None
        move_adopted(places[0].root, modules, config)
        layers += modules
    trained = take_over_all(census, layers)
    if rest := len(layers) - trained:
        log.info(
            "%d nn.Linear of a model that nobody prepared train through rotations as soon as an "
            "optimiser holds them (model.parameters() does)",
            rest,
        )


def _waits(weight: Tensor, told: Ripe) -> bool:
    """Whether a weight is where it was in the forward: it may have settled since."""
    return adopted_state(weight) is not None or not told.adopted


ownership.settle = settle
