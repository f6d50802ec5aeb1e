"""One class for all prepared linears of a kind.

`torch.nn.utils.parametrize` gives every module it touches a class of its own, and Dynamo guards the
class of every module it reads: twelve identical blocks, compiled block by block, would be compiled
twelve times, past Dynamo's limit. A copy made by `copy.deepcopy`, on the other hand, has the class
of its original, and ``remove_parametrizations`` deletes the property from it, hence of both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

_shared: dict[type, type] = {}  # the user's class → that of its prepared modules


def share_class(module: nn.Module) -> None:
    """Give a linear whose weight has just been parametrized the class of all others of its kind.

    One with further parametrizations, of its bias say, keeps its own.
    """
    (plain,) = type(module).__bases__
    alone = list(module.parametrizations) == ["weight"]  # type: ignore[arg-type]
    if not alone or type(plain) is not type:
        return
    if plain not in _shared:
        body = _body(type(module))
        body |= {"weight": property(_weight, _set_weight), "__delattr__": _delete}
        _shared[plain] = _SharedClass(type(module).__name__, (plain,), body)
    module.__class__ = _shared[plain]


class _SharedClass(type):
    """Keeps its property where torch takes the parametrization off one module and deletes it.

    Torch puts the module's own class back next, and the property of the others has to stay.
    """

    def __delattr__(cls, name: str) -> None:
        if not isinstance(vars(cls).get(name), property):
            super().__delattr__(name)


def _weight(module: nn.Module) -> Tensor:
    """The effective weight; within `parametrize.cached` it is built once.

    Attributes and `_modules` are what Dynamo looks up itself; the methods of `nn.ModuleDict` and
    `nn.ModuleList` it would trace, seven calls for each layer, and guard what they read.
    """
    chains: Any = module.parametrizations
    chain = chains.weight  # no such attribute while it is being taken off
    if not parametrize._cache_enabled:
        return _built(chain)
    key = id(module), "weight"
    if (weight := parametrize._cache.get(key)) is None:
        weight = parametrize._cache[key] = _built(chain)
    return weight


def _built(chain: Any) -> Tensor:
    """``chain()``; a single member is called without torch's loop over all of them.

    By `_modules`: of ``getattr(chain, "0")`` Dynamo notes these words as the path of the module.
    """
    return chain() if hasattr(chain, "1") else chain._modules["0"](chain.original)


def _set_weight(module: nn.Module, weight: Tensor) -> None:
    module.parametrizations["weight"].right_inverse(weight)  # type: ignore[index, operator, union-attr]


def _delete(module: nn.Module, name: str) -> None:
    """A parameter that goes is about to be parametrized: that puts a property into the class."""
    if name in module._parameters:
        shared = type(module)
        body = {k: v for k, v in _body(shared).items() if k != "__delattr__"}
        module.__class__ = type(shared.__name__, shared.__bases__, body)
    nn.Module.__delattr__(module, name)


def _body(made: type) -> dict[str, Any]:
    """What a class defines itself, for another one like it."""
    return {k: v for k, v in vars(made).items() if k not in ("__dict__", "__weakref__", "__doc__")}
