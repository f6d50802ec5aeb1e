"""Where torch has changed what a shortcut replaces, compilation goes on without it, and says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from poetx_compile import _torch
from poetx_compile.compile.lowerings import analysis, shortcuts
from poetx_compile.compile.lowerings.early import _DEFINE, compiled_early

ANALYSES = (analysis._WRITES, analysis._ACCESSES)
(ANALYSIS,) = (n for n in ANALYSES if hasattr(triton_kernel_wrap, n))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What has been said, in a process that has said nothing yet."""
    shortcuts.goes_on_without.cache_clear()
    with caplog.at_level(logging.WARNING, "poetx_compile"):
        yield lambda: caplog.messages
    shortcuts.goes_on_without.cache_clear()


class Kernel:
    __module__ = "poetx_compile.ops.kernels.rotate"


@pytest.mark.parametrize(
    ("owner", "name", "shortcut"),
    [
        (PythonWrapperCodegen, _DEFINE, compiled_early),
        (triton_kernel_wrap, ANALYSIS, analysis.analysis_kept),
    ],
)
def test_a_function_that_is_missing_is_told_once(
    monkeypatch, warnings, owner, name, shortcut
) -> None:
    monkeypatch.delattr(owner, name)
    for _ in range(2):
        with shortcut():
            assert not hasattr(owner, name)
    (said,) = warnings()
    assert "goes on without" in said
    assert any(each in said for each in (_DEFINE, *ANALYSES))  # of two, the later is missed


def test_a_module_that_is_missing_is_told_once(monkeypatch, warnings) -> None:
    monkeypatch.setitem(_torch.LATE, "PythonWrapperCodegen", "torch._inductor.elsewhere")
    with compiled_early(), compiled_early():
        pass
    (said,) = warnings()
    assert "torch._inductor.elsewhere" in said


def test_an_error_within_the_block_is_the_users(monkeypatch, warnings) -> None:
    for shortcut in (compiled_early, analysis.analysis_kept):
        with pytest.raises(AttributeError, match="theirs"), shortcut():
            raise AttributeError("theirs")
    assert not warnings()


@pytest.mark.parametrize("body", ["async_compile.triton(", "async_compile.triton(unknown)"])
def test_a_kernel_that_cannot_be_sent_early_is_defined_all_the_same(
    monkeypatch, warnings, body
) -> None:
    defined = []
    monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda cls: True))
    monkeypatch.setattr(PythonWrapperCodegen, _DEFINE, lambda *a: defined.append(a[1:]))
    wrapper = object.__new__(PythonWrapperCodegen)
    with compiled_early():
        for name in ("one", "two"):
            wrapper.define_kernel(name, body)
    assert defined == [("one", body), ("two", body)]
    assert len(warnings()) == 1


@pytest.mark.parametrize("arguments", [(Kernel(), {"x": 1}, {}, "one more"), (Kernel(),)])
def test_a_question_that_cannot_be_remembered_is_asked(monkeypatch, warnings, arguments) -> None:
    asked = []

    def identify(*arguments, **keywords):
        asked.append(arguments)
        return ["out"]

    monkeypatch.setattr(triton_kernel_wrap, ANALYSIS, identify)
    with analysis.analysis_kept():
        for _ in range(2):
            assert getattr(triton_kernel_wrap, ANALYSIS)(*arguments) == ["out"]
    assert asked == [arguments] * 2
    assert len(warnings()) == 1
