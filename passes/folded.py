"""Pass `folded`: rotations go into the weight, side by side, where that is the cheaper form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from poetx_compile.passes import cost, graphs, sides
from poetx_compile.passes.contract import GraphPass, Refusal
from poetx_compile.passes.cost import Machine

CONDITION = "fold where T >"
"""How a side's choice is told, T being the number of tokens."""

MAX_BLOCK = 256
"""The largest block whose tangent has a kernel; elsewhere its gradient is a batched solve."""

_NONE = (None, None, None)


class Folded(GraphPass[fx.Node]):
    """Linear over an orthogonal-equivalence weight → linear over a weight that is folded once.

    Before (x: [..., m], S: [n, m])::

        w: [n, m] = poetx.orthogonal_equivalence(S, skew_in, skew_out, perm_in, perm_out, b, b', k)
        y: [..., n] = linear(x, w, bias)

    After, with both sides folded::

        d_in: [m//b, b, b] dtype = poetx.rotation_delta(skew_in.detach(), b, k, dtype, 0)
        d_out: [n//b', b', b'] dtype = poetx.rotation_delta(skew_out.detach(), b', k, dtype, n//b')
        w: [n, m] dtype = poetx.fold_weight(S, d_in, d_out, perm_in, perm_out, dtype)
        e_in: [m//b, b, b] fp32 = poetx.rotation_tangent(skew_in, b, k, narrow, 0)
        e_out: [n//b', b', b'] fp32 = poetx.rotation_tangent(skew_out, b', k, narrow, n//b')
        v: [..., n] = poetx.folded_linear(x, w, e_in, e_out, perm_in, perm_out)
        y: [..., n] = v + bias.type_as(v)

    The last number counts flipped blocks, those of −Q: what multiplies from the left is flipped.
    The tangents are zeros that carry gradients and are never computed; no activation is rotated or
    permuted, and nothing but x and v is kept. A side that is not folded is rotated as in
    `input_centric`, around the product with the weight that the other side is folded into.

    With ``formulation="auto"`` each side takes the cheaper form by the model of `cost`, at the
    sizes seen while tracing, and only where the layer computes in bf16 or fp16, with rotations of
    order 3 in blocks of at most `MAX_BLOCK`. Handles what `input_centric` handles, and refuses what
    it refuses.

    Args:
        formulation: ``"auto"`` or ``"folded"`` (every side).
        folds: how often a step folds: 1 where the weight is kept for the backward, else 2.
        machine: the rates of the cost model.
        within_guard: whether the angles stay where the inverse of a rotation may be a series
            (docs/numerics.md); without it ``"auto"`` rotates.
    """

    name = "folded"

    def __init__(
        self,
        formulation: str = "auto",
        folds: int = 1,
        machine: Machine | None = None,
        within_guard: bool = True,
    ):
        self.formulation, self.folds, self.within_guard = formulation, folds, within_guard
        self.machine = machine or Machine()
        self._chosen: dict[fx.Node, list[sides.Side]] = {}

    def sites(self, graph: fx.Graph) -> Iterable[fx.Node]:
        return [n for n in graph.nodes if graphs.is_op(n, *graphs.EQUIVALENCE)]

    def describe(self, site: fx.Node) -> dict[str, Any]:
        return sides.describe(site) | {"costs": self._costs(site)}

    def decide(self, site: fx.Node) -> str:
        if other := sides.reader_other_than_linear(site):
            raise Refusal(f"the weight is read by {other}, not by F.linear")
        if reason := sides.refusal_of_calls(self.contexts, site):
            raise Refusal(reason)
        if len({sides.compute_dtype(linear) for linear in site.users}) != 1:
            raise Refusal("its calls compute in several dtypes")
        both = [side for side in sides.sides_of(site) if side.blocks]
        if not both:
            raise Refusal("no side has a rotation")
        if self.formulation == "folded":
            self._chosen[site] = both
            return "folded"
        if not sides.is_narrow(site):
            raise Refusal("rotated: a weight is folded where the layer computes in bf16 or fp16")
        if not self.within_guard:
            raise Refusal("rotated: folding needs the angle guard (max_angle of at most 0.25)")
        if not all(side.order == 3 and side.block <= MAX_BLOCK for side in both):
            raise Refusal(f"rotated: folding is fast for order 3 and blocks up to {MAX_BLOCK}")
        choices = self._costs(site)
        cheaper = {choice.side for choice in choices if choice.folded}
        self._chosen[site] = [side for side in both if side.name in cheaper]
        detail = ", ".join(
            f"{'folded' if choice.folded else 'rotated'} {choice.side} "
            f"({CONDITION} {choice.break_even})"
            for choice in choices
        )
        if not self._chosen[site]:
            raise Refusal(detail)
        return detail

    def _costs(self, site: fx.Node) -> tuple[cost.Choice, ...]:
        """The costs of both forms for each side with a rotation, where there is a choice."""
        if sides.reader_other_than_linear(site) or sides.refusal_of_calls(self.contexts, site):
            return ()
        inputs = [graphs.shape_of(graphs.linear_arguments(linear)[0]) for linear in site.users]
        dtype = next((sides.compute_dtype(linear) for linear in site.users), None)
        if dtype is None or None in inputs:
            return ()
        tokens = sum(cost.hint_of(shape) for shape in inputs if shape is not None)
        side_in, side_out = sides.sides_of(site)
        weight = (side_out.width, side_in.width)

        def choice(side: sides.Side) -> cost.Choice:
            rotate = cost.rotate_seconds(side.width, side.block, dtype.itemsize, self.machine)
            fold = cost.fold_seconds(weight, side.block, dtype.itemsize, self.machine, self.folds)
            return cost.Choice(side.name, rotate, fold, tokens)

        return tuple(choice(side) for side in (side_in, side_out) if side.blocks)

    def _rotation(
        self, site: fx.Node, side: sides.Side, first: fx.Node, narrow: bool
    ) -> fx.Node | None:
        if not side.blocks:
            return None
        return sides.rotation(self.contexts, site, side, first, narrow)

    def apply(self, graph: fx.Graph, site: fx.Node) -> None:
        narrow = sides.is_narrow(site)
        side_in, side_out = sides.sides_of(site)
        chosen = self._chosen.pop(site)
        first = next(iter(site.users))
        stored = sides.frozen(self.contexts, site, site.args[0], first)
        (turn_in, d_in, e_in, pair_in), (turn_out, d_out, e_out, pair_out) = [
            (None, *sides.folded(self.contexts, site, side, first, narrow))
            if side in chosen
            else (self._rotation(site, side, first, narrow), *_NONE)
            for side in (side_in, side_out)
        ]
        weight = sides.once(
            self.contexts,
            site,
            torch.ops.poetx.fold_weight.default,
            (stored, d_in, d_out, pair_in, pair_out, sides.compute_dtype(first)),
            first,
            graphs.FOLDED_WEIGHT,
        )
        for linear in list(site.users):
            x, _, bias = graphs.linear_arguments(linear)
            with graph.inserting_before(linear):
                y = x
                if turn_in is not None:
                    y = sides.rotate(graph, y, turn_in, side_in.pair, None)
                    graphs.inherit(y, linear, graphs.INTERMEDIATE)
                y = graph.call_function(
                    torch.ops.poetx.folded_linear.default,
                    (y, weight, e_in, e_out, pair_in, pair_out),
                )
                role = graphs.OUTPUT if turn_out is None else graphs.INTERMEDIATE
                graphs.inherit(y, linear, role)
                if turn_out is not None:
                    y = sides.rotate(graph, y, turn_out, None, side_out.pair)
                    graphs.inherit(y, linear)
                y = sides.add_bias(graph, y, bias, linear)
            linear.replace_all_uses_with(y)
            graph.erase_node(linear)
        graph.erase_node(site)
