"""Inductor lowerings of the ops that have a Triton kernel: its launches, as Inductor's own IR.

Where a kernel applies, `ExpandOps` leaves an op alone, so that the passes behind it walk over one
node; here it becomes the launches. As nodes of the graph, each launch would be made functional,
traced twice and made a mutation again: a third of the first step of a large model.

Registered for ops of this package alone, when the backend first compiles. The kernels' sources are
part of the identity of `ExpandOps`, which every graph of the backend is compiled with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch.fx.node import map_arg

from poetx_compile._torch import OpOverload
from poetx_compile.compile.lowerings.trace import RESULT, arguments, signature, trace_launches
from poetx_compile.ops import OPS
from poetx_compile.ops.kernels import Kernel

_traces: WeakKeyDictionary[Any, dict[Hashable, fx.GraphModule | None]] = WeakKeyDictionary()
"""For each graph that is being lowered: a model repeats a few shapes hundreds of times."""


@functools.cache
def register() -> None:
    """Register the lowerings; a second call does nothing."""
    from poetx_compile._torch import register_lowering

    for name, op in OPS.items():
        overload = getattr(torch.ops.poetx, name).default
        if op.kernel is not None and not overload._schema.is_mutable:  # what writes stays a call
            register_lowering(overload, type_promotion_kind=None)(_lowering(overload, op.kernel))


def _lowering(op: OpOverload, kernel: Kernel) -> Callable[..., Any]:
    from poetx_compile._torch import V, constrain_to_fx_strides, fallback_handler

    call = fallback_handler(op, add_to_fallback_set=False)

    def lower(*args: Any, **kwargs: Any) -> Any:
        node = V.graph.current_node
        given = arguments(node)
        traces = _traces.setdefault(V.graph, {})
        key = (kernel, *map(signature, given))
        if key not in traces:
            values = map_arg(given, lambda n: n.meta["val"])
            traces[key] = trace_launches(kernel, values) if kernel.applies(*values) else None
        launches = traces[key]
        if launches is None:
            args, kwargs = constrain_to_fx_strides(node, *args, **kwargs)
            return call(*args, **kwargs)
        return _lower_nodes(launches, [V.graph.env[a] for a in given if isinstance(a, fx.Node)])

    return lower


def _lower_nodes(launches: fx.GraphModule, inputs: list[Any]) -> Any:
    """Lower a traced graph in place: its nodes, over the inputs, as if they stood in the graph."""
    from poetx_compile._torch import V

    nodes = list(launches.graph.nodes)
    values = iter(inputs)
    outer = V.graph.current_node
    try:
        for node in nodes:
            V.graph.current_node = node
            V.graph.env[node] = next(values) if node.op == "placeholder" else V.graph.run_node(node)
        return V.graph.env[launches.meta[RESULT]]
    finally:
        V.graph.current_node = outer
        for node in nodes:  # the next call lowers the same nodes over other inputs
            V.graph.env.pop(node, None)
