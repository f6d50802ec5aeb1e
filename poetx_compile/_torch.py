"""The private names of torch that this package uses, by subject.

Checked on torch 2.11, 2.13, 2.14.1 and 2.15.0. `tests/project/test_torch_names.py` says which of
them a version lacks, and that no other module names a private one.
"""

# ruff: noqa: F401, I001

from __future__ import annotations

import importlib
from typing import Any

# Tensors: those that only look like one, and what leaves no trace.
from torch._C import DisableTorchFunctionSubclass, _len_torch_dispatch_stack
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake
from torch.autograd import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Ops: how one is called below autocast.
from torch._C import DispatchKey, DispatchKeySet, _DisableAutocast, _ExcludeDispatchKeyGuard

# Modules that compute with each weight once.
from torch.nn.modules.conv import _ConvNd

# Graphs: what nodes call, the marks that Dynamo puts between them, and values for new ones.
from torch._C import _nn, _set_grad_enabled
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._prims_common import is_contiguous_or_false
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch.utils import _pytree as pytree

# A compilation in progress or to come, and a backward.
from torch import _disable_dynamo
from torch._C import _current_graph_task_id
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource, ConstantSource
from torch._guards import CompileContext, TracingContext, detect_fake_mode, tracing
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import custom_graph_pass, list_mode_options, list_options, metrics
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn

LATE = {
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
    "PythonWrapperCodegen": "torch._inductor.codegen.wrapper",
}
"""Names of what is loaded only when something is compiled, and their modules."""

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
    "torch._inductor.codegen.wrapper.PythonWrapperCodegen": "define_kernel "
    "define_user_defined_triton_kernel",
}
"""Attributes that are read or set where their objects are."""


def __getattr__(name: str) -> Any:
    if name not in LATE:
        raise AttributeError(name)
    return getattr(importlib.import_module(LATE[name]), name)
