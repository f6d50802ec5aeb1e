"""Triton's mutation analysis, done once a kernel instead of three times a launch.

Inductor asks of every node that launches a user's kernel which tensors it writes, and each time the
kernel is parsed down to Triton's IR, some 20 ms. A model launches a handful of kernels thousands of
times: on a 24-layer model that was most of the first step. What a kernel of ours writes depends on
nothing (it is called ``out`` or ``*_out``, and a test compares), what it reads on its constants and
the dtypes of its tensors alone, so the answer is kept.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any
from unittest import mock

import sympy
import torch
from torch import Tensor

_WRITES, _ACCESSES = "identify_mutated_tensors", "identify_accessed_tensors"
_FUNCTIONS = (_WRITES, _ACCESSES)
"""The analysis in torch 2.11 and its successor; the module has one of the two."""

_answers: dict[Hashable, Any] = {}
_lock = threading.RLock()


@contextlib.contextmanager
def analysis_kept() -> Iterator[None]:
    """Inside, the analysis of this package's kernels is remembered; other kernels are untouched."""
    from torch._higher_order_ops import triton_kernel_wrap

    with _lock, contextlib.ExitStack() as patches:
        for name in _FUNCTIONS:
            function = getattr(triton_kernel_wrap, name, None)
            if function is not None:
                kept = _remembering(name, function)
                patches.enter_context(mock.patch.object(triton_kernel_wrap, name, kept))
        yield


def _remembering(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def identify(kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any) -> Any:
        written = getattr(kernel, "fn", kernel)  # inside the launch parameters it is wrapped with
        ours = str(getattr(written, "__module__", "")).startswith("poetx_compile.")
        if not ours or tma_descriptor_metadata:
            return function(kernel, kwargs, tma_descriptor_metadata)
        key: tuple[Hashable, ...] = name, written
        if name != _WRITES:
            key += tuple((k, _kind(v)) for k, v in kwargs.items())
        if key not in _answers:
            _answers[key] = function(kernel, kwargs, tma_descriptor_metadata)
        return _answers[key]

    return identify


def _kind(value: Any) -> Hashable:
    """What the analysis sees of an argument."""
    if isinstance(value, Tensor):
        return value.dtype
    if hasattr(value, "get_dtype"):  # a tensor while Inductor lowers the graph
        return value.get_dtype()
    if isinstance(value, torch.SymInt | sympy.Expr) and not isinstance(value, sympy.Integer):
        return "symbolic"
    return value
