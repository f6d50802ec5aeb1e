"""Triton kernels compiled while Inductor still writes the code that launches them.

Inductor has worker processes for that, which take seconds to start: until then, for all of the
first step of a model whose layers are compiled by themselves, it compiles one kernel after another
when the finished module is loaded. Here threads do it as soon as a kernel is written. Once there
are workers, Inductor sends them its own kernels by then, but those it is given, as ours are, only
when the module is loaded: they are sent from here.
"""

from __future__ import annotations

import ast
import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from poetx_compile.compile.lowerings.shortcuts import goes_on_without, replaced
from poetx_compile.ops.kernels.early import threads

_DEFINE = "define_kernel"


@contextlib.contextmanager
def compiled_early() -> Iterator[None]:
    """Inside, the kernels of a graph are compiled from when they are written."""
    running: dict[str, Future[None]] = {}
    sending = replaced(_codegen, _DEFINE, functools.partial(_sending, running))
    with sending, replaced(_compiler, "triton", functools.partial(_waiting, running)):
        yield


def _codegen() -> Any:
    from poetx_compile._torch import PythonWrapperCodegen

    return PythonWrapperCodegen


def _compiler() -> Any:
    from poetx_compile._torch import AsyncCompile

    return AsyncCompile


def _sending(running: dict[str, Future[None]], define_kernel: Callable[..., Any]) -> Any:
    """Has a kernel compiled that is defined; `running` are those that threads compile."""

    def define(wrapper: Any, name: str, body: str, *args: Any, **kwargs: Any) -> Any:
        try:
            _compile(body, running)
        except Exception:  # not needed: the module compiles it, and raises what there is to raise
            goes_on_without(_DEFINE)
        return define_kernel(wrapper, name, body, *args, **kwargs)

    return define


def _compile(body: str, running: dict[str, Future[None]]) -> None:
    """Start the compilation that the module will ask for by ``async_compile.triton(…)``."""
    from poetx_compile._torch import (
        AsyncCompile,
        CompiledTritonKernels,
        _set_triton_ptxas_path,
        get_compile_threads,
    )

    if not body.lstrip().startswith("async_compile.triton("):
        return  # C++
    call = ast.parse(body.strip(), mode="eval").body
    assert isinstance(call, ast.Call)
    name, source = map(ast.literal_eval, call.args)
    if source in running or CompiledTritonKernels.get(source) is not None:
        return
    if AsyncCompile.use_process_pool():
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        AsyncCompile().triton(name, source, **keywords)  # the module finds it by its source
    elif get_compile_threads() > 1 and os.environ.get("TRITON_INTERPRET", "0") != "1":
        _set_triton_ptxas_path()
        context = contextvars.copy_context()  # it may have options of Inductor
        running[source] = _pool().submit(context.run, _in_a_thread, name, source)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads(), "poetx-early")


def _in_a_thread(name: str, source: str) -> None:
    """Compile a kernel. It is kept by its source: whoever loads it later has it compiled."""
    from poetx_compile._torch import _load_triton_kernel_from_source

    _load_triton_kernel_from_source(name, source).precompile(warm_cache_only=True)


def _waiting(running: dict[str, Future[None]], triton: Callable[..., Any]) -> Any:
    """Waits for a thread that compiles what is asked for, and takes it from there."""

    def get(compiler: Any, name: str, source: str, *args: Any, **kwargs: Any) -> Any:
        task = running.pop(source, None)
        if task is None:
            return triton(compiler, name, source, *args, **kwargs)
        wait([task])  # what fails there is compiled again here, and raises what there is to raise
        with replaced(_compiler, "use_process_pool", lambda _: staticmethod(_no_workers)):
            return triton(compiler, name, source, *args, **kwargs)

    return get


def _no_workers() -> bool:
    return False
