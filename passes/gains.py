"""Pass `gains`: gains multiply what goes into a layer and what comes out, and not its weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from poetx_compile.ops.gains import GAINS
from poetx_compile.passes import graphs, sides
from poetx_compile.passes.contract import GraphPass, Refusal


class Gains(GraphPass[fx.Node]):
    """Linear over a weight with gains → the linear between two multiplications.

    Before::

        w: [n, m] = poetx.orthogonal_equivalence(S, skew_in, …, k, gain_in, gain_out)
        y: [..., n] = linear(x, w, bias)

    After::

        w: [n, m] = poetx.orthogonal_equivalence(S, skew_in, …, k)
        x': [..., m] = (x · gain_in).type_as(x)
        u: [..., n] = linear(x', w, None)
        v: [..., n] = (u · gain_out).type_as(u)
        y: [..., n] = v + bias.type_as(v)

    The same function up to roundings. No scaled weight and no dense gradient arise: the gradient of
    a gain is a sum over the tokens, of values that the backward has. The gains are fp32, and so are
    their products; Inductor fuses these into what stands beside the layer. Everything is in natural
    order, so that what the passes after this one do to ``linear(x', w, None)`` is what they do
    without gains, whatever makes w.

    Handles several calls with one weight, any leading shape, dynamic shapes and autocast; a gain
    that is ``None`` is left out. Refuses a weight that anything but ``F.linear`` reads (such as
    ``F.multi_head_attention_forward``): it stays weight-centric, gains included.
    """

    name = "gains"

    def sites(self, graph: fx.Graph) -> Iterable[fx.Node]:
        return [node for node in graph.nodes if any(gains_of(node))]

    def decide(self, site: fx.Node) -> str:
        if reason := sides.refusal_of_calls(self.contexts, site):
            raise Refusal(f"weight-centric: {reason}")
        gain_in, gain_out = gains_of(site)
        where = ("inputs" if gain_in else "", "outputs" if gain_out else "")
        return f"{' and '.join(filter(None, where))} multiplied by gains"

    def describe(self, site: fx.Node) -> dict[str, Any]:
        return {"layers": graphs.layers_of([site])}

    def apply(self, graph: fx.Graph, site: fx.Node) -> None:
        gain_in, gain_out = gains_of(site)
        site.args = graphs.with_arguments(site, dict.fromkeys(GAINS))
        del site.meta[graphs.VALUE]  # it may take no gradient any more
        for linear in list(site.users):
            x, _, bias = graphs.linear_arguments(linear)
            with graph.inserting_before(linear):
                x = sides.scale(graph, x, gain_in, linear)
                y = graph.call_function(graphs.LINEAR, (x, site, None))
                y = sides.scale(graph, graphs.inherit(y, linear), gain_out, linear)
                y = sides.add_bias(graph, y, bias, linear)
            linear.replace_all_uses_with(y)
            graph.erase_node(linear)


def gains_of(weight: fx.Node) -> tuple[Any, Any]:
    """The gains of the input and of the output side in an effective weight; ``None`` for ones.

    Optional arguments of the ops that make such weights, left out where there are none.
    """
    if not graphs.is_op(weight, *graphs.EQUIVALENCE):
        return None, None
    arguments = graphs.arguments_of(weight)
    return arguments.get(GAINS[0]), arguments.get(GAINS[1])


def check_without(weight: fx.Node) -> None:
    """Refuse an effective weight that has its gains still."""
    if any(gains_of(weight)):
        raise Refusal("weight-centric: gains is among disable_passes")
