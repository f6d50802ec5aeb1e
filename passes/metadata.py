"""The values of nodes: given to new ones after a rewrite, checked against a fresh propagation."""

from __future__ import annotations

import contextlib
from operator import is_
from typing import Any

import torch
from torch import fx

from poetx_compile._torch import FakeTensor, FakeTensorMode, enable_python_dispatcher, pytree
from poetx_compile.passes import gradients, graphs
from poetx_compile.passes.contexts import Contexts

Checked = dict[fx.Node, tuple[Any, ...]]
"""What each node was when its value was last found true."""


def refresh(module: fx.GraphModule, contexts: Contexts | None = None) -> None:
    """Give every new node its fake value, lint, and recompile; nested bodies first.

    A value is made in the context of its node: it has the dtype of the autocast region around, and
    requires gradients where autograd would record it.
    """
    contexts = contexts or Contexts(module)
    mode = _fake_mode(module)
    for node in module.graph.nodes:
        for body in graphs.bodies(node):
            refresh(body, contexts)
        if _computes(node) and graphs.VALUE not in node.meta:
            node.meta[graphs.VALUE] = value = _evaluate(node, mode, contexts)
            if gradients.passes_through(node, contexts):
                for tensor in filter(_may_require_grad, pytree.tree_leaves(value)):
                    tensor.requires_grad_()
    module.graph.lint()
    module.recompile()


def verify(
    module: fx.GraphModule, contexts: Contexts | None = None, checked: Checked | None = None
) -> None:
    """Raise `AssertionError` where a node's metadata differs from a fresh propagation.

    Args:
        checked: nodes that are as they were at an earlier look are not evaluated again; takes what
            is looked at now.
    """
    module.graph.lint()
    contexts = contexts or Contexts(module)
    checked = {} if checked is None else checked
    mode = _fake_mode(module)
    for node in module.graph.nodes:
        bodies = graphs.bodies(node)
        for body in bodies:
            verify(body, contexts, checked)
        if not _computes(node) or node.meta[graphs.VALUE] is None:
            continue
        now = _identity(node, contexts)
        if not bodies and _same(checked.get(node), now):
            continue
        stale = _signature(node.meta[graphs.VALUE])
        fresh = _signature(_evaluate(node, mode, contexts))
        assert stale == fresh, f"stale metadata at {node.format_node()}: {stale} is {fresh}"
        checked[node] = now


def _identity(node: fx.Node, contexts: Contexts) -> tuple[Any, ...]:
    """A node's value and all that it follows from: objects that are replaced, never written."""
    values = [n.meta[graphs.VALUE] for n in (node, *node.all_input_nodes)]
    return contexts.of(node), node.target, node.args, node.kwargs, *values


def _same(a: tuple[Any, ...] | None, b: tuple[Any, ...]) -> bool:
    return a is not None and len(a) == len(b) and a[0] == b[0] and all(map(is_, a[1:], b[1:]))


def _computes(node: fx.Node) -> bool:
    """Whether a node is a call whose inputs all have known values, and may be run again."""
    if node.op not in ("call_function", "call_method") or graphs.in_transform(node):
        return False
    return all(n.meta.get(graphs.VALUE) is not None for n in node.all_input_nodes)


def _evaluate(node: fx.Node, mode: FakeTensorMode | None, contexts: Contexts) -> Any:
    """The value of a node. Nothing is recorded: a user's hooks on saved tensors would see it."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta[graphs.VALUE])
    # Symbolic sizes need the Python decompositions of composite ops, as in Dynamo itself.
    faking = mode or contextlib.nullcontext()
    with torch.no_grad(), contexts.of(node).casting(), enable_python_dispatcher(), faking:
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _fake_mode(module: fx.GraphModule) -> FakeTensorMode | None:
    """The mode of a graph's values: of all, since ``torch.arange(size)`` has no tensor to tell it
    by, and would be a real tensor, of a size that is a constant from then on."""
    values = (n.meta.get(graphs.VALUE) for n in module.graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


def _may_require_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(map(str, value.shape)), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(_signature(v) for v in value)
    return type(value)
