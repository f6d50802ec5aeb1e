"""What is kept for the backward: torch's min-cut partitioner, told by the pass `recompute`.

*Reductions stay.* The pass tags nodes of Dynamo's graph, and a norm is one node there. Building it
again would read each row twice; its mean, one number a row, costs nothing to keep.

*Budgets.* Under a ``memory_budget`` the pass says what the backward could recompute, in the order
of what that costs. How many bytes it saves is known only once the joint graph is split: it is split
a first time with nothing given up, which is what variant ``"fast"`` keeps, and again with as much
given up as the budget asks for. torch's own budget
(`torch._functorch.config.activation_memory_budget`) does not know the ops of this package: it takes
their products for free and builds them all again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from poetx_compile._torch import CustomPartitionerFn, pytree
from poetx_compile.config import POETXConfig
from poetx_compile.passes import graphs, recompute

log = logging.getLogger("poetx_compile")

Bytes = dict[int, int]
"""Storages (by the identity of the fake one) and their sizes in bytes."""

_REDUCED = 8
"""A value this many times smaller than what it is made of is a reduction."""


def partitioner_for(config: POETXConfig) -> Partitioner | None:
    """The partitioner that a configuration needs; ``None`` where torch's own does."""
    if config.variant == "fast" and config.memory_budget is None:
        return None
    return Partitioner(config.memory_budget)


class Partitioner(CustomPartitionerFn):
    """torch's min-cut partitioner as Inductor and AOTAutograd call it, for what is tagged.

    Args:
        fraction: the memory budget, if there is one: what may be kept between forward and backward,
            of the bytes that variant ``"fast"`` keeps; inputs of the graph are not counted. Where
            even the least that the passes know is more, that is kept, and a warning says how much
            it is.
    """

    def __init__(self, fraction: float | None):
        self.fraction = fraction

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        if self.fraction is None:
            return _split(gm, joint_inputs, 0, kwargs)
        ranks: dict[int, int] = {}  # by storage: what is kept of a value may be a view of it
        for node in gm.graph.nodes:
            for storage in storages(node):
                ranks.setdefault(storage, recompute.rank_of(node) or 0)
        left = sorted(set(ranks.values()) - {0})
        parts = _split(gm, joint_inputs, 0, kwargs)
        kept = _kept(parts[0], kwargs["num_fwd_outputs"])
        most = actual = sum(kept.values())
        saves = dict.fromkeys(left, 0)
        for storage, size in kept.items():
            if rank := ranks.get(storage):
                saves[rank] += size
        # Once mostly; again where a value that was given up needs another one to be kept.
        while actual > self.fraction * most and left:
            excess, limit = actual - self.fraction * most, 0
            while left and excess > 0:
                limit = left.pop(0)
                excess -= saves[limit]
            parts = _split(gm, joint_inputs, limit, kwargs)
            actual = sum(_kept(parts[0], kwargs["num_fwd_outputs"]).values())
        log.debug("memory_budget: %d of %d bytes are kept", actual, most)
        if actual > self.fraction * most:
            log.warning(
                "memory_budget = %g cannot be met: the least that the passes know to keep is %.2f "
                "of what variant 'fast' keeps (%.1f of %.1f MiB). That is what is kept now. For "
                "less, use activation checkpointing of the model's own blocks, or a smaller batch",
                *(self.fraction, actual / most, actual / 2**20, most / 2**20),
            )
        return parts

    def uuid(self) -> Any:
        """The sources are covered by the uuid of `ExpandOps`, in the same cache keys."""
        return "poetx_compile.compile.partition", self.fraction


def _split(
    gm: fx.GraphModule, joint_inputs: Sequence[object], limit: int, kwargs: Mapping[str, Any]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a copy of the joint graph, with what is ranked up to `limit` given up."""
    from poetx_compile._torch import min_cut_rematerialization_partition

    joint = graphs.clone(gm)
    for node in joint.graph.nodes:
        rank = recompute.rank_of(node)
        if rank is not None:
            recompute.resolve(node, given_up=rank <= limit and not _is_reduced(node))
    options: dict[str, Any] = {"compiler": "inductor", **kwargs}
    forward, backward = min_cut_rematerialization_partition(joint, joint_inputs, **options)
    return forward, backward


def _is_reduced(node: fx.Node) -> bool:
    """Whether a value is much smaller than what it is made of, and no view of it."""
    above = {storage for n in node.all_input_nodes for storage in storages(n)}
    largest = max(map(_size, node.all_input_nodes), default=0)
    return 0 < _size(node) * _REDUCED <= largest and above.isdisjoint(storages(node))


def _size(node: fx.Node) -> int:
    """Bytes of a node's value, if that is a tensor."""
    value = node.meta.get("val")
    return _hint(value.numel()) * value.element_size() if isinstance(value, Tensor) else 0


def _kept(forward: fx.GraphModule, outputs: int) -> Bytes:
    """The storages that a forward hands to its backward."""
    (results,) = forward.graph.find_nodes(op="output")[0].args
    handed = [n for n in results[outputs:] if isinstance(n, fx.Node) and n.op != "placeholder"]
    return {storage: size for node in handed for storage, size in storages(node).items()}


def storages(node: fx.Node) -> Bytes:
    """The storages of a node's value in a graph of AOTAutograd."""
    values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    found = [v.untyped_storage() for v in values]
    return {s._cdata: _hint(s.nbytes()) for s in found}


def _hint(size: int | torch.SymInt) -> int:
    """A size as seen when the graph was traced; adds no guard."""
    return int(size.node.hint or 0) if isinstance(size, torch.SymInt) else int(size)
