"""Attention as CUDA computes it: the kernel that `scaled_dot_product_attention` picks there."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from poetx_compile.passes import graphs

_NARROW = (torch.bfloat16, torch.float16)
_FLASH_HEAD = 256
"""The largest head of the flash kernel, in elements."""

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def as_on_cuda(root: fx.GraphModule) -> None:
    """Replace each ``F.scaled_dot_product_attention`` by the call that CUDA would dispatch to.

    On a CPU the same call keeps other tensors for its backward. The order of preference is torch's:
    flash (bf16 and fp16, no mask), memory-efficient (any mask), then the plain formula, which keeps
    the scores.
    """
    for module in graphs.nested(root):
        found = module.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
        for node in found:
            _replace(module.graph, node)
        if found:
            module.graph.lint()
            module.recompile()


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    given: dict[str, Any] = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    mask, scale = given.get("attn_mask"), given.get("scale")
    dropout, causal = given.get("dropout_p", 0.0), given.get("is_causal", False)
    dtype = node.meta[graphs.VALUE].dtype
    query, key, value = (given[name].meta[graphs.VALUE].shape for name in _ARGUMENTS[:3])
    grouped = len(query) > 2 and query[-3] != key[-3]
    options: dict[str, Any] = {"scale": scale}
    with graph.inserting_before(node):
        arguments: list[Any] = [_cast(graph, given[name], dtype) for name in _ARGUMENTS[:3]]
        if _is_flash(query, value, dtype) and mask is None:
            target: Any = torch.ops.aten._scaled_dot_product_flash_attention.default
            arguments += [dropout, causal]
        elif len(query) == 4 and dtype != torch.float64 and not grouped:
            target = torch.ops.aten._scaled_dot_product_efficient_attention.default
            bias = mask and _bias(graph, mask, (*query[:3], key[2]), dtype)
            arguments += [bias, True, dropout, causal]
        else:
            target = torch.ops.aten._scaled_dot_product_attention_math.default
            arguments += [mask, dropout, causal]
            options["enable_gqa"] = grouped
        called = graph.call_function(target, tuple(arguments), options)
        result = graph.call_function(operator.getitem, (called, 0))
    graphs.inherit(called, node)
    graphs.inherit(result, node).meta[graphs.VALUE] = node.meta[graphs.VALUE]
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _is_flash(query: torch.Size, value: torch.Size, dtype: torch.dtype) -> bool:
    heads_fit = query[-1] == value[-1] and query[-1] <= _FLASH_HEAD
    return len(query) == 4 and dtype in _NARROW and heads_fit


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """`node` in the dtype that autocast gives it."""
    if node.meta[graphs.VALUE].dtype == dtype:
        return node
    return graph.call_method("to", (node, dtype))


def _bias(graph: fx.Graph, mask: fx.Node, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
    """What the memory-efficient kernel takes for a mask, in size and dtype if not in value."""
    return graph.call_method("expand", (_cast(graph, mask, dtype), *shape))
