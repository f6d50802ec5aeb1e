"""The class of prepared linears: one for all of a kind, and what it adds to that of torch.

`torch.nn.utils.parametrize` gives every module it touches a class of its own, and Dynamo guards the
class of every module it reads: twelve identical blocks, compiled block by block, would be compiled
twelve times, past Dynamo's limit. A copy made by `copy.deepcopy`, on the other hand, has the class
of its original, and torch puts properties into it and deletes them, hence of both: where something
else of a layer is parametrized as well, each has a class of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poetx_compile.errors import EffectiveWeightError, ParallelismError

_NO_PARAMETER = (
    "the weight of a prepared linear is computed, and no parameter can take its place: assign a "
    "tensor (linear.weight = tensor) to store values. To quantise or to tie the weight call "
    "poetx_compile.merge_and_unload(model) first"
)
_NOT_QUANTISED = (
    "a prepared linear cannot be quantised, because its weight is computed: call "
    "poetx_compile.merge_and_unload(model) first"
)


class Written(property):
    """A property that Dynamo sees written.

    That of torch 2.11 takes the ``__set__`` of a plain one for free of effects, and calls it behind
    the graph: what reads the property in between would get what it was.
    """

    def __set__(self, module: Any, value: Any) -> None:
        super().__set__(module, value)


_shared: dict[type, type] = {}  # the user's class → that of its prepared modules


def share_class(module: nn.Module) -> None:
    """Give a linear whose weight has just been parametrized the class of all others of its kind.

    One with further parametrizations, of its bias say, keeps its own.
    """
    made = type(module)
    (plain,) = made.__bases__
    for name in module.parametrizations:  # type: ignore[union-attr]
        of_torch = vars(made)[name]
        setattr(made, name, Written(of_torch.fget, of_torch.fset))
    made.register_parameter = _register_parameter  # type: ignore[method-assign, assignment]
    made.qconfig = property(_no_qconfig, _set_qconfig)  # type: ignore[attr-defined]
    copier = vars(made).get("__deepcopy__")
    if copier is not None and copier.__module__ == parametrize.__name__:
        made.__deepcopy__ = _copies(copier)  # type: ignore[attr-defined]
    alone = list(module.parametrizations) == ["weight"]  # type: ignore[arg-type]
    if not alone or type(plain) is not type:
        return
    if plain not in _shared:
        body = _body(made)
        body |= {"weight": Written(_weight, _set_weight), "__delattr__": _delete}
        if issubclass(plain, nn.Linear) and plain.forward is nn.Linear.forward:
            body["forward"] = _forward
        _shared[plain] = _SharedClass(made.__name__, (plain,), body)
    module.__class__ = _shared[plain]


def own_class(module: nn.Module) -> None:
    """Give a module that shares its class with its copies alone one that none of them has.

    To be called before torch puts a property into that class, or deletes one.
    """
    made = type(module)
    if parametrize.is_parametrized(module) and not isinstance(made, _SharedClass):
        module.__class__ = type(made.__name__, made.__bases__, _body(made))


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


def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    """That of `nn.Linear`, without the property.

    At every call Dynamo would check that the property is in the class, and could not skip the
    guards of the module (`layers.aside`).
    """
    return F.linear(input, _weight(self), self.bias)


def _set_weight(module: nn.Module, weight: Tensor) -> None:
    module.parametrizations["weight"].right_inverse(weight)  # type: ignore[index, operator, union-attr]


def _delete(module: nn.Module, name: str) -> None:
    """A parameter that goes is about to be parametrized: that puts a property into the class."""
    if name in module._parameters:
        shared = type(module)
        body = {k: v for k, v in _body(shared).items() if k not in ("__delattr__", "forward")}
        module.__class__ = type(shared.__name__, shared.__bases__, body)
    nn.Module.__delattr__(module, name)


def _copies(copier: Callable[..., Any]) -> Callable[..., Any]:
    def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """A copy that is not compiled, as those of plain modules: the original's code is not its.

        Nor is the class, unless all prepared linears have it.
        """
        copy = copier(module, memo)
        vars(copy).pop("_compiled_call_impl", None)
        own_class(copy)
        return copy

    return copied


def _register_parameter(module: nn.Linear, name: str, parameter: nn.Parameter | None) -> None:
    """`nn.Module.register_parameter`, with a reason where it would take the place of a weight.

    Tensor parallelism takes the names of all parameters of a linear for names of its own.
    """
    if "." in name:
        raise ParallelismError(
            "a prepared linear cannot be split by tensor parallelism, which would cut its blocks: "
            "leave it out of the plan, or exclude it from prepare (exclude_modules)"
        )
    if name == "weight" and parametrize.is_parametrized(module, name):
        raise EffectiveWeightError(_NO_PARAMETER)
    nn.Module.register_parameter(module, name, parameter)


def _no_qconfig(module: nn.Module) -> NoReturn:
    raise AttributeError("qconfig")


def _set_qconfig(module: nn.Module, qconfig: Any) -> None:
    """What `torch.ao.quantization` does first, with ``None`` where it leaves a module alone."""
    if qconfig is not None:
        raise EffectiveWeightError(_NOT_QUANTISED)


def _body(made: type) -> dict[str, Any]:
    """What a class defines itself, for another one like it."""
    return {k: v for k, v in vars(made).items() if k not in ("__dict__", "__weakref__", "__doc__")}
