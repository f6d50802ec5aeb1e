"""Graphs as short text that a person can review: names normalised, every value with its type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from poetx_compile._torch import OpOverload, OpOverloadPacket
from poetx_compile.ops.gains import GAINS
from poetx_compile.passes import graphs
from poetx_compile.passes.adopt_linear import STATE

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "b8",
}


class Line(NamedTuple):
    """The text of one node, and the graph module it is in."""

    node: fx.Node
    text: str
    depth: int


def render(root: fx.GraphModule) -> str:
    """The graph, one line a node, checkpointed bodies indented below their call.

    The same graph gives the same text on every torch version: inputs are named after the module
    they belong to, values are numbered, symbolic sizes are named in order of appearance. Nodes
    whose result nobody reads and the nodes of symbolic sizes are left out.
    """
    return "\n".join("    " * line.depth + line.text for line in lines(root))


def lines(root: fx.GraphModule) -> Iterator[Line]:
    """The lines of `render`, each with its node."""
    return _lines(root, {}, 0)


def _lines(module: fx.GraphModule, sizes: dict[str, str], depth: int) -> Iterator[Line]:
    names: dict[fx.Node, str] = {}
    numbered = 0
    for node in module.graph.nodes:
        value = node.meta.get(graphs.VALUE)
        if node.op == "placeholder":
            names[node] = input_name(node.name)
            if isinstance(value, torch.Tensor) and node.users:
                yield Line(node, f"{names[node]}: {type_text(value, sizes)}", depth)
        elif node.op == "get_attr":
            names[node] = str(node.target)
        elif node.op == "output":
            yield Line(node, f"return {_argument(node.args[0], names, sizes)}", depth)
        else:
            numbered += 1
            names[node] = f"%{numbered}"
            arguments = [_argument(a, names, sizes) for a in node.args]
            arguments += [f"{k}={_argument(v, names, sizes)}" for k, v in node.kwargs.items()]
            kind = f": {type_text(value, sizes)}" if value is not None else ""
            tags = _TAGS.get(node.meta.get("recompute"), "")
            call = f"{target_name(node)}({', '.join(arguments)})"
            yield Line(node, f"{names[node]}{kind} = {call}{tags}", depth)
            for body in graphs.bodies(node):
                yield from _lines(body, sizes, depth + 1)


_TAGS = {
    CheckpointPolicy.MUST_RECOMPUTE: " [recompute]",
    CheckpointPolicy.PREFER_RECOMPUTE: " [may recompute]",
}
"""What `recompute` has said of a node."""

_MEMBER = re.compile(r"_(?:modules|parameters|buffers)_")


def belongs_to_a_module(placeholder: str) -> bool:
    """Whether an input is a parameter, a buffer or an adopted state, not an input of the model."""
    return _MEMBER.search(placeholder) is not None


def input_name(placeholder: str) -> str:
    """``l_self_modules_q_…_weight_modules_0_parameters_skew_in_`` → ``q.skew_in``."""
    parts = _MEMBER.split(placeholder.strip("_"))
    parts = [part.removesuffix("_orig_mod") for part in parts]  # of a part compiled by itself
    head, *path = parts
    for noise in (["pair"], ["parametrizations", "weight"]):
        for i in range(len(path) - len(noise) + 1):
            if path[i : i + len(noise)] == noise:
                path[i : i + len(noise)] = []
                break
    if len(path) > 1 and path[-2] == "0" and path[-1] in (*STATE, *GAINS, "scale"):
        path.pop(-2)
    if path:  # inputs that adopt_linear added are named after the weight
        path[-1] = re.sub(r"^weight_(?=skew_|perm_|gain_)", "", path[-1])
    return ".".join(path) if path else re.sub(r"^l_", "", head)


def target_name(node: fx.Node) -> str:
    """What a node calls, in a word."""
    if node.op == "call_method":
        return f".{node.target}"
    target: Any = node.target
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    if isinstance(target, OpOverloadPacket):
        return str(target)
    return getattr(target, "__name__", str(target))


def type_text(value: Any, sizes: dict[str, str]) -> str:
    """``bf16[8, s0, 2048]``; `sizes` gives symbolic sizes their names."""
    if isinstance(value, torch.Tensor):
        shape = ", ".join(_size(s, sizes) for s in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{shape}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(type_text(v, sizes) for v in value)})"
    return type(value).__name__


def _size(size: Any, sizes: dict[str, str]) -> str:
    if not isinstance(size, torch.SymInt):
        return str(size)
    return sizes.setdefault(str(size), f"s{len(sizes)}")


def _argument(value: Any, names: dict[fx.Node, str], sizes: dict[str, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        inner = ", ".join(_argument(v, names, sizes) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, torch.SymInt):
        return _size(value, sizes)
    return str(value)
