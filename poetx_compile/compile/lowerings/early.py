"""Triton kernels compiled while Inductor still writes the code that launches them.

Inductor hands its own kernels to its worker processes as soon as they are written, but a kernel it
is given, as ours are, when the finished module is loaded, and then waits: 5 of 65 seconds of the
first step of a model of 24 layers.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

_DEFINE = "define_user_defined_triton_kernel"


@contextlib.contextmanager
def compiled_early() -> Iterator[None]:
    """Inside, the kernels a graph is given are sent to the workers where they are defined."""
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    define = getattr(PythonWrapperCodegen, _DEFINE)

    def define_and_compile(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        # Only what is defined in here: Inductor's own kernels are on their way already.
        with mock.patch.object(wrapper, "define_kernel", _sending(wrapper.define_kernel)):
            return define(wrapper, *args, **kwargs)

    with mock.patch.object(PythonWrapperCodegen, _DEFINE, define_and_compile):
        yield


def _sending(define_kernel: Callable[..., Any]) -> Callable[..., Any]:
    def define(name: str, body: str, *args: Any, **kwargs: Any) -> Any:
        _compile(body)
        return define_kernel(name, body, *args, **kwargs)

    return define


def _compile(body: str) -> None:
    """Start the compilation that the module will ask for by ``async_compile.triton(…)``.

    Kernels are kept by their source: the module finds this one, done or on its way.
    """
    from torch._inductor.async_compile import AsyncCompile

    call = ast.parse(body.strip(), mode="eval").body
    if isinstance(call, ast.Call) and AsyncCompile.use_process_pool():
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        AsyncCompile().triton(*map(ast.literal_eval, call.args), **keywords)
