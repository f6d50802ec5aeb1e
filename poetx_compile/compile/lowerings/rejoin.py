"""Slices of a tensor that are put together again, as the tensor that they are slices of.

The products of both sides of a folded layer come as one stack of blocks, are handed to autograd
side by side, and meet again in the batch of their tangents, often in the same order::

    first: f32[16, 256, 256] = slice(stack, 0, 0, 16)
    second: f32[16, 256, 256] = slice(stack, 0, 16, 32)
    together: f32[32, 256, 256] = cat([first, second])      # stack

Inductor would copy the stack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def rejoin_slices(graph: fx.Graph) -> None:
    """Replace each ``cat`` of all slices of a contiguous tensor, in order, by the tensor."""
    for node in graph.find_nodes(op="call_function", target=_aten.cat.default):
        parts: Any = node.args[0]
        whole = _whole(*node.args)
        # An output of the graph stays a tensor of its own.
        if whole is None or any(user.op == "output" for user in node.users):
            continue
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
        for part in parts:
            if not part.users:
                graph.erase_node(part)


def _whole(parts: Any, dim: Any = 0) -> fx.Node | None:
    """The tensor that `parts` are all slices of, one behind the other, if there is one."""
    source: fx.Node | None = None
    end = 0
    for part in parts:
        if part.target != _aten.slice.Tensor or part.kwargs:
            return None
        if len(part.args) < 3:
            return None
        of, along, start = part.args[:3]
        step = part.args[4] if len(part.args) > 4 else 1
        source = source or of
        size = part.meta["val"].shape[dim]
        known = all(isinstance(number, int) for number in (start, size))
        if of is not source or along != dim or step != 1 or not known or start != end:
            return None
        end = start + size
    if source is None or not source.meta["val"].is_contiguous():
        return None
    length = source.meta["val"].shape[dim]
    return source if isinstance(length, int) and length == end else None
