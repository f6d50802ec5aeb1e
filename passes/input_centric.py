"""Pass `input_centric`: rotate activations instead of building the effective weight."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from poetx_compile.passes import graphs
from poetx_compile.passes.contract import GraphPass, Refusal


class InputCentric(GraphPass[fx.Node]):
    """Linear over an orthogonal-equivalence weight → rotate, linear with the frozen weight, rotate.

    Before (x: [..., m], S: [n, m])::

        w: [n, m] = poetx.orthogonal_equivalence(S, skew_in, skew_out, perm_in, perm_out, b, b', k)
        y: [..., n] = linear(x, w, bias)

    After::

        g_in: [m//b, b, b] fp32 = poetx.cayley_neumann(skew_in, b, k)
        g_out: [n//b', b', b'] fp32 = poetx.cayley_neumann(skew_out, b', k)
        z: [..., m] = poetx.rotate_blocks(x, g_in, perm_in, None, False)
        u: [..., n] = linear(z, S, None)
        v: [..., n] = poetx.rotate_blocks(u, g_out, None, perm_out, False)
        y: [..., n] = v + bias.type_as(v)

    The same function up to the order of the sums; no [n, m] gradient arises in the backward,
    because S takes none. Handles several calls with one weight (the rotations are built once),
    any leading shape, dynamic shapes, autocast (`rotate_blocks` casts as a linear does), a side of
    size 1 (no rotation there). Refuses a weight that anything but ``F.linear`` reads (such as
    ``F.multi_head_attention_forward``): that weight stays weight-centric, which is right and slow.
    """

    name = "input_centric"

    def sites(self, graph: fx.Graph) -> Iterable[fx.Node]:
        return [n for n in graph.nodes if graphs.is_op(n, *graphs.EQUIVALENCE)]

    def describe(self, site: fx.Node) -> dict[str, Any]:
        skew_in, skew_out, block_in, block_out = (site.args[i] for i in (1, 2, 5, 6))
        shape = graphs.shape_of(site.args[0])
        blocks = " | ".join(
            f"{shape_[0]}x{b}" if (shape_ := graphs.shape_of(skew)) is not None else f"?x{b}"
            for skew, b in ((skew_in, block_in), (skew_out, block_out))
        )
        return {
            "layers": graphs.layers_of([site]),
            "shape": None if shape is None else (int(shape[0]), int(shape[1])),
            "blocks": blocks,
        }

    def decide(self, site: fx.Node) -> str:
        others = [u for u in site.users if not _is_weight_of(u, site)]
        if others:
            name = getattr(others[0].target, "__name__", str(others[0].target))
            raise Refusal(f"weight-centric: the weight is read by {name}, not by F.linear")
        if any(graphs.in_transform(u) for u in site.users):
            raise Refusal("weight-centric: inside a torch.func transform")
        return "input_centric"

    def apply(self, graph: fx.Graph, site: fx.Node) -> None:
        stored, skew_in, skew_out, perm_in, perm_out, block_in, block_out, order = site.args
        first = next(iter(site.users), site)
        with graph.inserting_before(site):
            g_in = self._rotation(graph, skew_in, block_in, order, first)
            g_out = self._rotation(graph, skew_out, block_out, order, first)
        for linear in list(site.users):
            x, _, bias = graphs.linear_arguments(linear)
            with graph.inserting_before(linear):
                y = x
                if g_in is not None:
                    y = _rotate(graph, y, g_in, perm_in, None)
                    graphs.inherit(y, linear, graphs.INTERMEDIATE)
                y = graph.call_function(graphs.LINEAR, (y, stored, None))
                graphs.inherit(y, linear, None if g_out is None else graphs.INTERMEDIATE)
                if g_out is not None:
                    y = graphs.inherit(_rotate(graph, y, g_out, None, perm_out), linear)
                if bias is not None:
                    cast = graphs.inherit(graph.call_method("type_as", (bias, y)), linear)
                    y = graphs.inherit(graph.call_function(operator.add, (y, cast)), linear)
            linear.replace_all_uses_with(y)
            graph.erase_node(linear)
        graph.erase_node(site)

    @staticmethod
    def _rotation(graph: fx.Graph, skew: Any, block: Any, order: Any, origin: fx.Node) -> Any:
        """The rotations of one side, or ``None`` where the side has no block."""
        shape = graphs.shape_of(skew)
        if shape is not None and shape[0] == 0:
            return None
        target: Any
        args: tuple[Any, ...]
        if order is None:
            target, args = torch.ops.poetx.cayley_exact.default, (skew, block)
        else:
            target, args = torch.ops.poetx.cayley_neumann.default, (skew, block, order)
        # A shared module reads its weight at every call: its rotations are built once.
        for made in skew.users:
            if made.target is target and made.args == args:
                return made
        node = graph.call_function(target, args)
        return graphs.inherit(node, origin, graphs.ROTATION)


def _is_weight_of(user: fx.Node, weight: fx.Node) -> bool:
    if not graphs.is_linear(user):
        return False
    x, w, bias = graphs.linear_arguments(user)
    return w is weight and x is not weight and bias is not weight


def _rotate(graph: fx.Graph, x: Any, rotation: Any, gather: Any, scatter: Any) -> fx.Node:
    return graph.call_function(
        torch.ops.poetx.rotate_blocks.default, (x, rotation, gather, scatter, False)
    )
