"""Bytes that a forward keeps for its backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class SavedBytes:
    """What autograd holds between forward and backward.

    Attributes:
        total: all storages, each once; not those of parameters and buffers.
        output: the part that is the layer's own output, which costs nothing where the consumer of
            the output keeps it anyway.
    """

    total: int
    output: int


def saved_bytes(module: Callable[[Tensor], Tensor], owner: nn.Module, x: Tensor) -> SavedBytes:
    """Run ``module(x)`` once and count what it saves.

    Args:
        module: what is called, `owner` or a compiled form of it (compiled already).
        owner: has the parameters and buffers.
        x: the input, which requires its gradient.
    """
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    for tensor in (*owner.parameters(), *owner.buffers()):
        held.pop(tensor.untyped_storage().data_ptr(), None)
    output = held.get(y.untyped_storage().data_ptr(), 0)
    return SavedBytes(sum(held.values()), output)
