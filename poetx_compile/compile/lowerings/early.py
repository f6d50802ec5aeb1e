"""Triton kernels compiled while Inductor still writes the code that launches them.

Inductor hands its own kernels to its worker processes as soon as they are written, but a kernel it
is given, as ours are, when the finished module is loaded, and then waits: 5 of 65 seconds of the
first step of a model of 24 layers.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable
from typing import Any

from poetx_compile.compile.lowerings.shortcuts import goes_on_without, replaced

_DEFINE = "define_user_defined_triton_kernel"


def compiled_early() -> contextlib.AbstractContextManager[Any]:
    """Inside, the kernels a graph is given are sent to the workers where they are defined."""
    return replaced(_codegen, _DEFINE, _define_and_compile)


def _codegen() -> Any:
    from poetx_compile._torch import PythonWrapperCodegen

    return PythonWrapperCodegen


def _define_and_compile(define: Callable[..., Any]) -> Callable[..., Any]:
    def defined(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        # Only what is defined in here: Inductor's own kernels are on their way already.
        with replaced(lambda: wrapper, "define_kernel", _sending):
            return define(wrapper, *args, **kwargs)

    return defined


def _sending(define_kernel: Callable[..., Any]) -> Callable[..., Any]:
    def define(name: str, body: str, *args: Any, **kwargs: Any) -> Any:
        try:
            _compile(body)
        except Exception:  # not needed: the module compiles it, and raises what there is to raise
            goes_on_without(_DEFINE)
        return define_kernel(name, body, *args, **kwargs)

    return define


def _compile(body: str) -> None:
    """Start the compilation that the module will ask for by ``async_compile.triton(…)``.

    Kernels are kept by their source: the module finds this one, done or on its way.
    """
    from poetx_compile._torch import AsyncCompile

    call = ast.parse(body.strip(), mode="eval").body
    if isinstance(call, ast.Call) and AsyncCompile.use_process_pool():
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        AsyncCompile().triton(*map(ast.literal_eval, call.args), **keywords)
