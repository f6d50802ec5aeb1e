"""Values that cost no product: what a backward may as well recompute from what is kept anyway."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

from poetx_compile.passes import columns, graphs

_RESHAPES = ("view", "reshape", "unflatten", "flatten", "squeeze", "unsqueeze", "expand")
_REORDERS = ("transpose", "permute", "swapaxes", "t", "contiguous", "chunk", "split", "narrow")
_VIEWS = frozenset([*_RESHAPES, *_REORDERS])
_MOVES = frozenset([operator.getitem, torch.cat, torch.chunk, torch.split, torch.neg])
_SUMS = frozenset([operator.add, operator.iadd, torch.add])


def is_cheap(node: fx.Node) -> bool:
    """Whether a node is elementwise, a norm over the last dimension, a view or a concatenation."""
    if node.op == "call_method" and node.target in _VIEWS:
        return True
    if node.op == "call_function" and node.target in _MOVES:
        return True
    return columns.is_columnwise(node)


def derived(graph: fx.Graph, kept: Iterable[fx.Node]) -> list[fx.Node]:
    """Values made by cheap nodes of `kept` values and of inputs of the graph alone, in order.

    Rotary positions of a query, the product of a gate and its partner; not a norm of the residual
    stream, which is a sum over many layers.
    """
    sources, found = set(kept), []
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            constants.add(node)
        elif node in sources or not is_cheap(node):
            continue
        elif constants.issuperset(node.all_input_nodes):
            constants.add(node)
        elif all(n in sources or n in constants for n in node.all_input_nodes):
            sources.add(node)
            found.append(node)
    return found


def inputs(graph: fx.Graph, layers: Iterable[fx.Node]) -> list[fx.Node]:
    """Values that cheap nodes make on the way to the inputs of `layers`, up to sums of activations.

    A norm in front of a projection; its own input, the residual stream, is where it ends.
    """
    found: list[fx.Node] = []
    pending = [node.args[0] for node in layers]
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in found or graphs.ROLE in node.meta:
            continue
        wide = columns.operands(node)
        if wide is None or (node.target in _SUMS and sum(map(_is_activation, wide)) > 1):
            continue
        found.append(node)
        pending += [operand for operand in wide if _is_activation(operand)]
    return found


def _is_activation(node: fx.Node) -> bool:
    return not columns.is_vector(node)
