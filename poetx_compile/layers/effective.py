"""The effective weight as eager code meets it: cached while a model is evaluated, written through.

A prepared layer has no weight of its own, so `linear.weight` computes one. Two things that hold for
a plain parameter are made to hold here:

- **Reading it again costs nothing** where nothing can have changed: in evaluation mode
  (`model.eval()`) without gradients the weight is cached, until one of the tensors it is made of
  gets another version or other memory, `model.train()` or `eval()` is called, or any optimiser
  steps.
  Meanwhile each layer holds its weight twice (`POETXConfig.keep_in_eval` turns that off).
- **Writing it in place stores it**, with rotations and gains back at the identity, as assigning
  `linear.weight = value` does: `torch.nn.init`, `linear.reset_parameters()`,
  ``linear.weight.data.copy_(…)``.
- **Its flag is that of the layer**: ``linear.weight.requires_grad_(False)`` freezes the rotations.

In the merged form (``merge_interval=1``) the effective weight is the stored one, in one memory, but
for gains: nothing is computed or cached, and what is written is stored already.

Code compiled around the layer sees a plain tensor.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poetx_compile._torch import DisableTorchFunctionSubclass, pytree
from poetx_compile.errors import EffectiveWeightError
from poetx_compile.layers.registry import registry
from poetx_compile.layers.snapshot import Snapshot

if TYPE_CHECKING:
    from poetx_compile.layers.parametrization import OrthogonalEquivalence

_GIVEN_TO_COMPILED_CODE = (
    "the weight of a prepared layer is computed, and cannot be an argument of compiled code: read "
    "linear.weight inside of it, or give it linear.weight.clone()"
)

_cache = registry.cache()  # layer → sources, weight, the memory it was made of


def read(equivalence: OrthogonalEquivalence, stored: Tensor) -> Tensor:
    """The effective weight of `stored`, computed unless it is cached."""
    e = equivalence
    records = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    computed = (not e.merged or e.gains) and not e.quantised  # of int8, no dense copy stays
    keep = computed and not e.training and not records and e.config.keep_in_eval
    if keep and (cached := _cache.get(e)) is not None and cached[0].are_those_of(e, stored):
        return EffectiveWeight.of(cached[1], cached[0])
    e.check_layout()
    if e.holds(stored) and not (torch.is_grad_enabled() and e.trains):
        e.check_stored(stored)
    sources = Sources(e, stored)
    if records:
        weight = e.effective(stored, *e.skews, e.gain_in, e.gain_out)
    else:
        with torch.inference_mode(False), torch.no_grad():  # inference tensors have no version
            weight = e.effective(stored, *e.skews, e.gain_in, e.gain_out)
    if keep and e.holds(stored):
        # With the memory it was made of: another tensor shall not get the same address.
        _cache[e] = sources, weight, [t.detach() for t in _tensors(e, stored)]
    return EffectiveWeight.of(weight, sources)


def free(equivalence: OrthogonalEquivalence) -> None:
    """Free the cached weight of a layer."""
    _cache.pop(equivalence, None)


class Sources:
    """What an effective weight was made of: a layer's state, its tensors, and theirs."""

    def __init__(self, equivalence: OrthogonalEquivalence, stored: Tensor):
        self.equivalence = weakref.ref(equivalence)
        self._snapshot = Snapshot(_tensors(equivalence, stored))

    def are_those_of(self, equivalence: OrthogonalEquivalence, stored: Tensor) -> bool:
        """Whether the same tensors are in force, and none has been written since."""
        return self._snapshot.holds(_tensors(equivalence, stored))

    def store(self, weight: Tensor) -> None:
        """Make `weight` the layer's effective weight, unless it has got another one since."""
        e, stored = self.equivalence(), self._snapshot.tensors[0]
        if e is not None and e.merged and weight.data_ptr() == stored.data_ptr():
            e.assigned()  # it is the stored weight itself
            e.note_norm(stored)
            return
        if e is None or not self.are_those_of(e, stored):
            raise EffectiveWeightError(
                "this effective weight was written in place after its layer had got another one "
                "(a step, a merge, a load): read linear.weight again and write that, or assign it"
            )
        with torch.no_grad():
            stored.copy_(e.right_inverse(weight))
        self._snapshot = Snapshot(_tensors(e, stored))


def _tensors(e: OrthogonalEquivalence, stored: Tensor) -> tuple[Tensor, ...]:
    scale = () if e.scale is None else (e.scale,)
    return stored, *e.skews, *e.gains.values(), *scale, e.perm_in.pair, e.perm_out.pair, e.layout


class EffectiveWeight(Tensor):
    """An effective weight, or a view of one; what is written into it is stored in its layer."""

    _sources: Sources
    _whole: Tensor
    _as_read = False
    """Whether it is what `linear.weight` gave: no view of it, and not detached from it."""

    @staticmethod
    def of(weight: Tensor, sources: Sources) -> Tensor:
        """`weight` as a tensor that stores what is written into it.

        Only plain tensors with storage: not those of meta, of fake modes or of other subclasses.
        """
        if type(weight) is not Tensor or weight.is_meta:
            return weight
        read = _follow(weight, sources, weight.detach())
        read._as_read = True
        return read

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            raise EffectiveWeightError(_GIVEN_TO_COMPILED_CODE)
        followed = list(_followed((*args, *kwargs.values())))
        if func in _FLAG and followed and followed[0]._as_read:
            return _set_flag(*args, **kwargs)
        # Tensors of another kind decide what happens. Functions written in Python name plain ones.
        if any(t is not cls and t is not Tensor for t in types):
            args, kwargs = pytree.tree_map_only(EffectiveWeight, plain, (args, kwargs))
            return func(*args, **kwargs)
        with DisableTorchFunctionSubclass():
            if func in _REPLACED:
                func, args = Tensor.copy_, args[:2]
            before = [weight._version for weight in followed]
            out = func(*args, **kwargs)
            for weight, version in zip(followed, before, strict=True):
                if weight._version != version:
                    weight._sources.store(weight._whole)
            return _still_followed(func, out, followed[0]) if followed else out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(plain(self), memo)


_SAME_MEMORY = (Tensor.data.__get__, Tensor.detach, torch.detach)  # type: ignore[attr-defined]
_FLAG = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_REPLACED = (Tensor.data.__set__, Tensor.set_)  # type: ignore[attr-defined]


def _set_flag(weight: EffectiveWeight, requires_grad: bool = True) -> EffectiveWeight:
    """Freeze or unfreeze the layer: of a computed weight, that is to say what it is trained by."""
    if (e := weight._sources.equivalence()) is not None:
        for parameter in (*e.skews, *e.gains.values()):
            parameter.requires_grad_(requires_grad and parameter.numel() > 0)
    return weight


def _follow(tensor: Tensor, sources: Sources, whole: Tensor) -> EffectiveWeight:
    followed = tensor.as_subclass(EffectiveWeight)
    followed._sources, followed._whole = sources, whole
    return followed


def plain(tensor: Tensor) -> Tensor:
    """An effective weight as a tensor that stores nothing."""
    with DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def _followed(values: Iterable[Any]) -> Iterator[EffectiveWeight]:
    for value in values:
        if isinstance(value, EffectiveWeight):
            yield value
        elif isinstance(value, tuple | list):
            yield from _followed(value)


def _still_followed(func: Callable[..., Any], out: Any, weight: EffectiveWeight) -> Any:
    """Views of a weight and what `.data` and `detach` give: the same memory."""
    if type(out) is Tensor:
        if func in _SAME_MEMORY or (out._base is not None and out._base is weight._base):
            return _follow(out, weight._sources, weight._whole)
    elif isinstance(out, tuple | list) and out and type(out[0]) is Tensor:
        return type(out)(_still_followed(func, part, weight) for part in out)
    return out
