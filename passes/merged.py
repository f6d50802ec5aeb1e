"""Pass `merged`: a layer whose rotations are the identity is a plain linear."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from poetx_compile.passes import gains, graphs, sides
from poetx_compile.passes.contract import GraphPass, Refusal


class Merged(GraphPass[fx.Node]):
    """Linear over a weight whose rotations are the identity → the product, and nothing else.

    Before (x: [..., m], W: [n, m], in its natural order)::

        w: [n, m] = poetx.identity_equivalence(W, skew_in, skew_out, perm_in, perm_out, b, b')
        y: [..., n] = linear(x, w, bias)

    After::

        v: [..., n] = poetx.merged_linear(x, W, skew_in, skew_out, perm_in, perm_out, b, b')
        y: [..., n] = v + bias.type_as(v)

    The same function bitwise, but for where the bias is added; the skew parameters are named for
    their gradients alone, which come from blocks of (x, dx) and (v, dv). Permutations say which
    columns those take. No [n, m] gradient arises: W takes none (it is detached where the user has
    unfrozen it).

    Handles several calls with one weight, any leading shape, dynamic shapes, autocast (W is cast
    once for all calls of a context), a side of size 1 (no rotation there). Refuses a weight that
    anything but ``F.linear`` reads (such as ``F.multi_head_attention_forward``): it stays
    weight-centric, which is right and costs the gradient of a dense weight.
    """

    name = "merged"

    def sites(self, graph: fx.Graph) -> Iterable[fx.Node]:
        return [node for node in graph.nodes if graphs.is_op(node, graphs.IDENTITY)]

    def decide(self, site: fx.Node) -> str:
        if reason := sides.refusal_of_calls(self.contexts, site):
            raise Refusal(f"weight-centric: {reason}")
        gains.check_without(site)
        return self.name

    def describe(self, site: fx.Node) -> dict[str, Any]:
        return sides.described(site)

    def apply(self, graph: fx.Graph, site: fx.Node) -> None:
        first = next(iter(site.users), site)
        stored = sides.frozen(self.contexts, site, site.args[0], first)
        for linear in list(site.users):
            self._replace(graph, linear, site, stored)
        graph.erase_node(site)

    def _replace(self, graph: fx.Graph, linear: fx.Node, site: fx.Node, stored: fx.Node) -> None:
        x, _, bias = graphs.linear_arguments(linear)
        dtype, value = sides.compute_dtype(linear), stored.meta.get(graphs.VALUE)
        weight = stored
        if dtype is not None and (value is None or value.dtype != dtype):
            cast = self.contexts, site, "to", (stored, dtype), linear, graphs.FOLDED_WEIGHT
            weight = sides.once(*cast)
        with graph.inserting_before(linear):
            target = torch.ops.poetx.merged_linear.default
            product = graph.call_function(target, (x, weight, *site.args[1:]))
            product = graphs.inherit(product, linear, graphs.OUTPUT)
            y = sides.add_bias(graph, product, bias, linear)
        linear.replace_all_uses_with(y)
        graph.erase_node(linear)
