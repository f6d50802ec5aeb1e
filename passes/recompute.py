"""Pass `recompute`: what the backward recomputes instead of keeping (variants fast and mem)."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from poetx_compile.passes import cheap, graphs
from poetx_compile.passes.contract import GraphPass

_REGION = 2**31
"""One checkpoint region for all tags: the partitioner saves what passes from a region to a later
one, and nothing tagged here is to be saved. Regions beyond it are ranks, until they are settled."""


class Recompute(GraphPass[fx.Node]):
    """Tags nodes for the partitioner; the graph itself does not change.

    ==========  ================================  ==========================================
    variant     recomputed in the backward        kept for the backward
    ==========  ================================  ==========================================
    ``fast``    rotations (from packed skew)      input-centric: x (or its gather) and u;
                                                  folded: x, v and the folded weight
    ``mem``     rotations, gathers, z and u;      the residual stream; input-centric: x;
                folded weights; what is cheap:    folded: v, where its consumer keeps it
                norms, activations, positions     anyway
    ==========  ================================  ==========================================

    What is made of an int8 weight (``base="int8"``), dequantised or folded, is recomputed in both.

    v is the layer's own output. What multiplies it, or applies an activation or an attention to it,
    keeps it for its own backward; an output that is only added to something (an output or a down
    projection, on its way to the residual stream) is kept by nobody else and is recomputed. The
    norm in front of a layer, and what elementwise nodes make of kept outputs (the product of a gate
    and its partner, rotary positions), cost no product and are recomputed as well.

    With a budget, what ``mem`` recomputes is *ranked*: by the floating point operations of one
    element, and in graph order among equals. Norms, activations and gathers take none; then come
    rotated inputs, folded weights, and products, those over few features first. Behind them come,
    in the same way, what ``mem`` keeps beside the residual stream: the other outputs, and attention
    without dropout. The partitioner gives up as many of them as it takes
    (`poetx_compile.compile.partition`).

    The earlier passes say which node is what (``meta["poetx_role"]``). The tag is
    `CheckpointPolicy.MUST_RECOMPUTE`, as selective activation checkpointing sets it; AOTAutograd
    carries it into the joint graph and its partitioner obeys. Bodies of activation checkpoints are
    recomputed as a whole already and are left alone.
    """

    name = "recompute"
    into_checkpoints = False

    def __init__(self, variant: str, budget: bool = False):
        self.variant, self.budget = variant, budget
        self._ranks: dict[fx.Node, int] = {}

    def sites(self, graph: fx.Graph) -> Iterable[fx.Node]:
        roles = [(node, node.meta.get(graphs.ROLE)) for node in graph.nodes]
        always = {node for node, role in roles if role in _NEVER_KEPT}
        if self.variant == "fast" and not self.budget:
            return [node for node in graph.nodes if node in always]
        again = {node for node, role in roles if role in _RECOMPUTED}
        again |= {node for node, role in roles if role == graphs.OUTPUT and _only_added(node)}
        layers = [n for n in graph.nodes if graphs.is_op(n, *_LAYERS)]
        kept = [n for n, role in roles if role == graphs.OUTPUT and n not in again]
        again |= {*cheap.inputs(graph, layers), *cheap.derived(graph, kept)}
        if self.budget:
            last = {*kept, *layers, *filter(_is_attention, graph.nodes)} - again
            last |= {*cheap.derived(graph, last)} - again
            again |= last
            ranked = sorted(
                (node for node in graph.nodes if node in again - always),
                key=lambda node: (node in last, _flops_an_element(node)),
            )
            self._ranks = {node: rank for rank, node in enumerate(ranked, 1)}
        return [node for node in graph.nodes if node in again]

    def describe(self, site: fx.Node) -> dict[str, Any]:
        return {"layers": graphs.layers_of([site])}

    def decide(self, site: fx.Node) -> str:
        how = "may be" if site in self._ranks else "is"
        return f"{site.name} {how} recomputed in the backward"

    def apply(self, graph: fx.Graph, site: fx.Node) -> None:
        rank = self._ranks.pop(site, 0)
        policies = CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE
        site.meta["recompute"] = policies[rank > 0]
        site.meta["ac_graph_id"] = _REGION + rank


def rank_of(node: fx.Node) -> int | None:
    """The rank that `Recompute` gave under a budget, from 1; 0 for what is recomputed in any case,
    ``None`` for what it did not tag."""
    rank = node.meta.get("ac_graph_id", 0) - _REGION
    return rank if rank >= 0 else None


def resolve(node: fx.Node, *, given_up: bool) -> None:
    """Decide a tagged node: it is recomputed, or left to the partitioner."""
    if given_up:
        node.meta |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": _REGION}
    else:
        del node.meta["recompute"], node.meta["ac_graph_id"]


_NEVER_KEPT = (graphs.ROTATION, graphs.TANGENT, graphs.DEQUANTIZED)
_RECOMPUTED = (*_NEVER_KEPT, graphs.INTERMEDIATE, graphs.FOLDED_WEIGHT)
_PRODUCTS = (torch.ops.poetx.folded_linear, torch.ops.poetx.merged_linear)
_LAYERS = (torch.ops.poetx.rotate_blocks, torch.ops.poetx.permute_columns, *_PRODUCTS)
_ADDITIONS = (operator.add, operator.iadd, torch.add)


def _flops_an_element(node: fx.Node) -> int:
    """Floating point operations that one element of a value takes, from what is kept anyway."""
    if graphs.is_op(node, torch.ops.poetx.rotate_blocks):
        return 2 * _width(node.args[1])
    if graphs.is_op(node, torch.ops.poetx.fold_weight):
        return sum(2 * _width(rotation) for rotation in node.args[1:3] if rotation is not None)
    if graphs.is_linear(node) or graphs.is_op(node, *_PRODUCTS):
        return 2 * _width(node.args[1])
    if _is_attention(node):
        return 4 * _length(node.args[1])
    return 0


def _is_attention(node: fx.Node) -> bool:
    """Whether a node is an attention that gives the same values twice: none is dropped."""
    if node.op != "call_function" or node.target is not F.scaled_dot_product_attention:
        return False
    dropout = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    return isinstance(dropout, int | float) and dropout == 0


def _length(keys: Any) -> int:
    shape = graphs.shape_of(keys)
    return 0 if shape is None else int(shape[-2])


def _width(operand: Any) -> int:
    shape = graphs.shape_of(operand)
    return 0 if shape is None else int(shape[-1])


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
