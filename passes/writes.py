"""Writes in place into effective weights, which no pass could keep: they are computed values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from poetx_compile._torch import HigherOrderOperator
from poetx_compile.passes import columns, graphs


def writes_to_weights(root: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(effective weight, what writes into it or into a view of it), in all bodies of a graph.

    Memory is told by the storage of fake values, which views share and Dynamo hands on to bodies.
    """
    nodes = [node for module in graphs.nested(root) for node in module.graph.nodes]
    weights = {_storage(n): n for n in nodes if graphs.is_op(n, *graphs.EQUIVALENCE)}
    weights.pop(None, None)
    if not weights:
        return
    for node in nodes:
        if isinstance(node.target, HigherOrderOperator):
            continue  # its bodies are among the modules
        for operand in columns.written(node):
            if (weight := weights.get(_storage(operand))) is not None:
                yield weight, node


def _storage(node: fx.Node) -> Any:
    value = node.meta.get(graphs.VALUE)
    if not isinstance(value, torch.Tensor) or graphs.in_transform(node):
        return None
    return value.untyped_storage()._cdata
