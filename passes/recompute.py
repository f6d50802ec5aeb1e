"""Pass `recompute`: what the backward builds again instead of keeping (variants fast and mem)."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from poetx_compile.passes import cheap, graphs
from poetx_compile.passes.contract import GraphPass

_REGION = 2**31
"""One checkpoint region for all tags: the partitioner saves what passes from a region to a later
one, and nothing tagged here is to be saved."""


class Recompute(GraphPass[fx.Node]):
    """Tags nodes for the partitioner; the graph itself does not change.

    ==========  ================================  ==========================================
    variant     built again in the backward       kept for the backward
    ==========  ================================  ==========================================
    ``fast``    rotations (from packed skew)      input-centric: x (or its gather) and u;
                                                  folded: x, v and the folded weight
    ``mem``     rotations, gathers, z and u;      the residual stream; input-centric: x;
                folded weights; what is cheap:    folded: v, where its consumer keeps it
                norms, activations, positions     anyway
    ==========  ================================  ==========================================

    v is the layer's own output. What multiplies it, or applies an activation or an attention to it,
    keeps it for its own backward; an output that is only added to something (an output or a down
    projection, on its way to the residual stream) is kept by nobody else and is built again. The
    norm in front of a layer, and what elementwise nodes make of kept outputs (the product of a gate
    and its partner, rotary positions), cost no product and are built again as well.

    The earlier passes say which node is what (``meta["poetx_role"]``). The tag is
    `CheckpointPolicy.MUST_RECOMPUTE`, as selective activation checkpointing sets it; AOTAutograd
    carries it into the joint graph and its partitioner obeys. Bodies of activation checkpoints are
    recomputed as a whole already and are left alone.
    """

    name = "recompute"
    into_checkpoints = False

    def __init__(self, variant: str):
        self.variant = variant

    def sites(self, graph: fx.Graph) -> Iterable[fx.Node]:
        roles = [(node, node.meta.get(graphs.ROLE)) for node in graph.nodes]
        if self.variant == "fast":
            return [node for node, role in roles if role in _NEVER_KEPT]
        again = {node for node, role in roles if role in _BUILT_AGAIN}
        again |= {node for node, role in roles if role == graphs.OUTPUT and _only_added(node)}
        layers = [n for n in graph.nodes if graphs.is_op(n, *_LAYERS)]
        kept = [n for n, role in roles if role == graphs.OUTPUT and n not in again]
        again |= {*cheap.inputs(graph, layers), *cheap.derived(graph, kept)}
        return [node for node in graph.nodes if node in again]

    def describe(self, site: fx.Node) -> dict[str, Any]:
        return {"layers": graphs.layers_of([site])}

    def decide(self, site: fx.Node) -> str:
        return f"{site.name} is built again in the backward"

    def apply(self, graph: fx.Graph, site: fx.Node) -> None:
        site.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        site.meta["ac_graph_id"] = _REGION


_NEVER_KEPT = (graphs.ROTATION, graphs.TANGENT)
_BUILT_AGAIN = (*_NEVER_KEPT, graphs.INTERMEDIATE, graphs.FOLDED_WEIGHT)
_LAYERS = (
    torch.ops.poetx.rotate_blocks,
    torch.ops.poetx.permute_columns,
    torch.ops.poetx.folded_linear,
)
_ADDITIONS = (operator.add, operator.iadd, torch.add)


def _only_added(output: fx.Node) -> bool:
    """Whether a layer's output goes into sums alone, whose backward needs no operand."""
    for user in output.users:
        if user.op != "call_function" or user.target not in _ADDITIONS:
            return False
        other = next((a for a in user.args if a is not output), None)
        shape = graphs.shape_of(other)
        is_bias = shape is not None and len(shape) == 1
        if is_bias and not _only_added(user):
            return False
    return bool(output.users)
