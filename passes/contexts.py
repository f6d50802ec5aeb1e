"""What a node finds set around it: grad mode, inference mode, autocast, transforms, streams.

Dynamo marks where such a setting begins and ends by calls that stand between the other nodes
(``_set_grad_enabled``, ``_enter_inference_mode``, ``_enter_autocast``, …); the nodes themselves say
nothing. Code that is shared, batched, moved or hoisted across a mark would run under other
settings, and lose its gradients or its dtype without a word. So a pass asks `Contexts` first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from poetx_compile._torch import (
    _enter_autocast,
    _enter_inference_mode,
    _exit_autocast,
    _exit_inference_mode,
    _set_grad_enabled,
)
from poetx_compile.passes import graphs

_SET_GRAD = (_set_grad_enabled, torch.set_grad_enabled)


class Context(NamedTuple):
    """The settings a node runs under. Nodes of equal contexts may be merged or moved together.

    Attributes:
        grad, inference: grad mode and inference mode.
        autocast: the arguments of the autocast regions around, outermost first.
        others: the marks so far that are not known here (`torch.func` levels, backends of
            attention, …), each a border, and a stream or note of the node itself.
    """

    grad: bool
    inference: bool = False
    autocast: tuple[tuple[Any, ...], ...] = ()
    others: tuple[Any, ...] = ()

    @property
    def records(self) -> bool:
        """Whether autograd records what runs here."""
        return self.grad and not self.inference

    @contextlib.contextmanager
    def casting(self) -> Iterator[None]:
        """The autocast regions, to give a new node a value of the right dtype."""
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled, cached in self.autocast:
                region = torch.autocast(device, dtype, enabled=enabled, cache_enabled=cached)
                stack.enter_context(region)
            yield


class Contexts:
    """The context of every node of a graph module and of the bodies it calls.

    Nodes that are inserted later have the context of the place they stand at. The graph begins
    under the settings of the process: Dynamo restores those of the frame for its backend.

    Args:
        root: a clone (`graphs.clone`), in which marks are known by having no value.
    """

    def __init__(self, root: fx.GraphModule):
        self.root = root
        self._begin: dict[fx.Graph, Context] = {}
        self._behind: dict[fx.Node, Context] = {}
        ambient = Context(torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        self._walk(root, ambient)

    def of(self, node: fx.Node) -> Context:
        """The context `node` runs under."""
        place = node
        while place not in self._behind and place.op != "root":
            place = place.prev
        if place.op == "root":  # a body that nobody calls: nothing is known of it
            context = self._begin.get(node.graph) or Context(True, others=(node.graph,))
        else:
            context = self._behind[place]
        annotation = node.meta.get("custom")  # a stream, or what the user noted
        if not annotation:
            return context
        return context._replace(others=(*context.others, repr(annotation)))

    def same(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two nodes run under the same settings, in the same graph."""
        return a.graph is b.graph and self.of(a) == self.of(b)

    def _walk(self, module: fx.GraphModule, context: Context) -> None:
        earlier = self._begin.get(module.graph)
        if earlier is not None and earlier != context:  # called under several settings
            context = Context(earlier.grad or context.grad, others=(module.graph,))
        if earlier == context:
            return
        self._begin[module.graph] = context
        before: dict[fx.Node, Context] = {}
        for node in module.graph.nodes:
            if is_mark(node):
                before[node] = context
                context = _behind(node, context, before)
            else:
                for body in graphs.bodies(node):
                    self._walk(body, context)
            self._behind[node] = context


def without_inference_mode(root: fx.GraphModule) -> None:
    """Make inference mode ``no_grad``, in place, which is the same to compiled code.

    AOTAutograd cannot trace the first: any call on torch 2.11, a `detach` on 2.13, and where it
    fails it leaves the process unusable.
    """
    contexts = Contexts(root)
    modes = (_enter_inference_mode, _exit_inference_mode)
    marks = [n for m in graphs.nested(root) for n in m.graph.nodes if is_mark(n)]
    if not any(mark.target in modes for mark in marks):
        return
    for mark in reversed(marks):  # an exit reads its entry
        if mark.target in (*modes, *_SET_GRAD):
            with mark.graph.inserting_before(mark):
                records = contexts.of(mark).records
                new = mark.graph.call_function(_set_grad_enabled, (records,))
            new.meta[graphs.VALUE] = None
            mark.graph.erase_node(mark)
    for module in graphs.nested(root):
        module.recompile()


def is_mark(node: fx.Node) -> bool:
    """Whether a node is called for what it sets: it has no value and reads none."""
    if node.op != "call_function" or node.meta.get(graphs.VALUE, node) is not None:
        return False
    return all(map(is_mark, node.all_input_nodes))


def _behind(mark: fx.Node, context: Context, before: dict[fx.Node, Context]) -> Context:
    """The context behind a mark; `before` has those in front of this mark and of earlier ones."""
    if mark.target in _SET_GRAD:
        return context._replace(grad=bool(mark.args[0]))
    if mark.target is _enter_inference_mode:
        return context._replace(grad=not mark.args[0], inference=bool(mark.args[0]))
    if mark.target is _enter_autocast:
        return context._replace(autocast=(*context.autocast, mark.args))
    opened = [node for node in mark.all_input_nodes if node in before]
    if opened and mark.target is _exit_inference_mode:
        outside = before[opened[0]]
        return context._replace(grad=outside.grad, inference=outside.inference)
    if opened and mark.target is _exit_autocast:
        return context._replace(autocast=before[opened[0]].autocast)
    return context._replace(others=(*context.others, mark))
