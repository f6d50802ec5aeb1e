"""Kernels of the graph are compiled while Inductor still writes the module."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch._inductor import async_compile, codecache, config
from torch._inductor.async_compile import AsyncCompile, CompiledTritonKernels
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.runtime import compile_tasks
from torch._inductor.triton_bundler import TritonBundler

from poetx_compile.compile.lowerings.early import _FINDS_TOOLS, compiled_early
from poetx_compile.ops.kernels.early import THREADS

SOURCE = "\nimport triton\n\n@triton.jit\ndef rotate(x):\n    pass\n"
BODY = f"async_compile.triton('rotate', '''{SOURCE}''', device_str='cuda')\n"
CPP = "async_compile.cpp_pybinding(['float*'], r'''void kernel(float* x) {}''')\n"


class Inductor:
    """What Inductor does with a kernel that is written, and when its module is loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: bool, threads: int = 4):
        self.asked: list[tuple[str, bool]] = []
        self.defined: list[tuple[Any, ...]] = []
        self.compiled: list[str] = []
        self.started, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

        def triton(
            compiler: AsyncCompile, kernel_name: str, source_code: str, device_str: str = "cuda"
        ) -> str:
            self.asked.append((source_code, AsyncCompile.use_process_pool()))
            if AsyncCompile.use_process_pool():
                CompiledTritonKernels.save(source_code, None)  # type: ignore[arg-type]
            return kernel_name

        def load(name: str, source: str) -> Inductor:
            self.started.set()
            assert self.go_on.wait(60)
            if "broken" in source:
                raise SyntaxError(source)
            self.compiled.append(threading.current_thread().name)
            return self

        def define(wrapper: Any, *args: Any, **kwargs: Any) -> None:
            self.defined.append((*args, kwargs))

        monkeypatch.setattr(AsyncCompile, "triton", triton)
        monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda cls: workers))
        monkeypatch.setattr(CompiledTritonKernels, "_cache", {})
        monkeypatch.setattr(CompiledTritonKernels, "get", _kept)
        monkeypatch.setattr(PythonWrapperCodegen, "define_kernel", define)
        monkeypatch.setattr(async_compile, "get_compile_threads", lambda: threads)
        monkeypatch.setattr(codecache, "_load_triton_kernel_from_source", load)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        self.wrapper = object.__new__(PythonWrapperCodegen)

    def precompile(self, warm_cache_only: bool) -> None:
        assert warm_cache_only
        TritonBundler.put("hash", 0)

    def define(self, name: str, body: str = BODY) -> None:
        self.wrapper.define_kernel(name, body, "# metadata", gpu=True)

    def load(self, body: str = BODY) -> Any:
        return eval(body.strip(), {"async_compile": AsyncCompile()})


def _kept(source: str) -> Any:
    return True if CompiledTritonKernels.key(source) in CompiledTritonKernels._cache else None


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Inductor]:
    return lambda *args, **kwargs: Inductor(monkeypatch, *args, **kwargs)


def test_workers_get_what_the_module_will_ask_for(inductor) -> None:
    found = inductor(workers=True)
    with compiled_early():
        found.define("rotate_0")
        assert found.asked == [(SOURCE, True)]
        found.define("rotate_1")
        assert len(found.asked) == 1, "it is on its way"
        assert found.load() == "rotate"
    found.define("rotate_2")
    assert len(found.asked) == 2, "the patch is scoped"
    names = [name for name, *_ in found.defined]
    assert names == ["rotate_0", "rotate_1", "rotate_2"]
    assert found.defined[0][1:] == (BODY, "# metadata", {"gpu": True})
    assert not found.compiled


def test_without_workers_a_thread_compiles_and_the_module_waits(inductor) -> None:
    found = inductor(workers=False)
    found.go_on.clear()
    with compiled_early():
        found.define("rotate_0")
        found.define("rotate_1")
        assert not found.asked, "Inductor goes on writing"
        assert not found.compiled
        threading.Timer(0.2, found.go_on.set).start()
        assert found.load() == "rotate"
        (thread,) = found.compiled
        assert thread.startswith("poetx-early")
    assert found.asked == [(SOURCE, False)]


def test_a_thread_finds_the_tools_that_inductor_does(inductor, monkeypatch) -> None:
    found = inductor(workers=False)
    for name in _FINDS_TOOLS:  # torch 2.11 has one of them
        note = functools.partial(found.compiled.append, name)
        monkeypatch.setattr(compile_tasks, name, note, raising=False)
    with compiled_early():
        found.define("rotate_0")
        found.load()
    assert found.compiled[:-1] == list(_FINDS_TOOLS)


def test_what_a_thread_has_compiled_is_not_sent_to_workers_that_come_later(
    inductor, monkeypatch
) -> None:
    found = inductor(workers=False)
    with compiled_early():
        found.define("rotate_0")
        monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda cls: True))
        found.load()
        assert AsyncCompile.use_process_pool()
    assert found.asked == [(SOURCE, False)]


def test_what_a_thread_cannot_compile_the_module_compiles(inductor) -> None:
    found = inductor(workers=False)
    broken = BODY.replace("pass", "broken")
    with compiled_early():
        found.define("rotate_0", broken)
        assert found.load(broken) == "rotate"
    assert not found.compiled
    assert len(found.asked) == 1


@pytest.mark.parametrize("workers", [True, False])
def test_kernels_are_asked_for_by_keywords_as_well(inductor, workers) -> None:
    """As Inductor does where it chooses between templates, or measures a fusion."""
    found = inductor(workers)
    with compiled_early():
        for source in ("another", SOURCE):
            found.define("rotate_0")
            given = {"kernel_name": "rotate", "source_code": source, "device_str": "cuda"}
            assert AsyncCompile().triton(**given) == "rotate"


def test_nothing_goes_on_behind_an_error(inductor) -> None:
    """Not what waits in line; and what has begun is waited for."""
    found = inductor(workers=False)
    found.go_on.clear()
    bodies = [BODY.replace("pass", f"x = {number}") for number in range(20)]
    with contextlib.suppress(KeyboardInterrupt), compiled_early():
        for body in bodies:
            found.define("rotate", body)
        assert found.started.wait(60)
        threading.Timer(0.2, found.go_on.set).start()
        raise KeyboardInterrupt
    compiled = len(found.compiled)
    assert 1 <= compiled <= THREADS
    time.sleep(0.1)
    assert len(found.compiled) == compiled
    assert not [t for t in threading.enumerate() if t.name.startswith("poetx-early_")]


def test_the_cache_of_graphs_gets_a_kernel_once(inductor, monkeypatch) -> None:
    found, put = inductor(workers=False), []
    monkeypatch.setattr(TritonBundler, "put", classmethod(lambda cls, *kernel: put.append(kernel)))
    with compiled_early():
        found.define("rotate_0")
        found.load()
        TritonBundler.put("hash", 0)  # as the one that takes the kernel does
        TritonBundler.put("hash", 1)
    assert put == [("hash", 0), ("hash", 1)]


@pytest.mark.parametrize("why", ["one thread", "the interpreter", "a profiler", "C++"])
def test_what_is_not_compiled_by_threads(inductor, monkeypatch, why) -> None:
    found = inductor(workers=False, threads=1 if why == "one thread" else 4)
    if why == "the interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    profiling = config.patch({"triton.proton_profiling": why == "a profiler"})
    with profiling, compiled_early():
        found.define("kernel", CPP if why == "C++" else BODY)
        if why != "C++":
            assert found.load() == "rotate"
    assert len(found.defined) == 1
    assert not found.compiled
