"""The garbage collector is paused while graphs are compiled, and only then."""

from __future__ import annotations

import gc
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._inductor import compile_fx

import poetx_compile as poetx
from poetx_compile.compile import collector


def test_it_goes_on_after_the_outermost_pause() -> None:
    with collector.paused():
        with collector.paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with collector.paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_forward_and_backward_are_compiled_without_it(monkeypatch) -> None:
    found = []

    def inner(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        found.append((bool(kwargs.get("is_backward")), gc.isenabled()))
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", inner)
    model = nn.Linear(8, 12)
    poetx.prepare(model, poetx.POETXConfig(block_size=4))
    out = torch.compile(model, backend=poetx.poetx_backend)(torch.randn(3, 8))
    assert gc.isenabled()
    out.sum().backward()  # compiles its own graph, outside of the backend
    assert gc.isenabled()
    assert found == [(False, False), (True, False)]
