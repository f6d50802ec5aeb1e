"""The live modules, optimisers and schedulers of the process: who holds a weight.

A backend is given tensors, not the model they belong to, and code that Dynamo reuses for a second
instance does not call it at all. So the owners of a weight are looked up among the objects that
the garbage collector knows: a tenth of a second, once for each graph of a model nobody prepared and
once at its first backward.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from poetx_compile.layers.eligibility import unwrap_compiled
from poetx_compile.layers.prepared import PreparedLayers


class LiveObjects:
    """What was alive when it was taken. Not to be kept: it keeps all of it alive.

    Attributes:
        modules: all of them.
        optimizers: each once; of wrappers that share the groups of another, the wrapped one.
    """

    def __init__(self) -> None:
        kinds: dict[type, list] = {}
        found: dict[type, list] = {nn.Module: [], Optimizer: [], LRScheduler: []}
        nowhere: list = []
        for thing in gc.get_objects():
            kind = type(thing)  # not `isinstance`, which asks lazy proxies to load themselves
            if kind not in kinds:
                base = next((b for b in found if issubclass(kind, b)), None)
                kinds[kind] = nowhere if base is None or kind is PreparedLayers else found[base]
            if kinds[kind] is not nowhere:
                kinds[kind].append(thing)
        self._owners: dict[int, list[nn.Module]] = defaultdict(list)
        self._parents: dict[int, list[nn.Module]] = defaultdict(list)
        for module in found[nn.Module]:
            for parameter in (vars(module).get("_parameters") or {}).values():
                if parameter is not None:
                    self._owners[id(parameter)].append(module)
            for child in (vars(module).get("_modules") or {}).values():
                if child is not None:
                    self._parents[id(child)].append(module)
        self.modules: list[nn.Module] = found[nn.Module]
        self.optimizers = _distinct(found[Optimizer])
        self._schedulers: list[LRScheduler] = found[LRScheduler]

    def owners(self, parameter: Tensor) -> list[nn.Module]:
        """The modules that have `parameter` among their own."""
        return self._owners.get(id(parameter), [])

    def optimised(self, parameter: Tensor) -> bool:
        """Whether an optimiser holds `parameter`."""
        groups = (group for o in self.optimizers for group in o.param_groups)
        return any(p is parameter for group in groups for p in group["params"])

    def above(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules that contain `module`, itself first, each once."""
        seen: set[int] = set()
        queue = [module]
        while queue:
            here = queue.pop(0)
            if id(here) not in seen:
                seen.add(id(here))
                yield here
                queue += self._parents[id(here)]

    def root(self, module: nn.Module) -> nn.Module:
        """The outermost module around `module`; of several the one that contains most."""
        above = list(self.above(module))
        tops = [m for m in above if not self._parents[id(m)]] or [module]
        return unwrap_compiled(max(tops, key=lambda top: sum(1 for _ in top.modules())))

    def schedulers_of(self, optimizer: Optimizer) -> list[LRScheduler]:
        """The learning rate schedulers that write to the groups of `optimizer`."""
        groups = optimizer.param_groups
        held = [(s, vars(s).get("optimizer")) for s in self._schedulers]
        return [s for s, o in held if o is not None and o.param_groups is groups]


def hidden() -> bool:
    """Whether objects may be alive that are not found here (`gc.freeze` was called)."""
    return gc.get_freeze_count() > 0


def _distinct(optimizers: list[Optimizer]) -> list[Optimizer]:
    """One optimiser for each list of groups: a wrapper has those of what it wraps."""
    by_groups: dict[int, Optimizer] = {}
    for optimizer in sorted(optimizers, key=lambda o: len(type(o).__mro__)):
        groups = vars(optimizer).get("param_groups")
        if groups is not None:
            by_groups.setdefault(id(groups), optimizer)
    return list(by_groups.values())
