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

import sympy
import torch
from torch import Tensor

from poetx_compile._torch import triton_kernel_wrap
from poetx_compile.compile.lowerings.shortcuts import goes_on_without, replaced

_WRITES, _ACCESSES = "identify_mutated_tensors", "identify_accessed_tensors"
"""The analysis in torch 2.11 and its successor; the module has one of the two."""

_answers: dict[Hashable, Any] = {}
_lock = threading.RLock()


@contextlib.contextmanager
def analysis_kept() -> Iterator[None]:
    """Inside, the analysis of this package's kernels is remembered; other kernels are untouched."""
    name = _WRITES if hasattr(triton_kernel_wrap, _WRITES) else _ACCESSES
    with _lock, replaced(lambda: triton_kernel_wrap, name, lambda f: _remembering(name, f)):
        yield


def _remembering(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def identify(*args: Any, **kwargs: Any) -> Any:
        try:
            key = _key(name, *args, **kwargs)
            hash(key)
        except Exception:  # asked in another way than on the versions this was written for
            goes_on_without(name)
            key = None
        if key is None:
            return function(*args, **kwargs)
        if key not in _answers:
            _answers[key] = function(*args, **kwargs)
        return _answers[key]

    return identify


def _key(
    name: str, kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any
) -> tuple[Hashable, ...] | None:
    """What an answer depends on; ``None`` where it is not to be kept."""
    written = getattr(kernel, "fn", kernel)  # inside the launch parameters it is wrapped with
    ours = str(getattr(written, "__module__", "")).startswith("poetx_compile.")
    if not ours or tma_descriptor_metadata:
        return None
    if name == _WRITES:
        return name, written
    return name, written, *((k, _kind(v)) for k, v in kwargs.items())


def _kind(value: Any) -> Hashable:
    """What the analysis sees of an argument."""
    if isinstance(value, Tensor):
        return value.dtype
    if hasattr(value, "get_dtype"):  # a tensor while Inductor lowers the graph
        return value.get_dtype()
    if isinstance(value, torch.SymInt | sympy.Expr) and not isinstance(value, sympy.Integer):
        return "symbolic"
    return value
