"""Pass `share_permutations`: one gather for all layers fed by the same tensor."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from poetx_compile.passes import graphs
from poetx_compile.passes.contract import GraphPass, Refusal

FUSED = 8
"""Columns in a chunk from which the kernels gather inside a product."""


@dataclasses.dataclass
class Readers:
    """The rotations that gather one tensor in one context, split by the permutation they gather
    with."""

    source: fx.Node
    by_pair: dict[fx.Node, list[fx.Node]]


class SharePermutations(GraphPass[Readers]):
    """q, k, v (gate, up) gather the same tensor by the same permutation → one gather.

    Before (x: [..., m]; q, k and v form a group, so that ``perm_in`` is one tensor)::

        z_q: [..., m] = poetx.rotate_blocks(x, g_q, perm_in, None, False)
        z_k: [..., m] = poetx.rotate_blocks(x, g_k, perm_in, None, False)
        z_v: [..., m] = poetx.rotate_blocks(x, g_v, perm_in, None, False)

    After::

        x': [..., m] = poetx.permute_columns(x, perm_in)
        z_q: [..., m] = poetx.rotate_blocks(x', g_q, None, None, False)
        z_k: [..., m] = poetx.rotate_blocks(x', g_k, None, None, False)
        z_v: [..., m] = poetx.rotate_blocks(x', g_v, None, None, False)

    Bitwise the same. The backward adds the three gradients in permuted coordinates and gathers
    once. Which sides form a group is decided by `prepare` and saved; the pass reads it off the
    graph: a group's permutation is one input. Refuses layers fed by one tensor through
    permutations of different groups, and permutations of chunks of columns, which the kernels
    gather inside the products at no cost.
    """

    name = "share_permutations"

    def sites(self, graph: fx.Graph) -> Iterable[Readers]:
        readers: dict[Any, dict[fx.Node, list[fx.Node]]] = defaultdict(lambda: defaultdict(list))
        for node in graph.nodes:
            if graphs.is_op(node, torch.ops.poetx.rotate_blocks) and node.args[2] is not None:
                readers[node.args[0], self.contexts.of(node)][node.args[2]].append(node)
        return [
            Readers(source, dict(by_pair))
            for (source, _), by_pair in readers.items()
            if sum(map(len, by_pair.values())) > 1
        ]

    def describe(self, site: Readers) -> dict[str, Any]:
        nodes = [node for group in site.by_pair.values() for node in group]
        return {"layers": graphs.layers_of(nodes)}

    def decide(self, site: Readers) -> str:
        shared = {pair: nodes for pair, nodes in site.by_pair.items() if len(nodes) > 1}
        pair = graphs.shape_of(next(iter(site.by_pair)))
        width = graphs.shape_of(site.source)
        if pair is not None and width is not None and int(width[-1]) // int(pair[1]) >= FUSED:
            raise Refusal("chunks of columns are gathered inside the products")
        if not shared:
            raise Refusal("fed by one tensor, but their permutations belong to different groups")
        saved = sum(len(nodes) - 1 for nodes in shared.values())
        return f"{saved} gather(s) saved"

    def apply(self, graph: fx.Graph, site: Readers) -> None:
        for pair, nodes in site.by_pair.items():
            if len(nodes) < 2:
                continue
            with graph.inserting_before(nodes[0]):
                gathered = graph.call_function(
                    torch.ops.poetx.permute_columns.default, (site.source, pair)
                )
            graphs.inherit(gathered, nodes[0], graphs.INTERMEDIATE)
            for node in nodes:
                node.update_arg(0, gathered)
                node.update_arg(2, None)
