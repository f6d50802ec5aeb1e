"""The graphs a training step would run on a GPU, traced without one.

Dynamo traces the model on the meta device. Its graph is then given fake CPU tensors (the meta
device has neither autocast nor all gradients), goes through our passes, and AOTAutograd traces
forward and backward, which Inductor's joint passes and torch's partitioner split: the same steps,
in the same order, as in `torch.compile`. What the split hands from the forward to the backward is
what training keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from poetx_compile._torch import CustomPartitionerFn, OpOverload, TracingContext, pytree
from poetx_compile.compile.options import BackendOptions
from poetx_compile.compile.partition import Partitioner, partitioner_for
from poetx_compile.compile.rewrite import DryRun, rewrite
from poetx_compile.config import POETXConfig
from poetx_compile.errors import EstimateError
from poetx_compile.inspect.memory.attention import as_on_cuda
from poetx_compile.passes import graphs, metadata
from poetx_compile.passes.contexts import without_inference_mode


@dataclasses.dataclass(frozen=True)
class TracedGraph:
    """Forward and backward of one graph of the model, in aten ops and the ops of this package."""

    forward: fx.Graph
    backward: fx.Graph


def trace(
    step: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    choices: Sequence[BackendOptions | None],
) -> list[list[TracedGraph]]:
    """Trace a training step, `step` being on the meta device and returning a loss.

    Args:
        choices: options of `poetx_backend`, or ``None`` for a model that is trained densely. Dynamo
            traces once for all of them.

    Returns:
        For each choice the graphs of the step, in the order they run.

    Raises:
        EstimateError: Dynamo or AOTAutograd cannot trace it.
    """
    traced: list[list[TracedGraph]] = [[] for _ in choices]

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        plain, fakes = _on_cpu(gm, example_inputs)
        for group in _alike([_rewritten(plain, fakes, options) for options in choices]):
            _partition(
                group, [choices[i] for i in group.choices], [traced[i] for i in group.choices]
            )
        return gm.forward

    torch.compiler.reset()
    try:
        with (
            torch._dynamo.config.patch(suppress_errors=False),
            torch.enable_grad(),
            _quiet("torch._subclasses.fake_tensor"),  # a traceback for what is raised below
        ):
            torch.compile(step, backend=backend, dynamic=False)(*inputs, **kwargs)
    except Exception as error:
        raise _explained(getattr(error, "inner_exception", error)) from error
    finally:
        torch.compiler.reset()
    if not all(traced):
        raise EstimateError(
            "no part of the step that takes gradients could be traced: look at loss=... and at the "
            "requires_grad of the parameters"
        )
    return traced


def _explained(cause: BaseException) -> EstimateError:
    """What a user can do about it, and where it stopped."""
    message = f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}"
    op, layer = _op_at_fault(cause)
    where = f" at the op {op}" + (f" of {layer}" if layer else "") if op else ""
    return EstimateError(
        f"the model cannot be traced on the meta device: it stops{where}. Give example inputs that "
        "its forward takes, estimate(model, *inputs, **kwargs), or a loss=... for its output; of a "
        f"model that needs the values of tensors, measure a step on a GPU. {message}"
    )


def _op_at_fault(error: BaseException) -> tuple[str | None, str]:
    """The op that a traceback ends in, and the layer of the model, where its frames know them."""
    op, layer = None, ""
    trace = error.__traceback__
    while trace is not None:
        for value in trace.tb_frame.f_locals.values():
            if isinstance(value, fx.Node) and value.op in ("call_function", "call_method"):
                op = getattr(value.target, "__name__", str(value.target))
                layer = graphs.layer_of(value).name
            elif isinstance(value, OpOverload):
                op = str(value)
        trace = trace.tb_next
    return op, layer


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@dataclasses.dataclass
class _Graph:
    """A rewritten graph of one choice or several, which may differ in what they recompute.

    Attributes:
        tags: by the mark of a node (from 1) what each choice says of it, where they differ.
    """

    graph: fx.GraphModule
    inputs: list[Any]
    choices: list[int]
    tags: list[list[dict[str, Any]]] = dataclasses.field(default_factory=list)

    def nodes(self) -> list[fx.Node]:
        return [node for module in graphs.nested(self.graph) for node in module.graph.nodes]


def _rewritten(
    plain: fx.GraphModule, fakes: list[Any], options: BackendOptions | None
) -> tuple[fx.GraphModule, list[Any]]:
    if options is None:
        graph, inputs = graphs.clone(plain), fakes
    else:
        made = rewrite(plain, fakes, options, dry_run=DryRun())
        graph, inputs = made.graph, [*fakes, *made.inputs]
    without_inference_mode(graph)
    as_on_cuda(graph)
    return graph, inputs


def _alike(rewritten: Sequence[tuple[fx.GraphModule, list[Any]]]) -> list[_Graph]:
    """Graphs that differ in tags alone, as ``fast`` and ``mem`` mostly do, as one."""
    found: list[_Graph] = []
    for number, (graph, inputs) in enumerate(rewritten):
        own = _Graph(graph, inputs, [number])
        same = [g for g in found if len(g.inputs) == len(inputs) and _calls(g) == _calls(own)]
        if same:
            same[0].choices.append(number)
        else:
            found.append(own)
    for group in found:
        members = [_Graph(*rewritten[i], [i]).nodes() for i in group.choices]
        for nodes in zip(*members, strict=True):
            tags = [{key: n.meta[key] for key in _TAGS if key in n.meta} for n in nodes]
            if any(tag != tags[0] for tag in tags):
                group.tags.append(tags)
                nodes[0].meta |= dict(zip(_TAGS, (_MARKED, _MARK + len(group.tags)), strict=True))
    return found


_TAGS = ("recompute", "ac_graph_id")
_MARKED = CheckpointPolicy.PREFER_RECOMPUTE
_MARK = 2**40
"""Regions from here on are marks: no checkpoint has them, nor does the pass `recompute`."""


def _calls(graph: _Graph) -> list[Any]:
    """What a graph computes, apart from names."""
    nodes = graph.nodes()
    places = {node: place for place, node in enumerate(nodes)}

    def operands(node: fx.Node) -> Any:
        return fx.node.map_arg((node.args, node.kwargs), lambda n: ("node", places[n]))

    return [(n.op, n.target if n.op == "call_function" else "", operands(n)) for n in nodes]


class _Partitioner(CustomPartitionerFn):
    """A partitioner as Inductor calls it, for each choice torch's own or ours; keeps what they
    made."""

    def __init__(
        self,
        tags: list[list[dict[str, Any]]],
        partitioners: list[Partitioner | None],
        traced: list[list[TracedGraph]],
    ):
        self.tags, self.partitioners, self.traced = tags, partitioners, traced

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        from poetx_compile._torch import min_cut_rematerialization_partition

        for number, (ours, traced) in enumerate(zip(self.partitioners, self.traced, strict=True)):
            joint = graphs.clone(gm)
            for node in joint.graph.nodes:
                if (mark := node.meta.get("ac_graph_id", 0) - _MARK) > 0:
                    del node.meta["recompute"], node.meta["ac_graph_id"]
                    node.meta |= self.tags[mark - 1][number]
            if ours is not None:
                forward, backward = ours(joint, joint_inputs, **kwargs)
            else:
                settings = {"compiler": "inductor"} | kwargs
                forward, backward = min_cut_rematerialization_partition(
                    joint, joint_inputs, **settings
                )
            traced.append(TracedGraph(forward.graph, backward.graph))
        return forward, backward

    def uuid(self) -> Any:
        return None


def _partition(
    group: _Graph, choices: list[BackendOptions | None], traced: list[list[TracedGraph]]
) -> None:
    """Trace forward and backward once, and split them for each choice."""
    from poetx_compile._torch import compile_fx

    def stop_here(gm: fx.GraphModule, _: Any, **__: Any) -> Any:
        return gm.forward

    ours = [c if c is None else partitioner_for(POETXConfig.from_dict(c.config)) for c in choices]
    settings: dict[str, Any] = {
        "custom_partitioner_fn": _Partitioner(group.tags, ours, traced),
        "force_disable_caches": True,
    }
    with torch._functorch.config.patch(enable_autograd_cache=False):
        compile_fx(group.graph, group.inputs, inner_compile=stop_here, config_patches=settings)


_META, _CPU = torch.device("meta"), torch.device("cpu")


def _on_cpu(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of Dynamo's graph over fake CPU tensors, its values evaluated anew.

    Anew, because the dtypes inside of an autocast region are not those of the meta device.
    """
    context = TracingContext.get()
    assert context.fake_mode is not None
    graph = graphs.clone(gm)
    _count_in_floats(graph)
    nodes = [node for module in graphs.nested(graph) for node in module.graph.nodes]
    again = [node for node in nodes if _is_evaluated(node)]
    values: dict[int, tuple[Any, Any]] = {}  # one value stays one, in nested bodies as well
    with context.fake_mode:
        for node in nodes:
            node.args, node.kwargs = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda a: _CPU if a == _META else a
            )
            if graphs.VALUE in node.meta:
                value = node.meta[graphs.VALUE]
                node.meta[graphs.VALUE] = values.setdefault(id(value), (value, _empty(value)))[1]
        for node in again:
            del node.meta[graphs.VALUE]
        with torch.no_grad():  # what stands in for inputs are leaves, and some are written to
            metadata.refresh(graph)
        return graph, [_empty(x) for x in example_inputs]


def _count_in_floats(root: fx.GraphModule) -> None:
    """`torch.histc` of integers, by which mixtures count tokens, is CUDA's alone."""
    for module in graphs.nested(root):
        for node in module.graph.find_nodes(op="call_function", target=torch.histc):
            dtype = node.meta[graphs.VALUE].dtype
            if dtype.is_floating_point:
                continue
            with module.graph.inserting_before(node):
                floats = module.graph.call_method("to", (node.args[0], torch.float32))
            graphs.inherit(floats, node).meta[graphs.VALUE] = node.meta[graphs.VALUE]
            node.replace_input_with(node.all_input_nodes[0], floats)
            with module.graph.inserting_after(node):
                counts = module.graph.call_method("to", (node, dtype))
            graphs.inherit(counts, node).meta[graphs.VALUE] = node.meta[graphs.VALUE]
            node.replace_all_uses_with(
                counts, delete_user_cb=lambda user, own=counts: user is not own
            )


def _is_evaluated(node: fx.Node) -> bool:
    """Whether `metadata.refresh` can give a call its value."""
    if node.op not in ("call_function", "call_method") or node.meta.get(graphs.VALUE) is None:
        return False
    if graphs.in_transform(node) or graphs.bodies(node):
        return False
    return all(n.meta.get(graphs.VALUE) is not None for n in node.all_input_nodes)


def _empty(value: Any) -> Any:
    """CPU tensors of the sizes of those in `value`, parameters as parameters."""

    def like(tensor: Tensor) -> Tensor:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(empty, tensor.requires_grad)
        return empty.requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(Tensor, like, value)
