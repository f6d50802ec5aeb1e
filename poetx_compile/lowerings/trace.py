"""An op's reference or kernel as a graph of nodes that Inductor compiles."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

from poetx_compile.ops import kernels
from poetx_compile.ops.kernels.common import traced_launches

log = logging.getLogger("poetx_compile")


def trace_reference(function: Callable[..., Tensor], values: tuple[Any, ...]) -> fx.GraphModule:
    """The aten graph of ``function(*values)``.

    Args:
        function: from the arguments of an op to its result, in plain torch ops.
        values: fake tensors and constants; tensors and symbolic integers become placeholders, in
            order.

    Returns:
        A functional graph whose one output is contiguous and aliases no input.
    """
    from torch._inductor.decomposition import select_decomp_table

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
    # Functionalised: a kernel's output buffer becomes the result of a functional node, as in every
    # other graph at this stage; Inductor makes it a write in place again.
    functional = torch.func.functionalize(call)
    # A backward may be compiled inside the user's autocast region; its graph is past autocast.
    with fake_mode, torch._C._DisableAutocast(), torch.fx.traceback.preserve_node_meta(False):
        traced = make_fx(functional, decomposition_table=select_decomp_table())(*inputs)
    traced.graph.eliminate_dead_code()
    return traced


def trace_launches(op: str, values: tuple[Any, ...]) -> fx.GraphModule | None:
    """The launches of the kernel of `op` as ``triton_kernel_wrapper_functional`` nodes.

    Arguments and result as for `trace_reference`; ``None`` where Triton could not tell what the
    launches write. Then the op has to stay a call, which launches the same kernel.
    """
    host = kernels.implementation(op)

    def recorded(*args: Any) -> Tensor:
        with traced_launches():
            return host(*args)

    traced = trace_reference(recorded, values)
    return traced if _writes_outputs_only(traced) else None


def _writes_outputs_only(traced: fx.GraphModule) -> bool:
    """Whether Inductor found of every launch that it writes what is called ``out`` or ``*_out``.

    It reads that from the compiled kernel; where it cannot, it takes every argument for written and
    would copy them all.
    """
    higher_order = torch.ops.higher_order.triton_kernel_wrapper_functional
    for node in traced.graph.find_nodes(op="call_function", target=higher_order):
        written = node.kwargs["tensors_to_clone"]
        others = [n for n in written if n != "out" and not n.endswith("_out")]
        if others or not written:
            log.warning(
                "Triton's mutation analysis failed (written: %s); the op stays a call. Report this "
                "with your torch and triton versions.",
                ", ".join(written),
            )
            return False
    return True
