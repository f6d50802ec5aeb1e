"""Regions: values whose columns correspond one by one, with the permutations at their ends."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from poetx_compile.passes import columns, graphs


class Permuted(NamedTuple):
    """The coordinates of ``permute_columns(x, pair, inverse)``, where x has the natural ones."""

    pair: fx.Node
    inverse: bool


@dataclasses.dataclass
class Region:
    """Values that columnwise nodes connect.

    Attributes:
        values: in graph order: columnwise nodes, and what feeds them.
        operands: the columnwise ones, each with the values its columns come from.
        producers: values that end in a permutation, with the coordinates it comes from.
        readers: nodes that begin with a permutation of a value, with those it goes to.
    """

    values: list[fx.Node]
    operands: dict[fx.Node, list[fx.Node]]
    producers: dict[fx.Node, Permuted]
    readers: dict[fx.Node, Permuted]

    @property
    def coordinates(self) -> list[Permuted]:
        """The permutations at the ends, each once."""
        return list(dict.fromkeys([*self.producers.values(), *self.readers.values()]))

    def ends(self, coordinates: Permuted) -> tuple[list[fx.Node], list[fx.Node]]:
        """The producers and the readers of one permutation."""
        producers = [n for n, c in self.producers.items() if c == coordinates]
        return producers, [n for n, c in self.readers.items() if c == coordinates]

    def is_activation(self, value: fx.Node) -> bool:
        """Whether a value has rows of columns, unlike a bias or the weight of a norm."""
        if value.meta[graphs.VALUE].dim() > 1:
            return True
        return all(n.meta[graphs.VALUE].dim() == 1 for n in self.values)


def regions(graph: fx.Graph) -> Iterator[Region]:
    """The regions with a permutation at an end, in graph order.

    A permuted copy would miss a write in place: what is written to is connected with nothing, and a
    permutation there is an end of a region of its own.
    """
    mutated = columns.mutated(graph)
    operands = {
        node: wide
        for node in graph.nodes
        if (wide := columns.operands(node)) and mutated.isdisjoint([node, *wide])
    }
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent.setdefault(node, node) is not node:
            parent[node] = node = parent[parent[node]]
        return node

    for node, wide in operands.items():
        for operand in wide:
            parent[root(operand)] = root(node)
    producers: dict[fx.Node, dict[fx.Node, Permuted]] = defaultdict(dict)
    readers: dict[fx.Node, dict[fx.Node, Permuted]] = defaultdict(dict)
    written: list[Region] = []
    for node in graph.nodes:
        begins, ends = _permutations(node)
        if begins is not None:
            if node.args[0] in mutated:
                written.append(Region([node.args[0]], {}, {}, {node: begins}))
            else:
                readers[root(node.args[0])][node] = begins
        if ends is not None:
            if node in mutated:
                written.append(Region([node], {}, {node: ends}, {}))
            else:
                producers[root(node)][node] = ends
    values: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node in parent:
            values[root(node)].append(node)
    for at, nodes in values.items():
        if producers[at] or readers[at]:
            inner = {node: operands[node] for node in nodes if node in operands}
            yield Region(nodes, inner, producers[at], readers[at])
    yield from written


def _permutations(node: fx.Node) -> tuple[Permuted | None, Permuted | None]:
    """The coordinates a node takes its input to, and those its result comes from."""
    if graphs.is_op(node, torch.ops.poetx.rotate_blocks):
        gather, scatter = node.args[2:4]
        return _by_input(gather, False), _by_input(scatter, False)
    if graphs.is_op(node, torch.ops.poetx.folded_linear):
        # Its weight carries the permutations as well; one that several calls read keeps them.
        if len(node.args[1].users) > 1:  # type: ignore[union-attr]
            return None, None
        return _by_input(node.args[4], False), _by_input(node.args[5], False)
    if graphs.is_op(node, torch.ops.poetx.permute_columns):
        pair, inverse = node.args[1], bool((*node.args, False)[2])
        return _by_input(pair, inverse), _by_input(pair, not inverse)
    return None, None


def _by_input(pair: Any, inverse: bool) -> Permuted | None:
    """Coordinates by an input of the graph: any node may use it."""
    usable = isinstance(pair, fx.Node) and pair.op == "placeholder"
    return Permuted(pair, inverse) if usable else None
