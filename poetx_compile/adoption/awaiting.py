"""Weights whose backward is over, and whose layers wait to move into the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import WeakTensorKeyDictionary

from poetx_compile.config import POETXConfig


class Awaiting(NamedTuple):
    """What a backward tells of a weight: its layer, whether the graph adopts it, and how."""

    layer: str
    adopted: bool
    config: POETXConfig


_awaiting: MutableMapping[Any, Awaiting] = WeakTensorKeyDictionary()


def is_awaiting(weight: Tensor) -> bool:
    """Whether a backward went through a weight that has not settled."""
    return weight in _awaiting


def drain() -> dict[Tensor, Awaiting]:
    """The weights of the graphs that backwards went through since the last time."""
    found = dict(_awaiting.items())
    _awaiting.clear()
    return found


def at_the_end_of_backward(
    outputs: Iterable[Any], weights: dict[Tensor, Awaiting], settle: Callable[[], None]
) -> None:
    """Call `settle` when a backward that passes through one of `outputs` is over.

    Not earlier: checkpointed code that the same backward runs again must find what it found before.
    """

    @torch.compiler.disable
    def queue(_: Tensor) -> None:
        _awaiting.update(weights)
        Variable._execution_engine.queue_callback(settle)

    for output in outputs:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(queue)
