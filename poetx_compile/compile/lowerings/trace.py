"""An op's reference or kernel as a graph of nodes that Inductor compiles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from poetx_compile._torch import OpOverload, _DisableAutocast, detect_fake_mode, triton_kernel_wrap
from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.kernels.common import traced_launches

log = logging.getLogger("poetx_compile")

RESULT = "poetx_result"

# Kept from a replaced node: where it came from, and what the partitioner said about it.
_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr", "custom", "from_node")


def trace_reference(function: Callable[..., Tensor], values: tuple[Any, ...]) -> fx.GraphModule:
    """The aten graph of ``function(*values)``.

    Args:
        function: from the arguments of an op to its result, in plain torch ops.
        values: fake tensors and constants; tensors and symbolic integers become placeholders, in
            order.

    Returns:
        A functional graph whose one output is contiguous and aliases no input.
    """
    # Functionalised: an op of the reference that writes in place becomes one that does not, as in
    # every other graph at this stage.
    traced = _trace(function, values, torch.func.functionalize)
    traced.graph.eliminate_dead_code()
    return traced


def _trace(
    function: Callable[..., Tensor],
    values: tuple[Any, ...],
    transform: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda call: call,
) -> fx.GraphModule:
    from poetx_compile._torch import select_decomp_table

    places = [i for i, v in enumerate(values) if isinstance(v, Tensor | torch.SymInt)]
    inputs = [values[i] for i in places]

    def call(*given: Any) -> Tensor:
        filled = list(values)
        for place, value in zip(places, given, strict=True):
            filled[place] = value
        # The op promises a contiguous result of its own; nodes behind it were traced with that.
        result = function(*filled).contiguous()
        return result.clone() if any(result is g for g in given) else result

    fake_mode = detect_fake_mode(inputs)
    assert fake_mode is not None, "a post-grad graph carries fake tensors"
    # A backward may be compiled inside the user's autocast region; its graph is past autocast.
    with fake_mode, _DisableAutocast(), torch.fx.traceback.preserve_node_meta(False):
        return make_fx(transform(call), decomposition_table=select_decomp_table())(*inputs)


def insert(
    graph: fx.Graph, node: fx.Node, traced: fx.GraphModule, inputs: Sequence[fx.Node]
) -> fx.Node:
    """Copy a `trace_reference` in front of `node`, which it stands for; its result."""
    environment = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    fake_mode = detect_fake_mode([n.meta["val"] for n in inputs])
    assert fake_mode is not None, "a post-grad graph carries fake tensors"
    with graph.inserting_before(node), fake_mode:
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                break
            assert inner.op == "call_function", inner.op
            assert callable(inner.target), inner.target
            copy = graph.node_copy(inner, environment.__getitem__)
            copy.meta.update({k: node.meta[k] for k in _INHERITED if k in node.meta})
            # A value of its own: Inductor tells aliases by the storage of the values.
            args, kwargs = map_arg((copy.args, copy.kwargs), lambda n: n.meta["val"])
            copy.meta["val"] = inner.target(*args, **kwargs)
            copy.meta.pop("tensor_meta", None)
            environment[inner] = copy
    return environment[inner.args[0]]


def trace_launches(kernel: Kernel, values: tuple[Any, ...]) -> fx.GraphModule | None:
    """The launches of the kernel of an op as ``triton_kernel_wrapper_mutation`` nodes.

    Arguments as for `trace_reference`. A graph to lower, not to rewrite: the launches write into
    buffers that stand before them, and in place of an output, which would be taken for one of the
    whole graph, ``meta[RESULT]`` is the node of the result. ``None`` where Triton could not tell
    what the launches write. Then the op has to stay a call, which launches the same kernel.
    """
    host = kernel.load()

    def recorded(*args: Any) -> Tensor:
        with traced_launches():
            return host(*args)

    traced = _trace(recorded, values)
    output = traced.graph.output_node()
    traced.meta[RESULT] = output.args[0]
    traced.graph.erase_node(output)
    return traced if _writes_outputs_only(traced) else None


def written_by(launches: fx.GraphModule) -> list[list[str]]:
    """What Triton finds each launch of a `trace_launches` to write, by the kernel's names."""
    launch = torch.ops.higher_order.triton_kernel_wrapper_mutation
    found = []
    for node in launches.graph.find_nodes(op="call_function", target=launch):
        given = map_arg(node.kwargs, lambda n: n.meta["val"])
        asked = ("kernel_idx", "constant_args_idx", "kwargs", "tma_descriptor_metadata")
        found.append(triton_kernel_wrap.get_mutated_tensors(*(given[name] for name in asked)))
    return found


def _writes_outputs_only(launches: fx.GraphModule) -> bool:
    """Whether Inductor will find that every launch writes what is called ``out`` or ``*_out``.

    It reads that from the compiled kernel; where it cannot, it takes every argument for written.
    """
    for written in written_by(launches):
        others = [n for n in written if n != "out" and not n.endswith("_out")]
        if others or not written:
            log.warning(
                "Triton's mutation analysis failed (written: %s); the op stays a call. Report this "
                "with your torch and triton versions.",
                ", ".join(written),
            )
            return False
    return True


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """All arguments of the schema in order, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    values = []
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            values.append(node.args[position])
        elif argument.name in node.kwargs:
            values.append(node.kwargs[argument.name])
        else:
            values.append(argument.default_value)
    return tuple(values)


def signature(argument: Any) -> Hashable:
    """What a trace depends on: the metadata of a tensor, a symbolic size by its expression."""
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    if isinstance(value, Tensor):
        sizes = tuple(map(str, value.shape)), tuple(map(str, value.stride()))
        return (*sizes, value.dtype, value.device)
    return type(value), str(value)
