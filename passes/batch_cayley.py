"""Pass `batch_cayley`: the rotations of several layers in one launch."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from poetx_compile.passes import graphs
from poetx_compile.passes.contract import GraphPass, Refusal

DEFAULT_BYTES = 64 * 2**20
"""Bytes of rotations in one batch: the q, k, v, o sides of a 4096-wide layer at b = 256."""


@dataclasses.dataclass
class Batch:
    """Neighbouring Cayley nodes of one block size, order and dtype, within the byte budget."""

    nodes: list[fx.Node]
    block: int
    order: int


class BatchCayley(GraphPass[Batch]):
    """Cayley-Neumann of several layers → one call over their concatenated blocks.

    Before (skew_i: [B_i, b(b−1)/2] fp32)::

        g_1: [B_1, b, b] = poetx.cayley_neumann(skew_1, b, k)
        g_2: [B_2, b, b] = poetx.cayley_neumann(skew_2, b, k)

    After::

        packed: [B_1+B_2, b(b−1)/2] = cat([skew_1, skew_2])
        g: [B_1+B_2, b, b] = poetx.cayley_neumann(packed, b, k)
        g_1, g_2 = split(g, [B_1, B_2])

    Bitwise the same. Neighbours in graph order are batched until their rotations reach
    `max_bytes`, so that not every rotation of the model is alive at once; with `recompute` the
    backward builds each batch again just before its layers. Handles static and symbolic shapes of
    everything but the skew parameters; a lone node stays as it is. Refuses a skew that is not an
    input of the graph, because it may not exist yet where the batch is built.
    """

    name = "batch_cayley"

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.max_bytes = max_bytes

    def sites(self, graph: fx.Graph) -> Iterable[Batch]:
        alike: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            if graphs.is_op(node, torch.ops.poetx.cayley_neumann):
                value = node.meta[graphs.VALUE]
                alike[(*node.args[1:], value.dtype, value.device)].append(node)
        return [batch for nodes in alike.values() for batch in self._chunks(nodes)]

    def _chunks(self, nodes: list[fx.Node]) -> Iterable[Batch]:
        chunk: list[fx.Node] = []
        held = 0
        for node in nodes:
            value = node.meta[graphs.VALUE]
            size = value.numel() * value.element_size()
            if chunk and held + size > self.max_bytes:
                yield Batch(chunk, *node.args[1:])  # type: ignore[arg-type]
                chunk, held = [], 0
            chunk.append(node)
            held += size
        if chunk:
            yield Batch(chunk, *nodes[0].args[1:])  # type: ignore[arg-type]

    def describe(self, site: Batch) -> dict[str, Any]:
        return {"layers": graphs.layers_of(site.nodes)}

    def decide(self, site: Batch) -> str:
        if len(site.nodes) == 1:
            raise Refusal("alone in its batch: nothing to share a launch with")
        for node in site.nodes:
            if node.args[0].op != "placeholder":  # type: ignore[union-attr]
                raise Refusal(f"skew of {graphs.layer_of(node).name} is not an input of the graph")
        blocks = sum(n.meta[graphs.VALUE].shape[0] for n in site.nodes)
        return f"{len(site.nodes)} sides, {blocks} blocks of {site.block} in one launch"

    def apply(self, graph: fx.Graph, site: Batch) -> None:
        sizes = [n.meta[graphs.VALUE].shape[0] for n in site.nodes]
        with graph.inserting_before(site.nodes[0]):
            packed = graph.call_function(torch.cat, ([n.args[0] for n in site.nodes],))
            rotations = graph.call_function(
                torch.ops.poetx.cayley_neumann.default, (packed, site.block, site.order)
            )
            parts = graph.call_function(torch.split, (rotations, sizes))
            for made in (packed, rotations, parts):
                graphs.inherit(made, site.nodes[0], graphs.ROTATION)
            slices = [graphs.getitem(graph, parts, i) for i in range(len(site.nodes))]
        for node, part in zip(site.nodes, slices, strict=True):
            graphs.inherit(part, node, graphs.ROTATION)
            node.replace_all_uses_with(part)
            graph.erase_node(node)
