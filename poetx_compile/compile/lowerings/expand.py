"""`ExpandOps`: opaque ``poetx`` ops → what Inductor compiles, after partitioning.

Before (one node of the forward graph)::

    rotation: f32[16, 256, 256] = poetx.cayley_neumann(skew: f32[16, 32640], 256, 3)

After, on the CPU or wherever no kernel applies: the reference as aten nodes. The packed index
arithmetic becomes part of the loads of pointwise code, so that only the products and the pointwise
kernels between them remain::

    index: i64[256, 256] = …            # iota, minimum, maximum: no kernel of its own
    skew_matrix = where(row < column, index(skew, index), …)      # pointwise kernel 1
    square      = bmm(skew_matrix, skew_matrix)
    inner       = …                                               # pointwise kernel 2
    product     = bmm(square, inner)
    rotation    = …                                               # pointwise kernel 3

Where a kernel applies the op stays: its lowering (`launches`) makes the kernel's launches of it.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from poetx_compile._torch import CustomGraphPass, OpOverload
from poetx_compile.compile.lowerings.deltas import round_together
from poetx_compile.compile.lowerings.identity import cache_identity
from poetx_compile.compile.lowerings.parameters import concatenate_parameters
from poetx_compile.compile.lowerings.rejoin import rejoin_slices
from poetx_compile.compile.lowerings.trace import arguments, insert, signature, trace_reference
from poetx_compile.ops import OPS
from poetx_compile.ops.registry import Op


class ExpandOps(CustomGraphPass):
    """Inductor ``post_grad_custom_pre_pass`` that expands the ``poetx`` ops of a graph.

    Args:
        identity: a JSON-able value that decides, beside the sources, what is compiled (the
            backend passes its options); part of the `uuid`.
    """

    def __init__(self, identity: Any = None):
        self.identity = identity
        json.dumps(identity)  # a value that has no stable text must not reach a cache key

    def uuid(self) -> str:
        """Identity for Inductor's caches: sources, versions, `identity`, and the fp32 precision."""
        precision = torch.get_float32_matmul_precision()
        return cache_identity("ExpandOps", identity=self.identity, precision=precision)

    def __call__(self, graph: fx.Graph) -> None:
        rejoin_slices(graph)
        round_together(graph)
        # A model repeats a few shapes hundreds of times: each is traced once a graph.
        traces: dict[Hashable, fx.GraphModule | None] = {}
        for node in list(graph.nodes):
            op = _op(node)
            if op is None:
                continue
            args = arguments(node)
            key = (node.target, *map(signature, args))
            if key not in traces:
                traces[key] = _expansion(op, args)
            expansion = traces[key]
            if expansion is not None:
                _inline(graph, node, expansion)
        concatenate_parameters(graph)


def _expansion(op: Op, args: tuple[Any, ...]) -> fx.GraphModule | None:
    """The graph that replaces `op` at `args`; ``None`` where the op stays a call."""
    values = map_arg(args, lambda n: n.meta["val"])
    if op.kernel is not None and op.kernel.applies(*values):
        return None  # `launches` takes it from here
    stays = not op.expands(*values) or _needs_ieee(op, values)
    return None if stays else trace_reference(op.reference, values)


def _op(node: fx.Node) -> Op | None:
    """The op of namespace ``poetx`` that `node` calls."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return None
    name = target._schema.name.removeprefix("poetx::")
    return OPS.get(name) if target.namespace == "poetx" else None


def _needs_ieee(op: Op, values: tuple[Any, ...]) -> bool:
    """Whether the op has to stay a call to keep its precision.

    The products of the rotations are IEEE fp32 whatever the user allows elsewhere. The op sees to
    that when it runs; as products of the graph they would follow the user's setting.
    """
    exact = torch.get_float32_matmul_precision() == "highest"
    fp32 = values[0].dtype == torch.float32
    return op.ieee and fp32 and not exact


def _inline(graph: fx.Graph, node: fx.Node, expansion: fx.GraphModule) -> None:
    """Replace `node` by a copy of `expansion` over its arguments."""
    inputs = [a for a in arguments(node) if isinstance(a, fx.Node)]
    node.replace_all_uses_with(insert(graph, node, expansion, inputs))
    graph.erase_node(node)
    _erase_unused(graph, inputs)


def _erase_unused(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase those of `nodes` that nothing reads any more, and what only they have read.

    A tangent is an argument of `folded_linear` and of nothing that is computed.
    """
    for node in nodes:
        pure = isinstance(node.target, OpOverload) and not node.target._schema.is_mutable
        if node.users or not (pure or node.target is operator.getitem):
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        _erase_unused(graph, inputs)
