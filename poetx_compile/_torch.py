"""The private names of torch that this package uses, by subject.

Checked on torch 2.11, 2.13, 2.14.1 and 2.15.0. `tests/project/test_torch_names.py` says which of
them a version lacks, and that no other module names a private one.
"""

# ruff: noqa: F401, I001

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

# Tensors
from torch._C import DisableTorchFunctionSubclass  # effective weights taken for plain tensors
from torch._C import _len_torch_dispatch_stack  # modes under which values cannot be read
from torch._C._functorch import is_functorch_wrapped_tensor  # no memory of its own: `torch.func`
from torch._C._functorch import peek_interpreter_stack  # whether such a transform is at work
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake
from torch.autograd import _unsafe_preserve_version_counter  # a weight that is set to itself
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # DTensors and their like
from torch.utils import _pytree as pytree

# Ops and modules
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard  # below autocast
from torch.nn.modules.conv import _ConvNd  # weights of three dimensions that are no experts

# Graphs
from torch._C import _nn  # elementwise functions as nodes call them
from torch._C import _set_grad_enabled  # the marks that Dynamo puts between nodes
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket  # what nodes call
from torch._dispatch.python import enable_python_dispatcher  # the values of new nodes
from torch._prims_common import is_contiguous_or_false  # adds no guard

# Dynamo and autograd at work
from torch import _disable_dynamo  # `torch.compiler.disable` would load Dynamo
from torch._C import _current_graph_task_id  # whether a backward runs
from torch._C import _DisableAutocast  # a backward compiled in the user's autocast region
from torch._guards import CompileContext, TracingContext, detect_fake_mode, tracing

LATE = {
    "OptimizedModule": "torch._dynamo.eval_frame",
    "innermost_backend": "torch._dynamo.eval_frame",  # what a module was given
    "GuardBuilder": "torch._dynamo.guards",  # a flag that torch 2.11 does not guard
    "AttrSource": "torch._dynamo.source",
    "ConstantSource": "torch._dynamo.source",  # inputs that have no place in a frame
    "triton_kernel_wrap": "torch._higher_order_ops",  # what a kernel writes
    "custom_graph_pass": "torch._inductor",  # whether one pass or a list: torch 2.11 or later
    "list_mode_options": "torch._inductor",
    "list_options": "torch._inductor",
    "metrics": "torch._inductor",
    "CustomGraphPass": "torch._inductor.custom_graph_pass",
    "CustomPartitionerFn": "torch._inductor.custom_graph_pass",
    "aot_autograd": "torch._dynamo.backends.common",
    "make_boxed_func": "functorch.compile",
    "min_cut_rematerialization_partition": "functorch.compile",
    "compile_fx": "torch._inductor.compile_fx",
    "compile_fx_inner": "torch._inductor.compile_fx",
    "select_decomp_table": "torch._inductor.decomposition",
    "constrain_to_fx_strides": "torch._inductor.lowering",
    "fallback_handler": "torch._inductor.lowering",
    "register_lowering": "torch._inductor.lowering",
    "V": "torch._inductor.virtualized",
    "AsyncCompile": "torch._inductor.async_compile",
    "CompiledTritonKernels": "torch._inductor.async_compile",
    "get_compile_threads": "torch._inductor.async_compile",
    "_load_triton_kernel_from_source": "torch._inductor.codecache",
    "compile_tasks": "torch._inductor.runtime",  # where Triton finds its tools
    "TritonBundler": "torch._inductor.triton_bundler",
    "PythonWrapperCodegen": "torch._inductor.codegen.wrapper",
}
"""Names of what is loaded only when something is compiled, and their modules: importing this
package loads neither Dynamo nor Inductor, which take as long as torch itself."""

ATTRIBUTES = {
    "torch.Tensor": "_version _base _backward_hooks _post_accumulate_grad_hooks",
    "torch.UntypedStorage": "_cdata",
    "torch.autograd.Variable": "_execution_engine",
    "torch.autograd.forward_ad": "_current_level",
    "torch.nn.Module": "_parameters _buffers _modules _forward_hooks _forward_hooks_always_called "
    "_forward_pre_hooks _forward_pre_hooks_with_kwargs _load_state_dict_pre_hooks "
    "_compiled_call_impl _apply _save_to_state_dict _load_from_state_dict",
    "torch.nn.parallel.DistributedDataParallel": "_get_active_ddp_module",
    "torch.nn.utils.parametrize": "_cache _cache_enabled",
    "torch._ops.OpOverload": "_schema",
    "torch.fx.Node": "_dynamo_source",  # Dynamo sets it, on placeholders
    "torch._inductor.codegen.wrapper.PythonWrapperCodegen": "define_kernel",
}
"""Attributes that are read or set where their objects are."""


def __getattr__(name: str) -> Any:
    if name not in LATE:
        raise AttributeError(name)
    importlib.import_module(LATE[name])  # says which module is missing
    return pkgutil.resolve_name(f"{LATE[name]}.{name}")
