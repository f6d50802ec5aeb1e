"""Whether a weight that a compiled graph reads may be adopted, and the module it belongs to."""

from __future__ import annotations

import gc
from typing import NamedTuple

from torch import Tensor, nn

from poetx_compile.config import POETXConfig
from poetx_compile.distributed.shards import is_sharded
from poetx_compile.distributed.wrappers import PREPARE_FIRST, wrapper_name
from poetx_compile.errors import AdoptionError
from poetx_compile.layers.eligibility import check_targets, linears, refusals
from poetx_compile.layers.live_objects import LiveObjects, hidden
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.layers.registry import registry


class Place(NamedTuple):
    """Where a weight belongs: the outermost model, the linear's name in it, and the linear."""

    root: nn.Module
    name: str
    module: nn.Linear


class Eligibility(NamedTuple):
    """Whether a weight may be adopted: ``reason`` is ``None`` if so, and ``place`` then known."""

    reason: str | None
    place: Place | None = None


def declined_for(weight: Tensor) -> str | None:
    """Why `prepare` left the linear alone that has this weight, or ``None``."""
    return next((why for declined, why in registry.declined_weights() if declined is weight), None)


class EligibilityCheck:
    """Says of a weight what `prepare` would say of it, called on the outermost model around it.

    Args:
        config: names and exclusions.
        live: the objects of the process; looked for here by default.
    """

    def __init__(self, config: POETXConfig, live: LiveObjects | None = None):
        self.config = config
        self._live = live
        self._roots: dict[int, dict[int, tuple[str, str | None]]] = {}

    @property
    def live(self) -> LiveObjects:
        """Looked for when they are needed: a walk over the heap, a second in a large process."""
        self._live = self._live or LiveObjects()
        return self._live

    def __call__(self, weight: Tensor) -> Eligibility:
        if (reason := declined_for(weight)) is not None:
            return Eligibility(reason)
        owners = self.live.owners(weight)
        if len(owners) > 1:  # one of them may be garbage that nobody has collected yet
            gc.collect()
            self._live, self._roots = LiveObjects(), {}
            owners = self.live.owners(weight)
        if not owners and hidden():
            raise AdoptionError(
                "the module that owns a weight cannot be found, because gc.freeze() hides it: call "
                "poetx_compile.prepare(model), or freeze after the first step"
            )
        if not owners:
            return Eligibility("no module owns the weight")
        if len(owners) > 1:
            kinds = ", ".join(type(owner).__name__ for owner in owners)
            return Eligibility(f"tied: the weight belongs to several modules ({kinds})")
        (module,) = owners
        if not isinstance(module, nn.Linear):
            return Eligibility(
                f"the weight belongs to {type(module).__name__}, which is no nn.Linear"
            )
        root = self.live.root(module)
        name, reason = self._reasons(root)[id(module)]
        if reason is None or is_sharded(weight):
            self._check_wrappers(name, module, weight)
        return Eligibility(reason, Place(root, name, module))

    def _reasons(self, root: nn.Module) -> dict[int, tuple[str, str | None]]:
        """id(linear) → its first name in `root`, and the reason why it is left alone."""
        if id(root) not in self._roots:
            found = linears(root)
            check_targets(list(found), self.config)
            reasons = refusals(root, self.config)
            if any(not e.adopted for _, _, e in prepared_linears(root)):
                other = "the model was prepared, and this layer was not"
                reasons = {name: reason or other for name, reason in reasons.items()}
            found_reasons: dict[int, tuple[str, str | None]] = {}
            for name, module in found.items():
                found_reasons.setdefault(id(module), (name or "(root)", reasons[name]))
            self._roots[id(root)] = found_reasons
        return self._roots[id(root)]

    def _check_wrappers(self, name: str, module: nn.Module, weight: Tensor) -> None:
        wrapper = "tensor parallelism" if is_sharded(weight) else None
        for outer in self.live.above(module):
            wrapper = wrapper_name(outer) or wrapper
        if wrapper is not None:
            raise AdoptionError(
                f"{name} was not prepared and is under {wrapper}, which would not see "
                f"rotations that the compiler adds: {PREPARE_FIRST}"
            )
