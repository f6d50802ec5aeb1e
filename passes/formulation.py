"""Pass `formulation`: the sides of a layer rotate activations, or are folded into the weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from poetx_compile.passes import cost, gains, graphs, sides
from poetx_compile.passes.contract import GraphPass, Refusal
from poetx_compile.passes.cost import Choice, Cost, Machine
from poetx_compile.passes.sides import Side

FORMS = ("folded", "input_centric")
"""What becomes of a layer, the names of its events: folded on a side or both, or on none."""

MAX_BLOCK = 256
"""The largest block whose tangent has a kernel; elsewhere its gradient is a batched solve."""


@dataclasses.dataclass
class Weight:
    """An orthogonal-equivalence weight, and what was chosen for each side with a rotation."""

    node: fx.Node
    sides: tuple[Side, Side]
    choices: tuple[Choice, ...] = ()

    @property
    def folded(self) -> set[str]:
        """The names of the folded sides."""
        return {choice.side for choice in self.choices if choice.folded}

    @property
    def form(self) -> str:
        """The one of `FORMS` that was chosen."""
        return "folded" if self.folded else "input_centric"


class Formulation(GraphPass[Weight]):
    """Linear over an orthogonal-equivalence weight → the product, with each side rotated or folded.

    Before (x: [..., m], S: [n, m])::

        w: [n, m] = poetx.orthogonal_equivalence(S, skew_in, skew_out, perm_in, perm_out, b, b', k)
        y: [..., n] = linear(x, w, bias)

    After, with both sides rotated (the event ``input_centric``)::

        g_in: [m//b, b, b] fp32 = poetx.cayley_neumann(skew_in, b, k, narrow)
        g_out: [n//b', b', b'] fp32 = poetx.cayley_neumann(skew_out, b', k, narrow)
        z: [..., m] = poetx.rotate_blocks(x, g_in, perm_in, None, False)
        u: [..., n] = linear(z, S, None)
        v: [..., n] = poetx.rotate_blocks(u, g_out, None, perm_out, False)
        y: [..., n] = v + bias.type_as(v)

    After, with both sides folded (the event ``folded``, also where only one is)::

        d_in: [m//b, b, b] dtype = poetx.rotation_delta(skew_in.detach(), b, k, dtype, 0)
        e_in: [m//b, b, b] fp32 = poetx.rotation_tangent(skew_in, b, k, narrow, 0)
        d_out: [n//b', b', b'] dtype = poetx.rotation_delta(skew_out.detach(), b', k, dtype, n//b')
        e_out: [n//b', b', b'] fp32 = poetx.rotation_tangent(skew_out, b', k, narrow, n//b')
        w: [n, m] dtype = poetx.fold_weight(S, d_in, d_out, perm_in, perm_out, dtype)
        v: [..., n] = poetx.folded_linear(x, w, e_in, e_out, perm_in, perm_out)
        y: [..., n] = v + bias.type_as(v)

    The same function up to the order of the sums; no [n, m] gradient arises in the backward,
    because S takes none (it is detached where the user has unfrozen it). The last number of deltas
    and tangents counts transposed blocks, those of −Q: what multiplies from the left is transposed.
    The tangents are zeros that carry gradients and are never computed; where both sides are folded,
    no activation is rotated or permuted, and nothing but x and v is saved.

    An int8 S comes with its scales, the last argument. In its place the linear or the fold reads
    ``s: [n, m] dtype = poetx.dequantize(S, scale, dtype)``. The backward makes it, and what is
    folded, again: no dense form of an int8 weight outlives what reads it.

    With ``formulation="auto"`` each side takes the cheaper form by the model of `cost`, at the
    sizes seen while tracing; it rotates unless the layer computes in bf16 or fp16, with rotations
    of order 3 in blocks of at most `MAX_BLOCK`.

    Handles several calls with one weight (its rotations are built once), any leading shape, dynamic
    shapes, autocast (`rotate_blocks` casts as a linear does), a side of size 1 (no rotation there).
    `narrow` where every call computes in bf16 or fp16. Refuses a weight that anything but
    ``F.linear`` reads (such as ``F.multi_head_attention_forward``): that weight stays
    weight-centric, which is right and slow.

    Args:
        formulation: ``"auto"``, or one of `FORMS` for every side.
        folds: how often a step folds: 1 where the weight is kept for the backward, else 2.
        machine: the rates of the cost model.
        within_guard: whether the angles stay where the inverse of a rotation may be a series
            (docs/numerics.md); without it ``"auto"`` rotates.
        forms: those of `FORMS` that are to be had.
    """

    name = "formulation"

    def __init__(
        self,
        formulation: str = "auto",
        folds: int = 1,
        machine: Machine | None = None,
        within_guard: bool = True,
        forms: Sequence[str] = FORMS,
    ):
        self.formulation, self.folds, self.within_guard = formulation, folds, within_guard
        self.machine, self.forms = machine or Machine(), forms

    def sites(self, graph: fx.Graph) -> Iterable[Weight]:
        found = [n for n in graph.nodes if graphs.is_op(n, graphs.ROTATED)]
        return [Weight(node, sides.sides_of(node)) for node in found]

    def decide(self, site: Weight) -> str:
        if reason := sides.refusal_of_calls(self.contexts, site.node):
            raise Refusal(f"weight-centric: {reason}")
        gains.check_without(site.node)
        site.choices = self._choose(site.node, site.sides)
        if not site.folded and "input_centric" not in self.forms:
            raise Refusal("weight-centric: input_centric is among disable_passes")
        again = "" if sides.scale_of(site.node) is None else "; int8, dense while it is read"
        if self.formulation != "auto" or not any(choice.cost for choice in site.choices):
            return site.form + again
        chosen = ", ".join(map(str, site.choices)) + again
        return chosen if site.folded else f"{site.form}: {chosen}"

    def _choose(self, weight: fx.Node, both: tuple[Side, Side]) -> tuple[Choice, ...]:
        rotating = [side for side in both if side.blocks]
        if reason := self._refusal_to_fold(weight, rotating):
            return tuple(Choice(side.name, False, reason) for side in rotating)
        costs = self._costs(weight, both)
        if self.formulation == "folded":
            asked = "formulation='folded'"
            return tuple(Choice(s.name, True, asked, costs.get(s.name)) for s in rotating)
        return tuple(
            Choice(side, c.folding_is_cheaper, f"fold where T > {c.break_even}", c)
            for side, c in costs.items()
        )

    def _refusal_to_fold(self, weight: fx.Node, rotating: Sequence[Side]) -> str | None:
        """Why every side rotates, where there is no choice."""
        if "folded" not in self.forms or self.formulation == "input_centric":
            return "folding was not asked for"
        if len({sides.compute_dtype(linear) for linear in weight.users}) != 1:
            return "its calls compute in several dtypes"
        if self.formulation == "folded":
            return None
        if not sides.is_low_precision(weight):
            return "a weight is folded where the layer computes in bf16 or fp16"
        if not self.within_guard:
            return "folding needs the angle guard (max_angle of at most 0.25)"
        if not all(side.order == 3 and side.block <= MAX_BLOCK for side in rotating):
            return f"folding is fast for order 3 and blocks up to {MAX_BLOCK}"
        return None

    def _costs(self, weight: fx.Node, both: tuple[Side, Side]) -> dict[str, Cost]:
        """The costs of both forms of each side with a rotation, where the sizes are known."""
        inputs = [graphs.shape_of(graphs.linear_arguments(linear)[0]) for linear in weight.users]
        dtype = sides.compute_dtype(next(iter(weight.users)))
        if dtype is None or None in inputs:
            return {}
        tokens = sum(cost.hint_of(shape) for shape in inputs if shape is not None)
        shape, size = (both[1].width, both[0].width), dtype.itemsize
        folds = self.folds if sides.scale_of(weight) is None else 2

        def of(side: Side) -> Cost:
            rotate = cost.rotate_seconds(side.width, side.block, size, self.machine)
            fold = cost.fold_seconds(shape, side.block, size, self.machine, folds)
            return Cost(side.name, rotate, fold, tokens)

        return {side.name: of(side) for side in both if side.blocks}

    def describe(self, site: Weight) -> dict[str, Any]:
        return sides.described(site.node) | {"pass_name": site.form, "choices": site.choices}

    def apply(self, graph: fx.Graph, site: Weight) -> None:
        node, narrow = site.node, sides.is_low_precision(site.node)
        first = next(iter(node.users), node)
        weight = sides.frozen(self.contexts, node, node.args[0], first)
        rotations: dict[str, fx.Node] = {}
        folds = {side.name: sides.Fold() for side in site.sides}
        for side in site.sides:
            if side.name in site.folded:
                folds[side.name] = sides.fold(self.contexts, node, side, first, narrow)
            elif side.blocks:
                rotations[side.name] = sides.rotation(self.contexts, node, side, first, narrow)
        scale = sides.scale_of(node)
        product: tuple[Any, ...] = (graphs.LINEAR, weight, None)
        if site.folded:
            (d_in, e_in, pair_in), (d_out, e_out, pair_out) = folds.values()
            role = graphs.FOLDED_WEIGHT
            if scale is not None:
                weight = sides.dequantized(self.contexts, node, weight, scale, first)
                role = graphs.DEQUANTIZED
            args = (weight, d_in, d_out, pair_in, pair_out, sides.compute_dtype(first))
            fold_weight = torch.ops.poetx.fold_weight.default
            weight = sides.once(self.contexts, node, fold_weight, args, first, role)
            folded_linear = torch.ops.poetx.folded_linear.default
            product = (folded_linear, weight, e_in, e_out, pair_in, pair_out)
        for linear in list(node.users):
            if scale is not None and not site.folded:
                dense = sides.dequantized(self.contexts, node, weight, scale, linear)
                product = (graphs.LINEAR, dense, None)
            self._replace(graph, linear, site, rotations, product)
        graph.erase_node(node)

    def _replace(
        self,
        graph: fx.Graph,
        linear: fx.Node,
        site: Weight,
        rotations: dict[str, fx.Node],
        product: tuple[Any, ...],
    ) -> None:
        """One call: rotate the input, multiply by ``(op, *operands)``, rotate, add the bias."""
        op, *operands = product
        side_in, side_out = site.sides
        y, _, bias = graphs.linear_arguments(linear)
        with graph.inserting_before(linear):
            if "in" in rotations:
                y = sides.rotate(graph, y, rotations["in"], linear, gather=side_in.pair)
            role = graphs.OUTPUT if site.folded else None
            role = graphs.INTERMEDIATE if "out" in rotations else role
            y = graphs.inherit(graph.call_function(op, (y, *operands)), linear, role)
            if "out" in rotations:
                y = sides.rotate(graph, y, rotations["out"], linear, scatter=side_out.pair)
            y = sides.add_bias(graph, y, bias, linear)
        linear.replace_all_uses_with(y)
        graph.erase_node(linear)
