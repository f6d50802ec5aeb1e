"""Pass `recompute`: what the backward builds again instead of keeping (variants fast and mem)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from poetx_compile.passes import graphs
from poetx_compile.passes.contract import GraphPass

_REGION = 2**31
"""One checkpoint region for all tags: the partitioner saves what passes from a region to a later
one, and nothing tagged here is to be saved."""


class Recompute(GraphPass[fx.Node]):
    """Tags nodes for the partitioner; the graph itself does not change.

    ==========  ================================  =====================================
    variant     built again in the backward       kept for the backward
    ==========  ================================  =====================================
    ``fast``    rotations (from packed skew)      x (or its gather), u
    ``mem``     rotations, gathers, z and u       x alone
    ==========  ================================  =====================================

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
        roles = {graphs.ROTATION} | ({graphs.INTERMEDIATE} if self.variant == "mem" else set())
        return [n for n in graph.nodes if n.meta.get(graphs.ROLE) in roles]

    def describe(self, site: fx.Node) -> dict[str, Any]:
        return {"layers": graphs.layers_of([site])}

    def decide(self, site: fx.Node) -> str:
        return f"{site.name} is built again in the backward"

    def apply(self, graph: fx.Graph, site: fx.Node) -> None:
        site.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        site.meta["ac_graph_id"] = _REGION
