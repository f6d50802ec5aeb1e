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
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from poetx_compile import ops  # noqa: F401  (defines the ops)
from poetx_compile.lowerings.identity import cache_identity
from poetx_compile.ops import kernels
from poetx_compile.ops.block_product import block_product_reference
from poetx_compile.ops.cayley import cayley_neumann_backward_reference, cayley_neumann_reference
from poetx_compile.ops.permute import permute_columns_reference
from poetx_compile.ops.rotate import rotate_blocks_reference

REFERENCES: dict[str, Callable[..., Tensor]] = {
    "cayley_neumann": cayley_neumann_reference,
    "cayley_neumann_backward": cayley_neumann_backward_reference,
    "rotate_blocks": rotate_blocks_reference,
    "block_product": block_product_reference,
    "permute_columns": permute_columns_reference,
}
"""Ops that are expanded. `cayley_exact` and its backward call a solver: nothing to fuse, they stay."""

# Kept from the replaced node: where it came from, and what the partitioner said about it.
_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr", "custom", "from_node")


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
        for node in list(graph.nodes):
            name = _op_name(node)
            if name is not None and not _stays(name, node):
                _inline(graph, node, REFERENCES[name])


def _op_name(node: fx.Node) -> str | None:
    """The name of the op of namespace ``poetx`` that `node` calls and that can be expanded."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name.removeprefix("poetx::")
    return name if target.namespace == "poetx" and name in REFERENCES else None


def _stays(name: str, node: fx.Node) -> bool:
    """Whether the op itself should run: for its kernel, or for its precision.

    The products of the rotations are IEEE fp32 whatever the user allows elsewhere. The op sees to
    that when it runs; as products of the graph they would follow the user's setting.
    """
    args = map_arg(_arguments(node), lambda n: n.meta["val"])
    if kernels.applies(name, *args):
        return True
    ieee = node.meta["val"].dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    return name.startswith("cayley") and not ieee


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """All arguments of the schema in order, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values = []
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            values.append(node.args[position])
        elif argument.name in node.kwargs:
            values.append(node.kwargs[argument.name])
        else:
            values.append(argument.default_value)
    return tuple(values)


def _inline(graph: fx.Graph, node: fx.Node, reference: Callable[..., Tensor]) -> None:
    """Replace `node` by the aten graph of `reference` at its arguments."""
    args = _arguments(node)
    inputs = [a for a in args if isinstance(a, fx.Node)]
    traced = _trace(reference, args, [n.meta["val"] for n in inputs])
    environment = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                result = environment[inner.args[0]]
            else:
                assert inner.op == "call_function", inner.op
                copy = graph.node_copy(inner, environment.__getitem__)
                copy.meta.update({k: node.meta[k] for k in _INHERITED if k in node.meta})
                environment[inner] = copy
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _trace(
    reference: Callable[..., Tensor], args: tuple[Any, ...], values: list[Any]
) -> fx.GraphModule:
    """The aten graph of ``reference(*args)`` over the fake values of the arguments that are nodes."""
    from torch._inductor.decomposition import select_decomp_table

    def function(*inputs: Any) -> Tensor:
        given = iter(inputs)
        out = reference(*(next(given) if isinstance(a, fx.Node) else a for a in args))
        # The op promises a contiguous result of its own; nodes behind it were traced with that.
        # Aliasing an input cannot be left to chance either.
        contiguous = out.contiguous()
        aliased = any(contiguous is i for i in inputs)
        return contiguous.clone() if aliased else contiguous

    fake_mode = detect_fake_mode(values)
    assert fake_mode is not None, "a post-grad graph carries fake tensors"
    with fake_mode, torch.fx.traceback.preserve_node_meta(False):
        traced = make_fx(function, decomposition_table=select_decomp_table())(*values)
    traced.graph.eliminate_dead_code()
    return traced
