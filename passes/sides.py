"""The sides of an orthogonal-equivalence weight, and the nodes its formulations are made of."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from poetx_compile._torch import is_traceable_wrapper_subclass
from poetx_compile.passes import graphs
from poetx_compile.passes.contexts import Contexts

LOW_PRECISION = (torch.bfloat16, torch.float16)
"""Compute dtypes that round a rotation so much that its products need no fp32 operands."""


class Side(NamedTuple):
    """One side of an orthogonal-equivalence weight: the arguments of the op, and its width."""

    name: str
    skew: fx.Node
    pair: fx.Node
    block: int
    order: int | None
    width: int

    @property
    def blocks(self) -> int:
        """Number of blocks; a side of size 1 has none."""
        shape = graphs.shape_of(self.skew)
        return self.width // min(self.block, self.width) if shape is None else int(shape[0])


def sides_of(equivalence: fx.Node) -> tuple[Side, Side]:
    """The input and the output side of an effective weight."""
    stored, skew_in, skew_out, perm_in, perm_out, block_in, block_out, *_ = equivalence.args
    order = graphs.arguments_of(equivalence).get("order")
    shape = graphs.shape_of(stored)
    assert shape is not None, "a weight has a known shape"
    n, m = (int(size) for size in shape)
    return (
        Side("in", skew_in, perm_in, block_in, order, m),  # type: ignore[arg-type]
        Side("out", skew_out, perm_out, block_out, order, n),  # type: ignore[arg-type]
    )


def described(equivalence: fx.Node) -> dict[str, Any]:
    """What an event says of an effective weight: its layer, its shape and its blocks."""
    side_in, side_out = both = sides_of(equivalence)
    return {
        "layers": graphs.layers_of([equivalence]),
        "shape": (side_out.width, side_in.width),
        "blocks": " | ".join(f"{side.blocks}x{side.block}" for side in both),
    }


def compute_dtype(linear: fx.Node) -> torch.dtype | None:
    """The dtype a linear computes in, that of autocast included."""
    value = linear.meta.get(graphs.VALUE)
    return value.dtype if isinstance(value, torch.Tensor) else None


def is_low_precision(equivalence: fx.Node) -> bool:
    """Whether every linear over this weight computes in bf16 or fp16."""
    dtypes = {compute_dtype(linear) for linear in equivalence.users}
    return bool(dtypes) and dtypes <= set(LOW_PRECISION)


def frozen(contexts: Contexts, place: fx.Node, stored: Any, origin: fx.Node) -> fx.Node:
    """The stored weight as a constant, also where the user has unfrozen all parameters.

    It is the node itself where its value takes no gradient (`held_to_flags` keeps it so), and where
    nothing is recorded: AOTAutograd cannot trace a `detach` in inference mode.
    """
    value = stored.meta.get(graphs.VALUE)
    constant = isinstance(value, torch.Tensor) and not value.requires_grad
    if constant or not contexts.of(place).records:
        return stored
    return once(contexts, place, "detach", (stored,), origin, graphs.ROTATION)


def scale_of(equivalence: fx.Node) -> fx.Node | None:
    """The scales of an int8 stored weight; ``None`` where it is dense."""
    return graphs.arguments_of(equivalence).get("scale")


def dequantized(
    contexts: Contexts, place: fx.Node, stored: fx.Node, scale: fx.Node, linear: fx.Node
) -> fx.Node:
    """An int8 weight in the dtype that a linear computes in, in front of `place`."""
    args = stored, scale, compute_dtype(linear)
    target = torch.ops.poetx.dequantize.default
    return once(contexts, place, target, args, linear, graphs.DEQUANTIZED)


def rotation(
    contexts: Contexts, place: fx.Node, side: Side, origin: fx.Node, narrow: bool
) -> fx.Node:
    """The rotations of a side [blocks, b, b], in front of `place`."""
    target: Any = torch.ops.poetx.cayley_neumann.default
    # The last argument is left out where it has its default.
    args: tuple[Any, ...] = (side.skew, side.block, side.order, *((True,) if narrow else ()))
    if side.order is None:
        target, args = torch.ops.poetx.cayley_exact.default, (side.skew, side.block)
    return once(contexts, place, target, args, origin, graphs.ROTATION)


class Fold(NamedTuple):
    """What a folded side needs: its deltas and their tangent [blocks, b, b], its permutation."""

    delta: fx.Node | None = None
    tangent: fx.Node | None = None
    pair: fx.Node | None = None


def fold(contexts: Contexts, place: fx.Node, side: Side, origin: fx.Node, narrow: bool) -> Fold:
    """The `Fold` of a side, in front of `place`.

    The output side's rotations multiply the weight from the left: Gᵀ, that of −Q. The gradient goes
    through the tangent alone.
    """
    flipped = side.blocks if side.name == "out" else 0
    constant = once(contexts, place, "detach", (side.skew,), origin, graphs.ROTATION)
    args: tuple[Any, ...] = (constant, side.block, side.order, compute_dtype(origin), flipped)
    target: Any = torch.ops.poetx.rotation_delta.default
    delta = once(contexts, place, target, args, origin, graphs.ROTATION)
    args = (side.skew, side.block, side.order, narrow, flipped)
    target = torch.ops.poetx.rotation_tangent.default
    tangent = once(contexts, place, target, args, origin, graphs.TANGENT)
    return Fold(delta, tangent, side.pair)


def rotate(
    graph: fx.Graph,
    x: Any,
    rotations: fx.Node,
    origin: fx.Node,
    *,
    gather: fx.Node | None = None,
    scatter: fx.Node | None = None,
) -> fx.Node:
    """``x`` rotated by blocks of columns: a layer's input, gathered, or its output, scattered."""
    target = torch.ops.poetx.rotate_blocks.default
    rotated = graph.call_function(target, (x, rotations, gather, scatter, False))
    return graphs.inherit(rotated, origin, graphs.INTERMEDIATE if scatter is None else None)


def scale(graph: fx.Graph, x: Any, gain: Any, origin: fx.Node) -> Any:
    """``x · gain`` column by column, in the dtype of the gain, as x's; x where there is no gain."""
    if gain is None:
        return x
    product = graphs.inherit(graph.call_function(operator.mul, (x, gain)), origin)
    return graphs.inherit(graph.call_method("type_as", (product, x)), origin)


def add_bias(graph: fx.Graph, y: fx.Node, bias: Any, origin: fx.Node) -> fx.Node:
    """``y + bias`` in y's dtype, behind the rotation; y where there is no bias."""
    if bias is None:
        return y
    cast = graphs.inherit(graph.call_method("type_as", (bias, y)), origin)
    return graphs.inherit(graph.call_function(operator.add, (y, cast)), origin)


def once(
    contexts: Contexts,
    place: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    origin: fx.Node,
    role: str,
) -> fx.Node:
    """The node ``target(*args)`` in front of `place`, or the one there is in the same context.

    A module that is called twice reads its weight twice; rotations are built once.
    """
    first = next(a for a in args if isinstance(a, fx.Node))
    for made in first.users:
        alike = made.target == target and made.args == args and not made.kwargs
        if alike and contexts.same(made, place):
            return made
    with place.graph.inserting_before(place):
        make = place.graph.call_method if isinstance(target, str) else place.graph.call_function
        return graphs.inherit(make(target, args), origin, role)


def refusal_of_calls(contexts: Contexts, equivalence: fx.Node) -> str | None:
    """Why this weight must be read as it is, by torch's own calls, if there is a reason."""
    for user in equivalence.users:
        operands = graphs.linear_arguments(user) if graphs.is_linear(user) else ()
        if [operand is equivalence for operand in operands] != [False, True, False]:
            if user.op == "output":
                return "the weight leaves the graph, not read by F.linear there"
            reader = getattr(user.target, "__name__", str(user.target))
            return f"the weight is read by {reader}, not by F.linear"
        values = [n.meta.get(graphs.VALUE) for n in operands if isinstance(n, fx.Node)]
        if kinds := {type(v).__name__ for v in values if is_traceable_wrapper_subclass(v)}:
            return f"an operand is a {kinds.pop()}, which the rotations do not know"
        if graphs.in_transform(user):
            return "inside a torch.func transform"
        # Tracing lets these pass, and torch raises when it runs: so must what replaces it.
        with contexts.of(user).casting():
            dtypes = [_autocast_dtype(v) for v in values if isinstance(v, torch.Tensor)]
        if len(set(dtypes)) > 1:
            shown = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"F.linear does not take the dtypes {shown} together"
    return None


def _autocast_dtype(operand: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear gets an operand here, from autocast where that is on."""
    device, castable = operand.device.type, (torch.float32, *LOW_PRECISION)
    known = torch.amp.is_autocast_available(device)  # not of meta tensors
    if operand.dtype in castable and known and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return operand.dtype
