"""Triton's mutation analysis: asked once for each kernel of ours, and for nobody else's."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch._higher_order_ops import triton_kernel_wrap

from poetx_compile.compile.lowerings import analysis


class Kernel:
    def __init__(self, module: str):
        self.__module__ = module


def _asked(monkeypatch, kernel: Kernel, *calls: dict) -> list[dict]:
    """The calls that reach the analysis."""
    (name,) = [n for n in (analysis._WRITES, analysis._ACCESSES) if hasattr(triton_kernel_wrap, n)]
    asked: list[dict] = []

    def identify(kernel, kwargs, metadata):
        asked.append(kwargs)
        return ["out"]

    monkeypatch.setattr(triton_kernel_wrap, name, identify)
    with analysis.analysis_kept():
        for call in calls:
            assert getattr(triton_kernel_wrap, name)(kernel, call, {}) == ["out"]
    assert getattr(triton_kernel_wrap, name) is identify, "the patch is scoped"
    return asked


def _call(**changes):
    return {"x": torch.empty(3), "tokens": 8, "B": 256} | changes


def test_one_question_for_each_kernel_and_where_reads_are_told_constant_and_dtype(
    monkeypatch,
) -> None:
    kernel = Kernel("poetx_compile.ops.kernels.rotate")
    asked = _asked(monkeypatch, kernel, _call(), _call(x=torch.empty(7)), _call())
    assert len(asked) == 1
    others = [_call(B=128), _call(x=torch.empty(3).half()), _call(tokens=sympy.Symbol("s0"))]
    reads = hasattr(triton_kernel_wrap, analysis._ACCESSES)
    assert len(_asked(monkeypatch, kernel, *others, *others)) == (3 if reads else 0)
    assert len(_asked(monkeypatch, Kernel("poetx_compile.ops.kernels.rotate"), _call())) == 1


def test_the_kernel_counts_and_not_what_it_is_wrapped_with(monkeypatch) -> None:
    class Configured:  # as `triton.autotune` wraps it
        def __init__(self, fn: Kernel):
            self.fn = fn

    kernel = Kernel("poetx_compile.ops.kernels.rotate")
    assert len(_asked(monkeypatch, Configured(kernel), _call(), _call())) == 1
    assert len(_asked(monkeypatch, Configured(kernel), _call())) == 0


def test_kernels_of_others_are_asked_every_time(monkeypatch) -> None:
    assert len(_asked(monkeypatch, Kernel("users.kernels"), _call(), _call())) == 2


def test_a_failed_analysis_is_not_kept(monkeypatch) -> None:
    (name,) = [n for n in (analysis._WRITES, analysis._ACCESSES) if hasattr(triton_kernel_wrap, n)]
    answers = iter([RuntimeError("no"), ["out"]])

    def identify(kernel, kwargs, metadata):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(triton_kernel_wrap, name, identify)
    kernel = Kernel("poetx_compile.x")
    with analysis.analysis_kept():
        with pytest.raises(RuntimeError, match="no"):
            getattr(triton_kernel_wrap, name)(kernel, _call(), {})
        assert getattr(triton_kernel_wrap, name)(kernel, _call(), {}) == ["out"]
