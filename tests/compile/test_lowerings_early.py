"""Kernels of the graph are compiled while Inductor still writes the module."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch._inductor import async_compile, codecache
from torch._inductor.async_compile import AsyncCompile, CompiledTritonKernels
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from poetx_compile.compile.lowerings.early import compiled_early

SOURCE = "\nimport triton\n\n@triton.jit\ndef rotate(x):\n    pass\n"
BODY = f"async_compile.triton('rotate', '''{SOURCE}''', device_str='cuda')\n"
CPP = "async_compile.cpp_pybinding(['float*'], r'''void kernel(float* x) {}''')\n"


class Inductor:
    """What Inductor does with a kernel that is written, and when its module is loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: bool, threads: int = 4):
        self.asked: list[tuple[str, bool]] = []
        self.defined: list[tuple[Any, ...]] = []
        self.compiled: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()

        def triton(compiler: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> str:
            self.asked.append((source, AsyncCompile.use_process_pool()))
            if AsyncCompile.use_process_pool():
                CompiledTritonKernels.save(source, None)  # type: ignore[arg-type]
            return name

        def load(name: str, source: str) -> Inductor:
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


@pytest.mark.parametrize("why", ["one thread", "the interpreter", "C++"])
def test_what_is_not_compiled_by_threads(inductor, monkeypatch, why) -> None:
    found = inductor(workers=False, threads=1 if why == "one thread" else 4)
    if why == "the interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with compiled_early():
        found.define("kernel", CPP if why == "C++" else BODY)
        if why != "C++":
            assert found.load() == "rotate"
    assert len(found.defined) == 1
    assert not found.compiled
