"""`requires_grad` of what compiled code is called with, whatever Dynamo's guards see of it.

Guards may miss a flag that changed since compiling: those of torch 2.11 look at no parameter while
its module has the same ones, and ``guard_filter_fn`` drops whatever it likes. Code that was made
for a frozen parameter would not train it, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from poetx_compile._torch import AttrSource, GuardBuilder, TracingContext
from poetx_compile.errors import RewriteError
from poetx_compile.passes import graphs


def held_to_flags(
    gm: fx.GraphModule, example_inputs: Sequence[Any], compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """`compiled` for inputs whose flags may have changed, with more arguments behind them or not.

    Stored weights of prepared layers are given to it as constants. What took no gradient when it
    was compiled is guarded once more, and raises `RewriteError` where it takes one all the same.
    The other way round nothing is lost: the gradient of what was frozen since goes nowhere.

    Args:
        gm: Dynamo's graph.
        example_inputs: what it was compiled for.
    """
    places = gm.graph.find_nodes(op="placeholder")
    stored = _stored_weights(gm, places)
    frozen: dict[int, str] = {}
    if torch.is_grad_enabled():
        for i, (place, value) in enumerate(zip(places, example_inputs, strict=True)):
            if i not in stored and _is_frozen(value):
                frozen[i] = place.name
                if isinstance(value, nn.Parameter):
                    _guard(place)

    def run(*args: Any) -> Any:
        for i, name in frozen.items():
            if args[i].requires_grad and torch.is_grad_enabled():
                raise RewriteError(
                    f"{name} takes a gradient, and took none when this code was compiled: Dynamo's "
                    "guards have not seen it change (guard_filter_fn?), and it would not train. "
                    "Call torch._dynamo.reset() after requires_grad_, or keep the guards of "
                    "parameters"
                )
        if any(args[i].requires_grad for i in stored):
            args = tuple(a.detach() if i in stored else a for i, a in enumerate(args))
        return compiled(*args)

    return run if stored or frozen else compiled


def _stored_weights(gm: fx.GraphModule, places: Sequence[fx.Node]) -> frozenset[int]:
    """The inputs that effective weights are made of, in checkpoints too: Dynamo hands the fake
    value of an input on to the bodies."""
    read = {
        id(node.args[0].meta.get(graphs.VALUE))  # type: ignore[union-attr]
        for module in graphs.nested(gm)
        for node in module.graph.nodes
        if graphs.is_op(node, *graphs.EQUIVALENCE)
    }
    return frozenset(
        i for i, place in enumerate(places) if id(place.meta.get(graphs.VALUE)) in read
    )


def _is_frozen(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad


def _guard(place: fx.Node) -> None:
    """Have the code compiled again where this parameter takes gradients.

    No torch skips the guard of an attribute.
    """
    tracing = TracingContext.try_get()
    source = getattr(place, "_dynamo_source", None)
    if tracing is not None and source is not None and source.subguards_allowed():
        flag = AttrSource(source, "requires_grad").make_guard(GuardBuilder.CONSTANT_MATCH)
        tracing.guards_context.dynamo_guards.add(flag)
