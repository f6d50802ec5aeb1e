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

_FINDS_TOOLS = "_set_triton_ptxas_path", "_set_triton_libdevice_path"
"""What Inductor calls before it compiles in its own process; the second from torch 2.13 on."""


@contextlib.contextmanager
def compiled_early() -> Iterator[None]:
    """Inside, the kernels of a graph are compiled from when they are written."""
    own = _Threads()
    try:
        with (
            replaced(_codegen, _DEFINE, functools.partial(_sending, own)),
            replaced(_compiler, "triton", functools.partial(_waiting, own)),
            replaced(_bundler, "put", _once),
        ):
            yield
    finally:
        own.end()


class _Threads:
    """The kernels of one graph that threads compile, by their sources."""

    def __init__(self) -> None:
        self._running: dict[str, Future[None]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def compile(self, name: str, source: str) -> None:
        """Start a compilation, if the kernel has none yet."""
        if source in self._running:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(threads(), "poetx-early")
        context = contextvars.copy_context()  # it may have options of Inductor
        self._running[source] = self._pool.submit(context.run, _in_a_thread, name, source)

    def take(self, source: str) -> bool:
        """Whether the kernel was given to a thread, which has ended then."""
        task = self._running.pop(source, None)
        if task is not None:
            wait([task])
        return task is not None

    def end(self) -> None:
        """Wait for what has begun, so that nothing goes on behind an error; drop the rest."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _codegen() -> Any:
    from poetx_compile._torch import PythonWrapperCodegen

    return PythonWrapperCodegen


def _compiler() -> Any:
    from poetx_compile._torch import AsyncCompile

    return AsyncCompile


def _bundler() -> Any:
    from poetx_compile._torch import TritonBundler

    return TritonBundler


def _sending(own: _Threads, define_kernel: Callable[..., Any]) -> Any:
    """Has a kernel compiled that is defined."""

    def define(wrapper: Any, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> Any:
        try:
            _compile(kernel_body, own)
        except Exception:  # not needed: the module compiles it, and raises what there is to raise
            goes_on_without(_DEFINE)
        return define_kernel(wrapper, kernel_name, kernel_body, *args, **kwargs)

    return define


def _compile(body: str, own: _Threads) -> None:
    """Start the compilation that the module will ask for by ``async_compile.triton(…)``."""
    from poetx_compile._torch import AsyncCompile, CompiledTritonKernels

    if not body.lstrip().startswith("async_compile.triton("):
        return  # C++
    call = ast.parse(body.strip(), mode="eval").body
    assert isinstance(call, ast.Call)
    name, source = map(ast.literal_eval, call.args)
    if CompiledTritonKernels.get(source) is not None:
        return
    if AsyncCompile.use_process_pool():
        keywords = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        AsyncCompile().triton(name, source, **keywords)  # the module finds it by its source
    elif _allowed():
        own.compile(name, source)


def _allowed() -> bool:
    """Whether there are no workers because they have not started, and for no other reason."""
    from torch._inductor import config

    from poetx_compile._torch import get_compile_threads

    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return get_compile_threads() > 1 and not interpreted and not config.triton.proton_profiling


def _in_a_thread(name: str, source: str) -> None:
    """Compile a kernel. It is kept by its source: whoever loads it later has it compiled."""
    from poetx_compile._torch import _load_triton_kernel_from_source, compile_tasks

    for function in _FINDS_TOOLS:
        getattr(compile_tasks, function, lambda: None)()
    _load_triton_kernel_from_source(name, source).precompile(warm_cache_only=True)


def _waiting(own: _Threads, triton: Callable[..., Any]) -> Any:
    """Waits for a thread that compiles what is asked for, and takes it from there.

    What fails in a thread is compiled again, and raises what there is to raise.
    """

    def get(compiler: Any, kernel_name: str, source_code: str, *args: Any, **kwargs: Any) -> Any:
        if not own.take(source_code):
            return triton(compiler, kernel_name, source_code, *args, **kwargs)
        with replaced(_compiler, "use_process_pool", lambda _: staticmethod(_no_workers)):
            return triton(compiler, kernel_name, source_code, *args, **kwargs)

    return get


def _no_workers() -> bool:
    return False


def _once(put: Callable[[str, int], None]) -> Any:
    """Notes what goes into the cache of graphs once: a thread does so, and who takes its kernel."""
    noted: set[tuple[str, int]] = set()

    def note(kernel_hash: str, device: int) -> None:
        if (kernel_hash, device) not in noted:
            noted.add((kernel_hash, device))
            put(kernel_hash, device)

    return staticmethod(note)
