"""Pass `input_centric`: rotate activations instead of building the effective weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from poetx_compile.passes import graphs, sides
from poetx_compile.passes.contract import GraphPass, Refusal

LEAVES = "weight-centric: the weight leaves the graph, not read by F.linear there"


class InputCentric(GraphPass[fx.Node]):
    """Linear over an orthogonal-equivalence weight → rotate, linear with the frozen weight, rotate.

    Before (x: [..., m], S: [n, m])::

        w: [n, m] = poetx.orthogonal_equivalence(S, skew_in, skew_out, perm_in, perm_out, b, b', k)
        y: [..., n] = linear(x, w, bias)

    After::

        g_in: [m//b, b, b] fp32 = poetx.cayley_neumann(skew_in, b, k, narrow)
        g_out: [n//b', b', b'] fp32 = poetx.cayley_neumann(skew_out, b', k, narrow)
        z: [..., m] = poetx.rotate_blocks(x, g_in, perm_in, None, False)
        u: [..., n] = linear(z, S, None)
        v: [..., n] = poetx.rotate_blocks(u, g_out, None, perm_out, False)
        y: [..., n] = v + bias.type_as(v)

    The same function up to the order of the sums; no [n, m] gradient arises in the backward,
    because S takes none (it is detached where the user has unfrozen it). Handles several calls with
    one weight (the rotations are built once), any leading shape, dynamic shapes, autocast
    (`rotate_blocks` casts as a linear does), a side of size 1 (no rotation there). `narrow` where
    every call computes in bf16 or fp16. Refuses a weight that anything but ``F.linear`` reads (such
    as ``F.multi_head_attention_forward``): that weight stays weight-centric, which is right and
    slow.
    """

    name = "input_centric"

    def sites(self, graph: fx.Graph) -> Iterable[fx.Node]:
        return [n for n in graph.nodes if graphs.is_op(n, *graphs.EQUIVALENCE)]

    def describe(self, site: fx.Node) -> dict[str, Any]:
        return sides.describe(site)

    def decide(self, site: fx.Node) -> str:
        other = sides.reader_other_than_linear(site)
        if other == "output":
            raise Refusal(LEAVES)
        if other:
            raise Refusal(f"weight-centric: the weight is read by {other}, not by F.linear")
        if reason := sides.refusal_of_calls(self.contexts, site):
            raise Refusal(f"weight-centric: {reason}")
        return "input_centric"

    def apply(self, graph: fx.Graph, site: fx.Node) -> None:
        narrow = sides.is_narrow(site)
        first = next(iter(site.users), site)
        stored = sides.frozen(self.contexts, site, site.args[0], first)
        side_in, side_out = sides.sides_of(site)
        g_in, g_out = [
            sides.rotation(self.contexts, site, side, first, narrow) if side.blocks else None
            for side in (side_in, side_out)
        ]
        for linear in list(site.users):
            x, _, bias = graphs.linear_arguments(linear)
            with graph.inserting_before(linear):
                y = x
                if g_in is not None:
                    y = sides.rotate(graph, y, g_in, side_in.pair, None)
                    graphs.inherit(y, linear, graphs.INTERMEDIATE)
                y = graph.call_function(graphs.LINEAR, (y, stored, None))
                graphs.inherit(y, linear, None if g_out is None else graphs.INTERMEDIATE)
                if g_out is not None:
                    y = sides.rotate(graph, y, g_out, None, side_out.pair)
                    graphs.inherit(y, linear)
                y = sides.add_bias(graph, y, bias, linear)
            linear.replace_all_uses_with(y)
            graph.erase_node(linear)
        graph.erase_node(site)
