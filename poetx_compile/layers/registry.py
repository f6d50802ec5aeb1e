"""The one registry of a process: its prepared layers, and weights whose layers are still to come.

A compiled graph knows a layer by a number, an optimiser by its parameters, and a backend is given
weights without the modules they belong to. All of them ask here. Layers and modules are referred to
weakly, tensors never: `torch.utils.swap_tensors`, by which torch moves and casts tensor subclasses
(and everything, with ``set_swap_module_params_on_conversion``), refuses a tensor that has a weak
reference. The one exception are weights that compiled code has adopted and no module holds yet.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from poetx_compile._torch import _len_torch_dispatch_stack

if TYPE_CHECKING:
    from poetx_compile.layers.parametrization import OrthogonalEquivalence
    from poetx_compile.layers.permutation import Permutation


class Registry:
    """What of this package is alive in the process.

    Attributes:
        revision: grows whenever prepared layers, the parameters in them, or the values of their
            weights, may have changed: not at steps and merges.
        adopted: weight → the state that compiled code made for it, until that is in a module.
        some_interrupted: a merge, a step or a load of some layer was cut off, also of one that is
            gone.
    """

    def __init__(self) -> None:
        self.revision = 0
        self.some_interrupted = False
        self._interrupted = 0
        self.adopted: MutableMapping[Any, OrthogonalEquivalence] = WeakTensorKeyDictionary()
        self._by_id: WeakValueDictionary[int, OrthogonalEquivalence] = WeakValueDictionary()
        self._by_rotation: WeakValueDictionary[int, OrthogonalEquivalence] = WeakValueDictionary()
        self._linears: WeakSet[nn.Linear] = WeakSet()
        self._in_code: WeakSet[OrthogonalEquivalence] = WeakSet()
        self._declined: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._reserved: WeakKeyDictionary[nn.Module, tuple[Permutation, ...]] = WeakKeyDictionary()
        self._caches: list[MutableMapping[OrthogonalEquivalence, Any]] = []
        self._zeros: WeakValueDictionary[tuple[torch.device, torch.dtype], Tensor]
        self._zeros = WeakValueDictionary()

    # --- prepared layers --------------------------------------------------------------------------

    def changed(self) -> None:
        """Let those who look after layers look again."""
        self.revision += 1

    def announce(self, layer: OrthogonalEquivalence) -> None:
        """Make a layer known, with the parameters it has now."""
        self.changed()
        self._by_id[id(layer)] = layer
        self._by_rotation.update({id(skew): layer for skew in layer.skews})
        self._drop_cached(layer)

    def note_interrupted(self, more: int) -> None:
        """So many layers more are marked as interrupted, or less."""
        self._interrupted += more
        self.some_interrupted = self._interrupted > 0

    def retire(self, layer: OrthogonalEquivalence) -> None:
        """The weight of a layer is a plain one again."""
        self.changed()
        self._by_id.pop(id(layer), None)
        for skew in layer.skews:
            self._by_rotation.pop(id(skew), None)
        self._drop_cached(layer)

    def layers(self) -> list[OrthogonalEquivalence]:
        """Every layer that is alive, in a module or not."""
        return list(self._by_id.values())

    def with_id(self, module_id: int | None) -> OrthogonalEquivalence | None:
        """The layer whose `id` a graph has noted, or ``None``."""
        return None if module_id is None else self._by_id.get(module_id)

    def with_rotation(self, skew: Tensor) -> OrthogonalEquivalence | None:
        """The layer whose own parameter `skew` is: no stand-in, and not just gathered."""
        e = self._by_rotation.get(id(skew))
        return e if e is not None and (skew is e.skew_in or skew is e.skew_out) else None

    def enrol(self, module: nn.Linear) -> None:
        """A linear was given a layer by `prepare` or the compiler: optimisers are asked for it."""
        self.changed()
        self._linears.add(module)

    def linears(self) -> list[nn.Linear]:
        """The linears that were enrolled, still prepared or not."""
        return list(self._linears)

    # --- weights of models that nobody prepared ---------------------------------------------------

    def release(self, weight: Tensor) -> OrthogonalEquivalence | None:
        """Take an adopted state out (into the model, or to drop it)."""
        return self.adopted.pop(weight, None)

    def adopt(self, weight: Tensor, state: OrthogonalEquivalence) -> None:
        """Compiled code has made `state` for a weight, and would again."""
        self.adopted[weight] = state
        self._in_code.add(state)

    def in_code(self, layer: OrthogonalEquivalence) -> bool:
        """Whether there is compiled code that adopts the weight of this layer, and would again."""
        return layer in self._in_code

    def decline(self, module: nn.Module, reason: str) -> None:
        """Note that `prepare` left this linear alone: compiled code must not adopt its weight."""
        self._declined[module] = reason

    def declined(self, module: nn.Module) -> str | None:
        """Why compiled code must not adopt the weight of a linear, or ``None``."""
        return self._declined.get(module)

    def declined_weights(self) -> Iterator[tuple[Any, str]]:
        """(weight, reason) of the linears that are left alone."""
        for module, reason in list(self._declined.items()):
            yield module._parameters.get("weight"), reason

    def reserve(self, module: nn.Module, permutations: tuple[Permutation, ...]) -> None:
        """Keep the permutations of a linear that no code has adopted yet; others have been."""
        self._reserved[module] = permutations

    def reserved(self, module: nn.Module) -> tuple[Permutation, ...] | None:
        """The permutations reserved for a linear; they are given out once."""
        return self._reserved.pop(module, None)

    # --- zeros that take no bytes -----------------------------------------------------------------

    def zeros(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """At least `size` zeros in a row, the same memory for all who ask; keep the tensor.

        Nobody reads them: rotations that are zero whenever a model runs are views of it. A tensor
        of stride 0 would be smaller still, and refuses to be written: by DDP, which sends its
        parameters around, and by averages of parameters.
        """
        if _len_torch_dispatch_stack():  # a fake mode: for those inside alone
            return torch.zeros(size, dtype=dtype, device=device)
        found = self._zeros.get((device, dtype))
        if found is None or found.numel() < size:
            with torch.inference_mode(False):
                found = self._zeros[device, dtype] = torch.zeros(size, dtype=dtype, device=device)
        return found

    # --- caches -----------------------------------------------------------------------------------

    def cache(self) -> MutableMapping[OrthogonalEquivalence, Any]:
        """A dictionary by layers for values computed from them: emptied around every step of an
        optimiser, since a kernel may write past the version of a tensor, and of a layer where that
        changes."""
        cache: WeakKeyDictionary[OrthogonalEquivalence, Any] = WeakKeyDictionary()
        self._caches.append(cache)
        return cache

    def clear_caches(self) -> None:
        """Empty all caches."""
        for cache in self._caches:
            cache.clear()

    def _drop_cached(self, layer: OrthogonalEquivalence) -> None:
        for cache in self._caches:
            cache.pop(layer, None)


registry = Registry()
