"""Pass `cancel_permutations`: permutations that meet are not done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from poetx_compile.passes import columns, graphs
from poetx_compile.passes.contexts import Context, Contexts
from poetx_compile.passes.contract import GraphPass, Refusal
from poetx_compile.passes.regions import Permuted, Region, regions
from poetx_compile.passes.share_permutations import FUSED

# Prices of permutations. Only their order matters: one that a rotation does on the way is a little
# cheaper than one of its own, so that fewer are done or nothing changes; a vector is almost free.
# A folded layer permutes its weight and reads permuted columns in the backward alone. Chunks of
# columns are gathered inside the kernels, where they are almost free as well.
_OWN, _FUSED, _FOLDED, _VECTOR = 1025, 1024, 512, 1

_PAIRS = {
    torch.ops.poetx.rotate_blocks.default: (2, 3),
    torch.ops.poetx.folded_linear.default: (4, 5),
    torch.ops.poetx.fold_weight.default: (3, 4),
}
"""Which arguments are the permutations of the input and of the output side."""


@dataclasses.dataclass
class Plan:
    """What is computed in permuted coordinates.

    Attributes:
        region: where.
        coordinates: the permutation.
        values: nodes whose columns become permuted; a permutation at their end is left out.
        readers: nodes that permute what they read, and are going to read it permuted.
        conversions: values that are permuted, or put back, for some of their users.
    """

    region: Region
    coordinates: Permuted
    values: set[fx.Node]
    readers: set[fx.Node]
    conversions: list[fx.Node]

    @property
    def removed(self) -> int:
        """Number of permutations that are left out."""
        return len(self.readers) + sum(n in self.region.producers for n in self.values)

    @property
    def added(self) -> int:
        """Number of permutations of activations that are added."""
        return sum(map(self.region.is_activation, self.conversions))

    def misread_by(self, value: fx.Node) -> list[fx.Node]:
        """The users of a value that want the form it does not have."""
        other = value not in self.values
        return [user for user in value.users if self._wants_permuted(user, value) is other]

    def _wants_permuted(self, user: fx.Node, value: fx.Node) -> bool | None:
        """``None`` where either form will do."""
        if value in self.region.operands.get(user, ()):
            return user in self.values
        if user in self.readers and user.args[0] is value:
            return True
        return None if columns.reads_any_order(user, value) else False


@dataclasses.dataclass
class Site:
    """A region with two or more permutations at its ends, and what is worth changing there.

    A region without values stands for ends of one permutation that do not meet.
    """

    region: Region
    plans: list[Plan]


class CancelPermutations(GraphPass[Site]):
    """What one layer scatters and another gathers by the same permutation stays permuted between.

    Before (gate.out, up.out and down.in share one permutation; u, v: [..., h])::

        gate: [..., h] = poetx.rotate_blocks(u, g_gate, None, perm, False)
        up: [..., h] = poetx.rotate_blocks(v, g_up, None, perm, False)
        y: [..., h] = silu(gate) * up
        z: [..., h] = poetx.rotate_blocks(y, g_down, perm, None, False)

    After::

        gate': [..., h] = poetx.rotate_blocks(u, g_gate, None, None, False)
        up': [..., h] = poetx.rotate_blocks(v, g_up, None, None, False)
        y': [..., h] = silu(gate') * up'
        z: [..., h] = poetx.rotate_blocks(y', g_down, None, None, False)

    In a folded layer it is the weight that is left in permuted coordinates, on the side in question
    (``fold_weight`` and ``folded_linear`` without that permutation). The same function: bitwise
    through elementwise nodes, up to the order of the sums through norms and reductions over the
    last dimension. ``permute_columns`` forth and back cancels too.

    What lies between may be elementwise, a cast, `rms_norm`, `layer_norm`, a norm written out of
    reductions over the last dimension; a bias or the weight of a norm gets a gather of its own,
    [d]. Where something else feeds or reads a permuted value (an embedding, the head, a view that
    splits heads), it is permuted there. Which nodes stay permuted is the minimum cut between the
    two forms, so that fewer permutations of activations are done, or nothing changes. Leading sizes
    may be anything, symbolic ones included.

    Refuses a region whose permutations belong to different groups (`prepare` takes `shared`), one
    where as many would be added as removed, and sides of one group that do not meet. Stops at
    values that are written in place, at dropout, and at the border of an activation checkpoint.
    """

    name = "cancel_permutations"

    def sites(self, graph: fx.Graph) -> Iterable[Site]:
        claimed: set[fx.Node] = set()
        found = list(regions(graph))
        for region in found:
            # Layers that only read one tensor are the business of share_permutations.
            if len(region.producers) + len(region.readers) < 2 or not (
                region.producers or region.operands
            ):
                continue
            site = Site(region, [])
            for coordinates in region.coordinates:
                plan = _cheapest(region, coordinates, claimed)
                if plan is not None:
                    site.plans.append(plan)
                    claimed |= {*plan.values, *plan.readers, *plan.conversions}
            if site.plans or region.producers:
                yield site
        yield from _apart(found)

    def describe(self, site: Site) -> dict[str, Any]:
        return {"layers": graphs.layers_of([*site.region.producers, *site.region.readers])}

    def decide(self, site: Site) -> str:
        if site.plans:
            removed = sum(plan.removed for plan in site.plans)
            return f"{removed} permutation(s) removed, {sum(p.added for p in site.plans)} added"
        if not site.region.values:
            raise Refusal(
                "share a permutation but do not meet: what is between them sees single columns, "
                "or is written in place"
            )
        if all(sum(map(len, site.region.ends(c))) < 2 for c in site.region.coordinates):
            raise Refusal(
                "permutations of different groups meet: prepare(..., shared=...) makes them one"
            )
        raise Refusal("as many permutations would be added as removed")

    def apply(self, graph: fx.Graph, site: Site) -> None:
        for plan in site.plans:
            _apply(graph, plan, self.contexts)


def _apart(found: list[Region]) -> Iterator[Site]:
    """Ends of one permutation that could cancel, were they not all in regions of their own."""
    for coordinates in dict.fromkeys(c for region in found for c in region.coordinates):
        ends = [region.ends(coordinates) for region in found]
        producers = [node for some, _ in ends for node in some]
        readers = [node for _, some in ends for node in some]
        if producers and readers and max(len(p) + len(r) for p, r in ends) < 2:
            alike = [dict.fromkeys(nodes, coordinates) for nodes in (producers, readers)]
            yield Site(Region([], {}, *alike), [])


def _cheapest(region: Region, coordinates: Permuted, claimed: set[fx.Node]) -> Plan | None:
    """The plan with the fewest permutations; ``None`` where leaving all as it is does no more.

    A minimum cut: each node is on the side of the natural or of the permuted form, and an edge from
    the first to the second that the cut goes through is a permutation that is done.
    """
    import networkx  # comes with torch, whose partitioner uses it

    producers, readers = region.ends(coordinates)
    producers = [n for n in producers if n not in claimed]
    readers = [n for n in readers if claimed.isdisjoint([n, n.args[0]])]
    if len(producers) + len(readers) < 2:
        return None
    movable = set(producers)
    movable |= {n for n, wide in region.operands.items() if claimed.isdisjoint([n, *wide])}
    natural, permuted = "natural", "permuted"
    worth = functools.partial(_price, chunk=_chunk(region, coordinates))
    cut = networkx.DiGraph()
    cut.add_nodes_from([natural, permuted])
    for node in producers:
        cut.add_edge(("value", node), permuted, capacity=worth(node))
    for node in readers:
        cut.add_edge(("reader", node), permuted, capacity=worth(node))
    for value in region.values:
        if value in claimed:
            continue
        itself: Any = ("value", value) if value in movable else natural
        price = _OWN if region.is_activation(value) else _VECTOR
        # One conversion serves all users that want the other form.
        cut.add_edge(itself, ("as permuted", value), capacity=price)
        if value in movable:
            cut.add_edge(("as natural", value), itself, capacity=price)
        for user in value.users:
            if user in movable and value in region.operands.get(user, ()):
                reading: Any = ("value", user)
            elif user in readers and user.args[0] is value:
                reading = ("reader", user)
            elif columns.reads_any_order(user, value):
                continue
            else:
                reading = natural
            if reading != natural:
                cut.add_edge(("as permuted", value), reading)  # no capacity: never cut
            if value in movable:
                cut.add_edge(reading, ("as natural", value))
    cost, (_, beyond) = networkx.minimum_cut(cut, natural, permuted)
    if cost >= sum(map(worth, [*producers, *readers])):
        return None
    chosen = [kind_and_node for kind_and_node in beyond if kind_and_node != permuted]
    plan = Plan(
        region,
        coordinates,
        values={node for kind, node in chosen if kind == "value"},
        readers={node for kind, node in chosen if kind == "reader"},
        conversions=[],
    )
    plan.conversions = [v for v in region.values if v not in claimed and plan.misread_by(v)]
    return plan


def _chunk(region: Region, coordinates: Permuted) -> int:
    """Columns in a chunk of the permutation of this region."""
    pair = graphs.shape_of(coordinates.pair)
    width = columns.width_of(region.values[0])
    return 1 if pair is None or width is None else width // int(pair[1])


def _price(end: fx.Node, chunk: int) -> int:
    if graphs.is_op(end, torch.ops.poetx.permute_columns):
        return _OWN
    if chunk >= FUSED:
        return _VECTOR
    return _FOLDED if graphs.is_op(end, torch.ops.poetx.folded_linear) else _FUSED


def _apply(graph: fx.Graph, plan: Plan, contexts: Contexts) -> None:
    pair, inverse = plan.coordinates
    for value in reversed(plan.conversions):  # so that those of inputs stand in order
        turned = inverse is not (value in plan.values)
        for place, users in _places(value, plan.misread_by(value), contexts):
            with graph.inserting_before(place):
                converted = graph.call_function(
                    torch.ops.poetx.permute_columns.default,
                    (value, pair, True) if turned else (value, pair),
                )
            graphs.inherit(converted, value)
            for user in users:
                user.replace_input_with(value, converted)
    for side, nodes in enumerate((plan.readers, plan.values)):
        for node in nodes:
            if node.target in _PAIRS:
                node.update_arg(_PAIRS[node.target][side], None)
                if graphs.is_op(node, torch.ops.poetx.folded_linear):
                    weight: Any = node.args[1]
                    weight.update_arg(_PAIRS[weight.target][side], None)
            elif graphs.is_op(node, torch.ops.poetx.permute_columns):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                graph.erase_node(node)


def _places(
    value: fx.Node, users: list[fx.Node], contexts: Contexts
) -> Iterable[tuple[fx.Node, list[fx.Node]]]:
    """Where `value` is converted for which of its users.

    Behind the value, in its own context. An input has none: where the graph begins without
    gradients, and some users run with them, there is a conversion for each context.
    """
    behind = _next_computation(value)
    if value.op != "placeholder" or contexts.of(value).records:
        return [(behind, users)]
    by_context: dict[Context, list[fx.Node]] = {}
    for user in sorted(users):
        by_context.setdefault(contexts.of(user), []).append(user)
    return [(some[0], some) for some in by_context.values()]


def _next_computation(value: fx.Node) -> fx.Node:
    """The first node behind `value` that is no input of the graph; inputs come first."""
    node = value.next
    while node.op == "placeholder":
        node = node.next
    return node
