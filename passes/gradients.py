"""Which inputs a graph's outputs send gradients to, and which nodes a backward reaches.

No rewrite may change the first: an input that got a gradient gets one, an input that got none
(``None``, not zeros) gets none. `run` compares it before and after each pass.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from poetx_compile._torch import pytree
from poetx_compile.passes import columns, graphs
from poetx_compile.passes.contexts import Contexts

STANDS_FOR = "poetx_stands_for"
"""Where a pass notes of a new input which input it takes the gradient of."""

SLICE_OF = "poetx_slice_of"
"""Where a pass notes of a slice of a batch which input it was made of."""


class Reached(NamedTuple):
    """The inputs that gradients reach, as bits by position: from each output, and from them all.

    From one output, the slice of a batch reaches the input it was made of. From them all it is what
    autograd does, which gives zeros to what else is in the batch.
    """

    outputs: tuple[int, ...]
    together: int


def reached(contexts: Contexts) -> Reached:
    """What gradients of the outputs of a graph module reach."""
    root = contexts.root
    places = root.graph.find_nodes(op="placeholder")
    position = {place: i for i, place in enumerate(places)}
    inputs = [
        1 << position[place.meta.get(STANDS_FOR, place)] if _records(place, contexts) else 0
        for place in places
    ]
    return Reached(
        tuple(_outputs(root, contexts, inputs, by_slice=True)),
        functools.reduce(operator.or_, _outputs(root, contexts, inputs, by_slice=False), 0),
    )


def live(contexts: Contexts) -> set[fx.Node]:
    """The nodes, of bodies too, that receive a gradient where every output of the graph does."""
    found: set[fx.Node] = set()
    _mark(contexts.root, contexts, _results(contexts.root), found)
    return found


def passes_through(node: fx.Node, contexts: Contexts) -> bool:
    """Whether the value of a new node requires a gradient, as autograd would record it."""
    if node.target == "detach" or not contexts.of(node).records:
        return False
    return any(_records(read, contexts) for read in _differentiated(node))


def _outputs(
    module: fx.GraphModule, contexts: Contexts, inputs: Iterable[int], by_slice: bool
) -> list[int]:
    """What each output of `module` reaches, given what its placeholders do."""
    given = iter(inputs)
    found: dict[fx.Node, int] = {}
    results: dict[fx.Node, list[int]] = {}  # of checkpoints
    for node in module.graph.nodes:
        if node.op == "placeholder":
            found[node] = next(given, 0)
        elif node.op == "output" or not _records(node, contexts):
            found[node] = 0
        elif node.target is graphs.CHECKPOINT:
            (body,) = graphs.bodies(node)
            given_on = [found.get(a, 0) for a in node.args[1:]]  # type: ignore[arg-type]
            results[node] = _outputs(body, contexts, given_on, by_slice)
            found[node] = functools.reduce(operator.or_, results[node], 0)
        elif _is_result(node):
            found[node] = results[node.args[0]][node.args[1]]
        else:
            reads = (found[n] for n in _differentiated(node))
            found[node] = functools.reduce(operator.or_, reads, 0)
            if by_slice and SLICE_OF in node.meta:
                found[node] &= found[node.meta[SLICE_OF]]
    return [found[n] if isinstance(n, fx.Node) else 0 for n in _results(module)]


def _mark(
    module: fx.GraphModule, contexts: Contexts, results: Iterable[Any], found: set[fx.Node]
) -> None:
    """Add what `results` of `module` send gradients to."""
    reads = {node for node in results if isinstance(node, fx.Node)}
    indices: dict[Any, set[int]] = {}  # of the results of a checkpoint, those that are live
    for node in reversed(module.graph.nodes):
        if node not in reads or not _records(node, contexts):
            continue
        found.add(node)
        if node.target is graphs.CHECKPOINT:
            (body,) = graphs.bodies(node)
            inner = _results(body)
            _mark(body, contexts, [inner[i] for i in indices[node]], found)
            places = body.graph.find_nodes(op="placeholder")
            reads.update(a for a, p in zip(node.args[1:], places, strict=True) if p in found)
        else:
            reads.update(_differentiated(node))
            if _is_result(node):
                indices.setdefault(node.args[0], set()).add(node.args[1])  # type: ignore[arg-type]


def _is_result(node: fx.Node) -> bool:
    """Whether a node picks one result of a checkpoint."""
    if node.target is not operator.getitem:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and source.target is graphs.CHECKPOINT


def _is_handed_on(node: fx.Node) -> bool:
    """Whether a node gives a tensor that was there: an entry of a tuple, a cast to its dtype."""
    given = pytree.tree_leaves([n.meta.get(graphs.VALUE) for n in node.all_input_nodes])
    return any(node.meta.get(graphs.VALUE) is value for value in given)


def _differentiated(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that `node` hands its gradient on to."""
    # An effective weight takes the stored one for a constant, whatever its flag says.
    constant = node.args[0] if graphs.is_op(node, *graphs.EQUIVALENCE) else None
    reads = (n for n in node.all_input_nodes if n is not constant)
    return (n for n in reads if not columns.refers_only(node, n))


def _records(node: fx.Node, contexts: Contexts) -> bool:
    """Whether a value is one that autograd has a gradient for."""
    # Fake values know of `no_grad`, not of inference mode.
    if node.op != "placeholder" and contexts.of(node).inference and not _is_handed_on(node):
        return False
    leaves = pytree.tree_leaves(node.meta.get(graphs.VALUE))
    if any(isinstance(v, torch.Tensor) and v.requires_grad for v in leaves):
        return True
    # The wrappers of a transform do not tell any more.
    return node.op != "placeholder" and contexts.of(node).records and graphs.in_transform(node)


def _results(module: fx.GraphModule) -> list[Any]:
    (output,) = module.graph.find_nodes(op="output")
    return pytree.tree_leaves(output.args)
