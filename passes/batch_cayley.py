"""Pass `batch_cayley`: the rotations of several layers in one launch."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from poetx_compile.passes import gradients, graphs
from poetx_compile.passes.contract import GraphPass, Refusal

DEFAULT_BYTES = 64 * 2**20
"""Bytes of rotations in one batch: the q, k, v, o sides of a 4096-wide layer at b = 256."""

_OPS = (
    torch.ops.poetx.cayley_neumann,
    torch.ops.poetx.rotation_delta,
    torch.ops.poetx.rotation_tangent,
)
_FLIPPED = 4
"""Position of `flipped`, the number of transposed blocks, in the ops that have it."""


@dataclasses.dataclass
class Batch:
    """Neighbouring nodes of one op with one block size, order, … and dtype, in one context, within
    the budget."""

    nodes: list[fx.Node]

    @property
    def block(self) -> int:
        return self.nodes[0].args[1]  # type: ignore[return-value]


class BatchCayley(GraphPass[Batch]):
    """Cayley-Neumann of several layers → one call over their concatenated blocks.

    Before (skew_i: [B_i, b(b−1)/2] fp32)::

        g_1: [B_1, b, b] = poetx.cayley_neumann(skew_1, b, k, narrow)
        g_2: [B_2, b, b] = poetx.cayley_neumann(skew_2, b, k, narrow)

    After::

        packed: [B_1+B_2, b(b−1)/2] = cat([skew_1, skew_2])
        g: [B_1+B_2, b, b] = poetx.cayley_neumann(packed, b, k, narrow)
        g_1, g_2 = split(g, [B_1, B_2])

    The same with ``poetx.rotation_delta``, and with ``poetx.rotation_tangent``, where it is the
    backward that is batched; nodes of transposed blocks come last in a batch. Bitwise the same.
    Neighbours in graph order are batched until their rotations reach `max_bytes`, so that not every
    rotation of the model is alive at once; with `recompute` the backward recomputes each batch
    just before its layers. A batch has one context, and none of what no backward reaches: its
    gradient would be zeros, not ``None``. Handles static and symbolic shapes of everything but the
    skew parameters; a lone node stays as it is. Refuses a skew that is not an input of the graph
    (or such an input detached), because it may not exist yet where the batch is built.
    """

    name = "batch_cayley"

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.max_bytes = max_bytes
        self._live: set[fx.Node] = set()

    def sites(self, graph: fx.Graph) -> Iterable[Batch]:
        if graph is self.contexts.root.graph:  # the first, and its bodies with it
            self._live = gradients.live(self.contexts)
        alike: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            if graphs.is_op(node, *_OPS):
                value = node.meta[graphs.VALUE]
                reached = not value.requires_grad or node in self._live
                about = reached, self.contexts.of(node), value.dtype, value.device
                alike[(node.target, *node.args[1:_FLIPPED], *about)].append(node)
        return [batch for nodes in alike.values() for batch in self._chunks(nodes)]

    def _chunks(self, nodes: list[fx.Node]) -> Iterable[Batch]:
        chunk: list[fx.Node] = []
        held = 0
        for node in nodes:
            value = node.meta[graphs.VALUE]
            size = value.numel() * value.element_size()
            if chunk and held + size > self.max_bytes:
                yield Batch(chunk)
                chunk, held = [], 0
            chunk.append(node)
            held += size
        if chunk:
            yield Batch(chunk)

    def describe(self, site: Batch) -> dict[str, Any]:
        return {"layers": graphs.layers_of(site.nodes)}

    def decide(self, site: Batch) -> str:
        if len(site.nodes) == 1:
            raise Refusal("alone in its batch: nothing to share a launch with")
        for node in site.nodes:
            if _parameter(node).op != "placeholder":
                raise Refusal(f"skew of {graphs.layer_of(node).name} is not an input of the graph")
        blocks = sum(n.meta[graphs.VALUE].shape[0] for n in site.nodes)
        what = "tangents" if site.nodes[0].meta.get(graphs.ROLE) == graphs.TANGENT else "sides"
        return f"{len(site.nodes)} {what}, {blocks} blocks of {site.block} in one launch"

    def apply(self, graph: fx.Graph, site: Batch) -> None:
        first = site.nodes[0]
        role = first.meta.get(graphs.ROLE, graphs.ROTATION)
        nodes = sorted(site.nodes, key=_flipped)  # stable: transposed ones last
        sizes = [n.meta[graphs.VALUE].shape[0] for n in nodes]
        flipped = sum(map(_flipped, nodes))
        with graph.inserting_before(first):
            packed = graph.call_function(torch.cat, ([_parameter(n) for n in nodes],))
            graphs.inherit(packed, first, graphs.ROTATION)
            if _is_detached(first):
                packed = graph.call_method("detach", (packed,))
                graphs.inherit(packed, first, graphs.ROTATION)
            arguments = (
                packed,
                *first.args[1:_FLIPPED],
                *([flipped] * (len(first.args) > _FLIPPED)),
            )
            together = graph.call_function(first.target, arguments)  # type: ignore[arg-type]
            parts = graph.call_function(torch.split, (together, sizes))
            for node in (together, parts):
                graphs.inherit(node, first, role)
            slices = [graphs.getitem(graph, parts, i) for i in range(len(nodes))]
        for node, part in zip(nodes, slices, strict=True):
            graphs.inherit(part, node, role)
            part.meta[gradients.SLICE_OF] = _parameter(node)
            node.replace_all_uses_with(part)
            read = node.args[0]
            graph.erase_node(node)
            if isinstance(read, fx.Node) and read.op == "call_method" and not read.users:
                graph.erase_node(read)


def _flipped(node: fx.Node) -> int:
    """How many of a node's blocks are transposed: all or none."""
    return node.args[_FLIPPED] if len(node.args) > _FLIPPED else 0  # type: ignore[return-value]


def _is_detached(node: fx.Node) -> bool:
    skew = node.args[0]
    return isinstance(skew, fx.Node) and skew.op == "call_method" and skew.target == "detach"


def _parameter(node: fx.Node) -> fx.Node:
    """The skew parameter a node reads, as it is or detached."""
    skew: Any = node.args[0]
    if _is_detached(node):
        skew = skew.args[0]
    assert isinstance(skew, fx.Node)
    return skew
