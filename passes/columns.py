"""What a node does to the columns (the last dimension) of its operands.

Three kinds of readers matter to a pass that moves permutations of columns:

- *columnwise* nodes (elementwise ops, norms over the last dimension, casts) give permuted columns
  where all of their wide operands are permuted alike;
- readers *in any order* (reductions over the last dimension, sizes) do not see a permutation;
- anything else (a product, a view, an embedding, an output of the graph) needs the columns in
  their natural order.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from poetx_compile._torch import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    _nn,
    is_contiguous_or_false,
)
from poetx_compile.passes import graphs

_BINARY = ("add", "sub", "mul", "div", "true_divide", "truediv", "pow", "maximum", "minimum")
_UNARY = [
    "abs",
    "neg",
    "square",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "exp",
    "expm1",
    "log",
    "log1p",
    "tanh",
    "sigmoid",
    "relu",
    "relu6",
    "silu",
    "gelu",
    "elu",
    "celu",
    "selu",
    "mish",
    "softplus",
    "softsign",
    "leaky_relu",
    "logsigmoid",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "erf",
    "sin",
    "cos",
    "clamp",
    "clamp_min",
    "clamp_max",
    "clone",
]
_CASTS = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "detach")
_METADATA = ("size", "dim", "numel", "new_ones", "new_zeros", "new_empty")
_REDUCTIONS = ("mean", "sum", "var", "std", "amax", "amin")

_NAMESPACES = (operator, torch, F, _nn)


def _functions(names: tuple[str, ...] | list[str]) -> frozenset[Any]:
    found = (getattr(space, name, None) for space in _NAMESPACES for name in names)
    return frozenset(f for f in found if f is not None)


_ELEMENTWISE_FUNCTIONS = _functions([*_BINARY, *_UNARY])
_ELEMENTWISE_METHODS = frozenset([*_BINARY, *_UNARY, *_CASTS])
_REDUCTION_FUNCTIONS = _functions(_REDUCTIONS)
_NORMS = frozenset([torch.rms_norm, F.rms_norm, torch.layer_norm, F.layer_norm])
_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior", "ixor", "setitem")
)

_RENORMALISING = (F.embedding, F.embedding_bag)
"""What writes into its weight where it is given a `max_norm`."""

_WRITE_NO_VALUE = ("requires_grad_", "detach_")


def width_of(node: Any) -> int | None:
    """Number of columns of a floating-point value, where it is a constant above 1."""
    value = node.meta.get(graphs.VALUE) if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() == 0:
        return None
    width = value.shape[-1]
    return width if isinstance(width, int) and width > 1 else None


def is_vector(node: fx.Node) -> bool:
    """Whether a value is one row of columns, such as a bias or the weight of a norm."""
    return all(isinstance(size, int) and size == 1 for size in node.meta[graphs.VALUE].shape[:-1])


def operands(node: fx.Node) -> list[fx.Node] | None:
    """The wide operands of a columnwise node, or ``None`` where the node is not columnwise.

    Column j of the node depends on column j of these (and on whole rows through statistics that no
    permutation changes), and they have as many columns as the node has.
    """
    width = width_of(node)
    if width is None or graphs.in_transform(node) or not is_columnwise(node):
        return None
    value = node.meta[graphs.VALUE]
    # A gather gives contiguous values: a reader that needs other strides would not take them.
    if not is_contiguous_or_false(value):
        return None
    wide = []
    for operand in _values(node):
        other = operand.meta[graphs.VALUE]
        if other.dim() == 0 or (isinstance(other.shape[-1], int) and other.shape[-1] == 1):
            continue
        if width_of(operand) != width or other.device != value.device:
            return None
        wide.append(operand)
    return wide or None


def reads_any_order(user: fx.Node, value: fx.Node) -> bool:
    """Whether `user` gives the same result for `value` with its columns in any order."""
    if user.op == "call_method" and user.target in _METADATA:
        return True
    if refers_only(user, value):
        return True
    is_reduction = (user.op == "call_method" and user.target in _REDUCTIONS) or (
        user.op == "call_function" and user.target in _REDUCTION_FUNCTIONS
    )
    if not is_reduction or user.args[:1] != (value,) or graphs.in_transform(user):
        return False
    if len(user.all_input_nodes) > 1 or user.kwargs.get("out") is not None:
        return False
    dims = user.kwargs.get("dim", user.args[1] if len(user.args) > 1 else None)
    last = value.meta[graphs.VALUE].dim() - 1
    return any(
        isinstance(d, int) and not isinstance(d, bool) and d in (-1, last)
        for d in (dims if isinstance(dims, list | tuple) else (dims,))
    )


def mutated(graph: fx.Graph) -> set[fx.Node]:
    """Values that some node writes to in place, with everything that may share memory with them.

    A copy with permuted columns would miss such a write.
    """
    found: set[fx.Node] = set()
    pending = [n for node in graph.nodes for n in written(node)]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if not _is_new_memory(node):
            pending += node.all_input_nodes
        pending += [user for user in node.users if not _is_new_memory(user)]
    return found


def is_columnwise(node: fx.Node) -> bool:
    """Whether a node computes each column from that column and statistics of the whole row."""
    if _is_inplace(node) or node.kwargs.get("out") is not None:
        return False
    if node.op == "call_method":
        return node.target in _ELEMENTWISE_METHODS
    if node.op != "call_function":
        return False
    if node.target in _NORMS:
        shape = _argument(node, 1, "normalized_shape")
        return isinstance(shape, list | tuple | torch.Size) and len(shape) == 1
    if node.target in (F.dropout, torch.dropout):
        return _argument(node, 1, "p") == 0 or _argument(node, 2, "training") is False
    return node.target in _ELEMENTWISE_FUNCTIONS


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _values(node: fx.Node) -> list[fx.Node]:
    """The tensors a node computes with."""
    return [
        operand
        for operand in node.all_input_nodes
        if isinstance(operand.meta.get(graphs.VALUE), torch.Tensor)
        and not refers_only(node, operand)
    ]


def refers_only(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a cast reads nothing of `operand` but its dtype and device."""
    is_cast = node.op == "call_method" and node.target in ("to", "type_as")
    return is_cast and node.args[0] is not operand and operand in node.all_input_nodes


def written(node: fx.Node) -> list[fx.Node]:
    """The operands that a node writes to; of a higher-order op, those that it may write to."""
    if node.op not in ("call_function", "call_method"):
        return []
    target: Any = node.target
    if isinstance(target, OpOverload | OpOverloadPacket):
        return _nodes(_written_by_schema(node, target))
    if isinstance(target, HigherOrderOperator) and target is not graphs.CHECKPOINT:
        return list(node.all_input_nodes)  # some do, such as the call of a Triton kernel
    name = target if node.op == "call_method" else getattr(target, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__") and name not in _WRITE_NO_VALUE
    if target in _RENORMALISING and _argument(node, 3, "max_norm") is not None:
        return _nodes(_argument(node, 1, "weight"))
    writes = by_name or target in _INPLACE_OPERATORS or _is_inplace(node)
    return _nodes((node.args[:1] if writes else (), node.kwargs.get("out")))


def _nodes(arguments: Any) -> list[fx.Node]:
    """The nodes among arguments, in lists and tuples too (those of `torch._foreach_mul_`)."""
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return found


def _written_by_schema(node: fx.Node, op: OpOverload | OpOverloadPacket) -> list[Any]:
    """The arguments that any overload of an op writes to."""
    overloads = (
        [getattr(op, name) for name in op.overloads()] if isinstance(op, OpOverloadPacket) else [op]
    )
    found = []
    for overload in overloads:
        for position, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found.append(_argument(node, position, argument.name))
    return found


def _is_inplace(node: fx.Node) -> bool:
    """Whether a call says ``inplace=True``, by name or by position."""
    if node.op != "call_function":
        return False
    position = _position_of_inplace(node.target)
    if position is not None and len(node.args) > position:
        return bool(node.args[position])
    return bool(node.kwargs.get("inplace"))


@functools.cache
def _position_of_inplace(function: Any) -> int | None:
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def _is_new_memory(node: fx.Node) -> bool:
    """Whether a node's value certainly shares no memory with its operands."""
    if graphs.is_linear(node) or graphs.is_op(
        node,
        torch.ops.poetx.rotate_blocks,
        torch.ops.poetx.permute_columns,
        torch.ops.poetx.folded_linear,
        torch.ops.poetx.merged_linear,
    ):
        return True
    casts = node.op == "call_method" and node.target in _CASTS
    drops = node.target in (F.dropout, torch.dropout)
    return is_columnwise(node) and not casts and not drops
