"""Whether the outputs of compiled code take gradients where they do in eager mode.

AOTAutograd may return one tensor for two outputs of a graph, where a value is computed with
gradients and once more under ``no_grad``, and marks it as one that takes none. Nothing says so, and
what is behind it does not train.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from poetx_compile.errors import RewriteError
from poetx_compile.passes import gradients
from poetx_compile.passes.contexts import Contexts


def checked(graph: fx.GraphModule, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, whose first call raises `RewriteError` where an output has lost its gradient."""
    if not torch.is_grad_enabled():
        return compiled
    expected = [i for i, inputs in enumerate(gradients.reached(Contexts(graph)).outputs) if inputs]
    pending = bool(expected)

    def run(*args: Any) -> Any:
        nonlocal pending
        outputs = compiled(*args)
        if pending:
            pending = False
            lost = [i for i in expected if _is_lost(outputs[i])]
            if lost:
                raise RewriteError(
                    f"output {lost[0]} of a compiled graph takes no gradient, and does in eager "
                    "mode: torch has returned one tensor for a value that the model computes with "
                    "gradients and again under no_grad. Clone one of the two"
                )
        return outputs

    return run


def _is_lost(output: Any) -> bool:
    return isinstance(output, Tensor) and not output.requires_grad
