"""Inductor's compilation of one graph, the faster way for many launches of few kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from poetx_compile.compile import collector
from poetx_compile.compile.lowerings.analysis import analysis_kept
from poetx_compile.compile.lowerings.early import compiled_early


def compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """``compile_fx_inner``: analysis kept, kernels compiled early, garbage collector paused.

    That of a backward does not run inside the backend, but inside the first backward.
    """
    from poetx_compile._torch import compile_fx_inner

    with analysis_kept(), compiled_early(), collector.paused():
        return compile_fx_inner(gm, example_inputs, **kwargs)
