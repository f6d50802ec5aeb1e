"""Rotations of 2-byte activations, rounded once for all that are made together.

Such a product takes G − I rounded to the dtype of the activations. The rotations of a decoder layer
come as one stack, and each product would round its own part by a launch of its own. Before::

    rotations: f32[20, 128, 128] = poetx.cayley_neumann(skew, 128, 3)
    first, second = split_with_sizes(rotations, [4, 16])
    y: bf16[64, 512] = poetx.rotate_blocks(x, first)
    …

After, where nothing else reads them::

    deltas: bf16[20, 128, 128] = poetx.rotation_delta(skew, 128, 3, bfloat16)
    first, second = split_with_sizes(deltas, [4, 16])
    y: bf16[64, 512] = poetx.rotate_by_delta(x, first)

Where the backward reads them as well they stay, and the deltas are one pointwise kernel over them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from poetx_compile._torch import detect_fake_mode
from poetx_compile.compile.lowerings.trace import arguments, insert, trace_reference
from poetx_compile.ops import OPS
from poetx_compile.ops.kernels.common import LOW_PRECISION
from poetx_compile.ops.rotation_delta import minus_identity

_aten = torch.ops.aten
_poetx = torch.ops.poetx


class _Reader(NamedTuple):
    """What reads a stack of rotations."""

    node: fx.Node
    part: fx.Node | None
    """The item of a split that it reads; ``None`` for all of the stack."""


def round_together(graph: fx.Graph) -> None:
    """Give products of 2-byte activations rounded deltas, one tensor for each stack."""
    for stack in graph.find_nodes(op="call_function", target=_poetx.cayley_neumann.default):
        readers = list(_readers(stack))
        products = [reader for reader in readers if _rounds(reader.node)]
        dtypes = {arguments(product)[0].meta["val"].dtype for product, _ in products}
        alone = len(products) == len(readers)
        # A single product rounds what others read as well by itself.
        if len(dtypes) != 1 or not (alone or len(products) > 1):
            continue
        deltas = _deltas(graph, stack, dtypes.pop(), alone)
        parts: dict[fx.Node | None, fx.Node] = {None: deltas}
        for product, part in products:
            if part not in parts:
                parts[part] = _part(graph, part, deltas, parts)
            x, _, *others = arguments(product)
            rotated = _add(graph, product, _poetx.rotate_by_delta.default, x, parts[part], *others)
            product.replace_all_uses_with(rotated)
            graph.erase_node(product)
        _erase(graph, stack)


def _readers(stack: fx.Node) -> Iterator[_Reader]:
    for user in stack.users:
        whole = user.target is not _aten.split_with_sizes.default or user.args[2:] not in ((), (0,))
        if whole or any(item.target is not operator.getitem for item in user.users):
            yield _Reader(user, None)
            continue
        for item in user.users:
            yield from (_Reader(reader, item) for reader in item.users)


def _rounds(node: fx.Node) -> bool:
    """Whether it is a product of 2-byte activations that a kernel makes."""
    if node.target is not _poetx.rotate_blocks.default:
        return False
    values = map_arg(arguments(node), lambda n: n.meta["val"])
    kernel = OPS["rotate_blocks"].kernel
    assert kernel is not None
    return values[0].dtype in LOW_PRECISION and kernel.applies(*values)


def _deltas(graph: fx.Graph, stack: fx.Node, dtype: torch.dtype, alone: bool) -> fx.Node:
    """The stack less the identity, rounded; made without it where nothing else reads it."""
    skew, b, order, narrow = arguments(stack)
    kernel = OPS["rotation_delta"].kernel
    assert kernel is not None
    if alone and narrow and kernel.applies(skew.meta["val"], b, order, dtype, 0):
        return _add(graph, stack, _poetx.rotation_delta.default, skew, b, order, dtype, 0)

    def rounded(rotations: Tensor) -> Tensor:
        return minus_identity(rotations).to(dtype)

    return insert(graph, stack.next, trace_reference(rounded, (stack.meta["val"],)), [stack])


def _part(
    graph: fx.Graph, part: fx.Node | None, deltas: fx.Node, known: dict[fx.Node | None, fx.Node]
) -> fx.Node:
    """What `part` is of the rotations, of the deltas."""
    assert part is not None
    split, number = part.args
    assert isinstance(split, fx.Node)
    if split not in known:
        known[split] = _add(graph, split, split.target, deltas, *split.args[1:])
    return _add(graph, part, operator.getitem, known[split], number)


def _add(graph: fx.Graph, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call in front of `node`, in whose place it comes."""
    values = map_arg(args, lambda n: n.meta["val"])
    fake_mode = detect_fake_mode([value for value in values if isinstance(value, Tensor)])
    with graph.inserting_before(node):
        added = graph.call_function(target, args)
    added.meta.update({key: value for key, value in node.meta.items() if key != "tensor_meta"})
    if target is operator.getitem:
        added.meta["val"] = values[0][values[1]]
    else:
        assert fake_mode is not None, "a post-grad graph carries fake tensors"
        with fake_mode:
            added.meta["val"] = target(*values)
    return added


def _erase(graph: fx.Graph, stack: fx.Node) -> None:
    """Erase what nothing reads any more: parts, splits, the stack."""
    splits = [user for user in stack.users if user.target is _aten.split_with_sizes.default]
    for node in [*(item for split in splits for item in split.users), *splits, stack]:
        if not node.users:
            graph.erase_node(node)
