"""Pass `hoist_folds`: folds leave the graph, so that a weight is folded once for several calls."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from poetx_compile.passes import columns, graphs
from poetx_compile.passes.contract import GraphPass, Refusal

IN_CHECKPOINT = "inside an activation checkpoint, whose body is recomputed with its folds"

_STEPS = frozenset([torch.cat, torch.split, operator.getitem, "detach"])
"""What stands between an input and a fold: nothing that draws numbers or depends on the call."""


class Reads(NamedTuple):
    """The inputs of the graph that a fold is made of, by their positions."""

    skews: tuple[int, ...]
    others: tuple[int, ...]
    """The stored weight and the permutations."""

    @property
    def all(self) -> tuple[int, ...]:
        """All positions, the skews first."""
        return (*self.skews, *self.others)

    @classmethod
    def of(cls, folds: Iterable[fx.Node]) -> Reads:
        """What some folds of one graph read together."""
        folds = list(folds)
        deltas = [delta for fold in folds for delta in fold.args[1:3] if isinstance(delta, fx.Node)]
        skews = {node for delta in deltas for node in _sources(delta)}
        sources = {node for fold in folds for node in _sources(fold)}
        placeholders = enumerate(folds[0].graph.find_nodes(op="placeholder"))
        used = [(i, p) for i, p in placeholders if p in sources]
        return cls(
            tuple(i for i, p in used if p in skews),
            tuple(i for i, p in used if p not in skews),
        )


@dataclasses.dataclass
class Folds:
    """Folds with one fate: they leave the graph together, or stay for one reason."""

    nodes: list[fx.Node]
    obstacle: str | None


class HoistFolds(GraphPass[Folds]):
    """Folds of a graph → inputs of the graph, and a graph of their own that computes them.

    Before (inputs of the graph: x, S, skew, perm, …)::

        d: [m//b, b, b] dtype = poetx.rotation_delta(skew.detach(), b, k, dtype, 0)
        w: [n, m] dtype = poetx.fold_weight(S, d, …, perm, …, dtype)
        v: [..., n] = poetx.folded_linear(x, w, e, …)

    After (w: a new input at the end)::

        v: [..., n] = poetx.folded_linear(x, w, e, …)

    and `module`, a graph over some of the same inputs (`reads` says which)::

        d: [m//b, b, b] dtype = poetx.rotation_delta(skew.detach(), b, k, dtype, 0)
        w: [n, m] dtype = poetx.fold_weight(S, d, …, perm, …, dtype)
        return (w, …)

    Bitwise the same. Who binds the graph to its weights decides how long these are kept. Handles
    folds of inputs alone, through the concatenations and splits of `batch_cayley`; shapes of
    activations may be symbolic. Refuses folds inside activation checkpoints (the weights would have
    to be handed on, and kept where the point was not to keep), of values computed or written in the
    graph, and whatever `refuse` names.

    Args:
        refuse: what a fold reads → a reason to leave it in the graph, or ``None``.

    Attributes:
        module: the graph of the folds, or ``None`` where none has left.
        reads: the inputs of the graph that `module` takes, in the order of their positions.
    """

    name = "hoist_folds"
    into_checkpoints = False  # it tells of the folds there by itself

    def __init__(self, refuse: Callable[[Reads], str | None]):
        self.refuse = refuse
        self.module: fx.GraphModule | None = None
        self.reads = Reads((), ())

    def sites(self, graph: fx.Graph) -> Iterable[Folds]:
        root = graph.owning_module
        assert root is not None
        written = columns.mutated(graph)
        by_obstacle: dict[str | None, list[fx.Node]] = {}
        for module in graphs.nested(root):
            for node in module.graph.nodes:
                if graphs.is_op(node, torch.ops.poetx.fold_weight):
                    inside = IN_CHECKPOINT if module is not root else None
                    obstacle = inside or self._obstacle(node, written)
                    by_obstacle.setdefault(obstacle, []).append(node)
        return [Folds(nodes, obstacle) for obstacle, nodes in by_obstacle.items()]

    def _obstacle(self, fold: fx.Node, written: set[fx.Node]) -> str | None:
        for node in _sources(fold):
            if node.op == "placeholder":
                if node in written:
                    return f"the graph writes to {node.name}, which the fold reads"
            elif not _is_step(node):
                what = getattr(node.target, "__name__", str(node.target))
                return f"the graph computes what is folded, by {what}"
        return self.refuse(Reads.of([fold]))

    def describe(self, site: Folds) -> dict[str, Any]:
        return {"layers": graphs.layers_of(site.nodes)}

    def decide(self, site: Folds) -> str:
        if site.obstacle is not None:
            raise Refusal(site.obstacle)
        return f"{len(site.nodes)} folded weight(s) kept between calls"

    def apply(self, graph: fx.Graph, site: Folds) -> None:
        needed = {source for fold in site.nodes for source in _sources(fold)} | {*site.nodes}
        self.module = _module_of(graph, needed, site.nodes)
        self.reads = Reads.of(site.nodes)
        for fold in site.nodes:
            stored = fold.args[0]
            assert isinstance(stored, fx.Node)
            weight = graphs.add_input(graph, f"{stored.name}folded", fold.meta[graphs.VALUE])
            fold.replace_all_uses_with(weight)
        for node in reversed(graph.nodes):
            if node in needed and node.op != "placeholder" and not node.users:
                graph.erase_node(node)


def _sources(node: fx.Node) -> list[fx.Node]:
    """Everything a node is computed from, inputs of the graph included."""
    found: dict[fx.Node, None] = {}
    pending = list(node.all_input_nodes)
    while pending:
        source = pending.pop()
        if source not in found:
            found[source] = None
            pending += source.all_input_nodes
    return list(found)


def _is_step(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    return node.target in _STEPS or graphs.is_op(node, torch.ops.poetx.rotation_delta)


def _module_of(graph: fx.Graph, needed: set[fx.Node], results: list[fx.Node]) -> fx.GraphModule:
    """The nodes of `needed` as a graph of their own that returns the tuple of `results`."""
    copy = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            copied[node] = copy.node_copy(node, copied.__getitem__)
    copy.output(tuple(copied[node] for node in results))
    return fx.GraphModule(nn.Module(), copy, "Folds")
