"""FX helpers shared by the passes: copies, nesting, names, metadata."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.nn import functional as F

from poetx_compile import ops  # noqa: F401 (defines what `torch.ops.poetx` has)
from poetx_compile._torch import is_functorch_wrapped_tensor, pytree

VALUE = "example_value"
"""Where Dynamo keeps the fake value of a node."""

ROLE = "poetx_role"
"""Where a pass says what a node it made is for: one of the roles below."""

ROTATION = "rotation"
"""A rotation, or a step of building it from the packed skew parameters."""

INTERMEDIATE = "intermediate"
"""A value inside a layer, between its input and its output rotation."""

FOLDED_WEIGHT = "folded weight"
"""The effective weight of a layer, or one with a side folded in."""

DEQUANTIZED = "dequantized weight"
"""A dense form of an int8 weight, alive as long as it is read."""

OUTPUT = "output"
"""The output of a layer, which its own backward reads."""

TANGENT = "tangent"
"""Zeros that carry the gradient of a rotation; never computed."""

LINEAR = F.linear
ROTATED = torch.ops.poetx.orthogonal_equivalence
"""The effective weight of a layer."""
IDENTITY = torch.ops.poetx.identity_equivalence
"""That of a layer whose rotations are the identity whenever it runs."""
EQUIVALENCE = (ROTATED, IDENTITY)
"""What gives effective weights; arguments are the stored weight, then both skew parameters."""

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def clone(gm: fx.GraphModule, _memo: dict[int, fx.GraphModule] | None = None) -> fx.GraphModule:
    """A copy of Dynamo's graph module that may be edited; a child used twice is copied once.

    Dynamo keeps its own graph and reads it again after the backend returned, so that one must
    not be touched.
    """
    memo = {} if _memo is None else _memo
    if id(gm) in memo:
        return memo[id(gm)]
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        if old.op == "placeholder" and hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
        new.meta.pop("grapharg", None)  # refers weakly to the parameter: torch could not swap it
        if new.op in ("call_function", "call_method"):
            new.meta.setdefault(VALUE, None)  # called for an effect: never evaluated again
    copy = fx.GraphModule(gm, graph, gm.__class__.__name__)
    copy.meta = dict(gm.meta)
    for key, value in gm.__dict__.items():
        if key not in copy.__dict__:
            copy.__dict__[key] = value
    memo[id(gm)] = copy
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule) and hasattr(copy, name):
            setattr(copy, name, clone(child, memo))
    return copy


def nested(root: fx.GraphModule) -> list[fx.GraphModule]:
    """`root` and every graph module below it, each once."""
    found: dict[int, fx.GraphModule] = {id(root): root}
    for child in root.children():
        if isinstance(child, fx.GraphModule):
            found.update((id(g), g) for g in nested(child))
    return list(found.values())


def fsdp_inputs(gm: fx.GraphModule) -> set[int]:
    """Positions of the inputs that are parameters or buffers of a module under FSDP.

    While the module runs they are plain tensors, gathered for it; only their source tells.
    """
    sources = [getattr(n, "_dynamo_source", None) for n in gm.graph.find_nodes(op="placeholder")]
    return {i for i, s in enumerate(sources) if s is not None and s.guard_source.is_fsdp_module()}


def add_input(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    """A new last placeholder, which Dynamo knows nothing of."""
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta[VALUE] = value
    node._dynamo_source = None  # type: ignore[attr-defined]
    return node


def linear_arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    """(input, weight, bias) of an ``F.linear`` call, however it was spelled."""
    values = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    return values["input"], values["weight"], values.get("bias")


def is_linear(node: Any) -> bool:
    """Whether a node is a call of ``F.linear``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is LINEAR


def is_op(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of `targets` (op packets match their default overload too)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return any(node.target is t or node.target is getattr(t, "default", None) for t in targets)


_FRAME = re.compile(r"^L\['(args'\]\[0|[^']*')\]\.?")
"""The module that was compiled, in the terms of its frame: the first of ``*args`` where the forward
is decorated."""


class Layer(NamedTuple):
    """Where a node comes from: the module's name as seen from the compiled frame, and its id."""

    name: str
    module_id: int | None


def layer_of(node: fx.Node, stack_key: str = "nn_module_stack") -> Layer:
    """The innermost module a node came from; a node of no module gives its own name.

    `stack_key`: AOTAutograd has ``fwd_nn_module_stack`` in nodes of the backward.
    """
    stack = node.meta.get(stack_key) or {}
    if not stack:
        return Layer(node.name, None)
    key, (path, *_) = next(reversed(stack.items()))
    path = re.sub(_FRAME, "", path)
    path = re.sub(r"_modules\['([^']*)'\]", r"\1", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    path = re.sub(r"(?<![^.])_orig_mod(?![^.])", "", path)  # of a part that is compiled by itself
    path = re.sub(r"\.{2,}", ".", path).strip(".")
    name = re.sub(r"\.?parametrizations\.weight\.\d+$", "", path) or "(root)"
    module_id = key.split("@")[0]
    return Layer(name, int(module_id) if module_id.isdigit() else None)


def layers_of(nodes: Iterable[fx.Node]) -> tuple[Layer, ...]:
    """The layers of several nodes, each once, in order."""
    return tuple(dict.fromkeys(map(layer_of, nodes)))


def inherit(new: fx.Node, old: fx.Node, role: str | None = None) -> fx.Node:
    """Give a new node the origin (module stack, stack trace) of the node it replaces."""
    if role is not None:
        new.meta[ROLE] = role
    for key in (
        "nn_module_stack",
        "source_fn_stack",
        "stack_trace",
        "creation_timestamp",
        "custom",
    ):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    return new


def arguments_of(equivalence: fx.Node) -> dict[str, Any]:
    """The arguments given to an op that makes effective weights, by their names."""
    target: Any = equivalence.target
    schema = getattr(target, "default", target)._schema
    return dict(zip((a.name for a in schema.arguments), equivalence.args, strict=False))


def with_arguments(equivalence: fx.Node, values: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of such an op with other values for some; no ``None`` at the end."""
    args = list((arguments_of(equivalence) | values).values())
    while args and args[-1] is None:
        args.pop()
    return tuple(args)


def shape_of(node: Any) -> torch.Size | None:
    """Shape of a node's value, or ``None`` where it is unknown."""
    value = node.meta.get(VALUE) if isinstance(node, fx.Node) else None
    return value.shape if isinstance(value, torch.Tensor) else None


def bodies(call: fx.Node) -> list[fx.GraphModule]:
    """The graph modules a higher-order op is called with."""
    module = call.graph.owning_module
    found = (
        getattr(module, str(n.target), None) for n in call.all_input_nodes if n.op == "get_attr"
    )
    return [body for body in found if isinstance(body, fx.GraphModule)]


def in_transform(node: fx.Node) -> bool:
    """Whether a node enters or leaves a `torch.func` transform, or computes inside one.

    Its values are wrappers of a transform's level, which is gone when the graph is rewritten.
    """
    if "functorch" in str(getattr(node.target, "__module__", "")):
        return True
    # What is taken out of a tuple is all of it that counts: a batch has hundreds of entries.
    read = () if node.target is operator.getitem else node.all_input_nodes
    values = [n.meta.get(VALUE) for n in (node, *read)]
    return any(
        isinstance(v, torch.Tensor) and is_functorch_wrapped_tensor(v)
        for v in pytree.tree_leaves(values)
    )


def getitem(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """``node[index]`` as a node."""
    return graph.call_function(operator.getitem, (node, index))
