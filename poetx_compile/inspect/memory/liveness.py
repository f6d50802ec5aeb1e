"""The bytes alive while traced graphs run, as Inductor would run them.

A value takes memory from the kernel that writes it to the last that reads it. What Inductor fuses
is never written: elementwise nodes, views and index reads exist inside the kernels that read them,
unless a product, an attention, an op of this package or the caller reads them. A fused kernel
writes over an input of its output's size that nobody reads after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from poetx_compile.compile.partition import Bytes, storages

_READS = 4
"""Buffers a fused value reads before Inductor writes it where several kernels want it
(`torch._inductor.config.realize_reads_threshold`)."""

_aten, _prims = torch.ops.aten, torch.ops.prims

_FUSED = frozenset(
    [
        _prims.convert_element_type,
        _prims.iota,
        _aten.arange,
        _aten.cat,
        _aten.clone,
        _aten.constant_pad_nd,
        _aten.embedding,
        _aten.flip,
        _aten.full,
        _aten.gather,
        _aten.index,
        _aten.index_select,
        _aten.scalar_tensor,
        _aten.select_scatter,
        _aten.slice_scatter,
    ]
)
"""What Inductor inlines beside the elementwise ops."""

_REDUCTIONS = frozenset(
    [
        _aten.amax,
        _aten.amin,
        _aten.any,
        _aten.argmax,
        _aten.mean,
        _aten.prod,
        _aten.sum,
        _aten.var,
        _aten.var_mean,
        _prims.xor_sum,
    ]
)
"""What fuses with its inputs, but is written."""


Observer = Callable[[fx.Node | None, int, Bytes], None]


def run(graph: fx.Graph, held: Bytes, observe: Observer) -> Bytes:
    """Go through the kernels of a graph; returns the storages that its outputs leave.

    Args:
        held: storages alive at the start that the graph may free; those of its other inputs belong
            to somebody else and are not counted.
        observe: called at the start, and for each kernel with its node, the bytes alive in it, and
            the storages.
    """
    written = _Written(graph)
    kernels = [(node, written.operands(node)) for node in graph.nodes if written.is_written(node)]
    returned = written.operands(graph.output_node())
    last = {storage: i for i, (_, operands) in enumerate(kernels) for storage in operands}
    own: Bytes = dict(held)
    inputs = {s for node in graph.find_nodes(op="placeholder") for s in storages(node)}
    alive: Bytes = {s: n for s, n in held.items() if s in last or s in returned}
    observe(None, total(held), held)
    for i, (node, operands) in enumerate(kernels):
        made = {s: n for s, n in storages(node).items() if s not in inputs}
        own |= made
        dying = {s: alive[s] for s in operands if s in alive and last[s] == i and s not in returned}
        now = total(alive) + total(made)
        if _fuses(node):
            reused = [n for n in dying.values() if n in made.values()]
            now -= reused[0] if reused else 0
        observe(node, now, alive | made)
        alive |= made
        for storage in (*dying, *(s for s in made if s not in last and s not in returned)):
            del alive[storage]
    return {s: own[s] for s in returned if s in own}


def total(sizes: Bytes) -> int:
    """The bytes of all storages."""
    return sum(sizes.values())


class _Written:
    """Which nodes of a graph are written to memory, and what each kernel reads."""

    def __init__(self, graph: fx.Graph):
        self._reads: dict[fx.Node, frozenset[int]] = {}
        self._is_written: dict[fx.Node, bool] = {}
        for node in graph.nodes:  # in order: inputs are known before their readers
            operands = self.operands(node)
            is_input = node.op in ("placeholder", "get_attr")
            self._is_written[node] = not is_input and self._decide(node, operands)
            own = is_input or self._is_written[node]
            self._reads[node] = frozenset(storages(node)) if own else operands

    def is_written(self, node: fx.Node) -> bool:
        """Whether a kernel of its own writes the value of `node`."""
        return self._is_written[node]

    def operands(self, node: fx.Node) -> frozenset[int]:
        """The storages read to compute `node` from what is written."""
        return frozenset().union(*(self._reads[n] for n in node.all_input_nodes))

    def _decide(self, node: fx.Node, operands: frozenset[int]) -> bool:
        if node.op == "output" or _is_view(node):
            return False
        if not _is_fused(node):
            return True
        readers = list(_readers(node))
        if any(not _fuses(reader) for reader in readers):
            return True
        return len(readers) > 1 and len(operands) > _READS


def _is_view(node: fx.Node) -> bool:
    """Whether a node's value shares its storage with an input's, or is part of a tuple."""
    own = storages(node)
    above = {s for n in node.all_input_nodes for s in storages(n)}
    return not own or bool(own.keys() & above)


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _is_fused(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or _packet(node) in _FUSED


def _fuses(node: fx.Node) -> bool:
    """Whether a node's kernel computes its inputs itself, where they are fused."""
    return _is_fused(node) or _packet(node) in _REDUCTIONS


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    """The nodes that read a value, through views of it."""
    for user in node.users:
        if user.op != "output" and _is_view(user):
            yield from _readers(user)
        else:
            yield user
