"""A graph as boxes and arrows: what `explain` draws, with the module each node belongs to."""

from __future__ import annotations

import dataclasses
import operator
import re
from pathlib import PurePath
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from poetx_compile.inspect.render import (
    belongs_to_a_module,
    input_name,
    lines,
    target_name,
    type_text,
)
from poetx_compile.passes import graphs

INPUT, OUTPUT = "input", "output"
ROTATIONS = "rotations"
"""The module, in the drawing, of rotations that are built for several layers at once."""

_KINDS = {
    "cayley_neumann": "rotation",
    "cayley_exact": "rotation",
    "rotation_delta": "rotation",
    "rotation_tangent": "rotation",
    "orthogonal_equivalence": "weight",
    "fold_weight": "weight",
    "rotate_blocks": "activation",
    "permute_columns": "activation",
    "linear": "product",
    "folded_linear": "product",
    "matmul": "product",
    "bmm": "product",
    "scaled_dot_product_attention": "product",
}


_OF_PARAMETERS = ("neg", "detach")
"""Methods that make of a parameter what reads as one."""

_ROTATION_ROLES = (graphs.ROTATION, graphs.TANGENT)
_TORCH = str(PurePath(torch.__file__).parent)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One box.

    Attributes:
        label: the op, in a word; for an input of the model its name.
        kind: ``"input"``, ``"output"``, ``"rotation"``, ``"weight"``, ``"activation"`` (of columns,
            by this package), ``"product"`` or ``"other"``.
        type: dtype and shape of the value.
        module: the segments of the module's name, a number joined to the name before it.
        reads: indices of the boxes it reads, in the list.
        parameters: names and types of the parameters and buffers it reads.
        text: its line in `render`.
        source: the user's line of code it comes from.
        again: whether the backward recomputes it, whatever the memory budget.
    """

    label: str
    kind: str
    type: str
    module: tuple[str, ...]
    reads: tuple[int, ...]
    parameters: tuple[str, ...]
    text: str
    source: str
    again: bool


def drawing(root: fx.GraphModule) -> list[Drawn]:
    """The boxes of a graph in its order.

    Parameters and buffers are no boxes: they are named where they are read. Nor are parts of
    tuples. Bodies of activation checkpoints stand where they are called.
    """
    return _Drawing(root).boxes


class _Drawing:
    def __init__(self, root: fx.GraphModule):
        self.boxes: list[Drawn] = []
        self._sizes: dict[str, str] = {}
        self._texts = {line.node: line.text for line in lines(root)}
        self._sources: dict[fx.Node, tuple[int, ...]] = {}  # a node's value → the boxes it is from
        self._parameters: dict[fx.Node, str] = {}
        self._shared = _shared_rotations(root)
        self._draw(root)

    def _draw(self, module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            value = node.meta.get(graphs.VALUE)
            if node.op == "placeholder":
                self._input(node, value)
            elif node.op == "output":
                if module.graph.owning_module is not None and node not in self._sources:
                    self._output(node)
            elif graphs.is_op(node, graphs.CHECKPOINT):
                self._checkpoint(node)
            elif _is_part(node):
                self._sources[node] = self._read(node)
            elif node.op == "call_method" and node.target in _OF_PARAMETERS and self._names(node):
                self._parameters[node] = f".{node.target} of {self._names(node)[0]}"
            elif node.op in ("call_function", "call_method") and _has_tensors(value):
                self._sources[node] = (self._box(node, target_name(node), value),)

    def _input(self, node: fx.Node, value: Any) -> None:
        if node in self._sources or node in self._parameters:
            return  # an operand of a checkpoint
        name = input_name(node.name)
        if belongs_to_a_module(node.name):
            self._parameters[node] = f"{name}: {type_text(value, self._sizes)}"
        elif node.users and isinstance(value, torch.Tensor):
            box = Drawn(
                name, INPUT, type_text(value, self._sizes), (), (), (), self._texts[node], "", False
            )
            self.boxes.append(box)
            self._sources[node] = (len(self.boxes) - 1,)

    def _output(self, node: fx.Node) -> None:
        text = self._texts.get(node, "return")
        self.boxes.append(Drawn("return", OUTPUT, "", (), self._read(node), (), text, "", False))

    def _checkpoint(self, call: fx.Node) -> None:
        (body,) = graphs.bodies(call)
        for place, operand in zip(
            body.graph.find_nodes(op="placeholder"), call.args[1:], strict=True
        ):
            if operand in self._parameters:
                self._parameters[place] = self._parameters[operand]  # type: ignore[index]
            else:
                self._sources[place] = self._sources.get(operand, ())  # type: ignore[arg-type]
        output = body.graph.output_node()
        self._sources[output] = ()  # no box of its own
        self._draw(body)
        self._sources[call] = self._read(output)

    def _read(self, node: fx.Node) -> tuple[int, ...]:
        found = (box for n in node.all_input_nodes for box in self._sources.get(n, ()))
        return tuple(dict.fromkeys(found))

    def _names(self, node: fx.Node) -> tuple[str, ...]:
        """The parameters a node reads."""
        return tuple(self._parameters[n] for n in node.all_input_nodes if n in self._parameters)

    def _box(self, node: fx.Node, label: str, value: Any) -> int:
        label = label.removeprefix("poetx.").removeprefix(".")
        is_rotation = node in self._shared or node.meta.get(graphs.ROLE) in _ROTATION_ROLES
        self.boxes.append(
            Drawn(
                label=label,
                kind="rotation" if is_rotation else _KINDS.get(label, "other"),
                type=type_text(value, self._sizes) if isinstance(value, torch.Tensor) else "tuple",
                module=self._shared.get(node) or segments(node),
                reads=self._read(node),
                parameters=self._names(node),
                text=self._texts.get(node, ""),
                source=_source(node),
                again=node.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE,
            )
        )
        return len(self.boxes) - 1


def segments(node: fx.Node) -> tuple[str, ...]:
    """The module a node came from: ``layers.0.mlp.up`` → ``("layers.0", "mlp", "up")``."""
    layer = graphs.layer_of(node)
    if layer.module_id is None or layer.name == "(root)":
        return ()
    found: list[str] = []
    for part in layer.name.split("."):
        if part.isdigit() and found:
            found[-1] += f".{part}"
        else:
            found.append(part)
    return tuple(found)


def _is_part(node: fx.Node) -> bool:
    """``x[i]`` of a tuple x."""
    if node.target is not operator.getitem:
        return False
    above = node.args[0]
    value = above.meta.get(graphs.VALUE) if isinstance(above, fx.Node) else None
    return not isinstance(value, torch.Tensor)


def _has_tensors(value: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(value)
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves)


def _shared_rotations(root: fx.GraphModule) -> dict[fx.Node, tuple[str, ...]]:
    """Nodes that build the rotations of more than one layer, and their module in the drawing."""
    shared: dict[fx.Node, tuple[str, ...]] = {}
    batches = 0
    for module in graphs.nested(root):
        for node in module.graph.nodes:
            if node.meta.get(graphs.ROLE) not in _ROTATION_ROLES:
                continue
            split = [user for user in node.users if user.target is torch.split]
            if split:
                batch = (ROTATIONS, f"batch.{batches}")
                shared |= dict.fromkeys([node, *split, *_above(node)], batch)
                batches += 1
    return shared


def _above(node: fx.Node) -> set[fx.Node]:
    """What a rotation is built of: its parameters, negated, detached, in one tensor."""
    found: set[fx.Node] = set()
    for operand in node.all_input_nodes:
        if operand.op != "placeholder":
            found |= {operand, *_above(operand)}
    return found


def _source(node: fx.Node) -> str:
    """The innermost line in the node's stack trace that is not torch's: ``llama.py:87: q = …``."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    frames = [f for f in frames if not f[0].startswith(_TORCH)]
    if not frames:
        return ""
    file, number, code = frames[-1]
    return f"{PurePath(file).name}:{number}: {code.strip()}"
