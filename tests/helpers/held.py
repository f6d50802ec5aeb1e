"""What autograd really holds between the forward and the backward of compiled code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import poetx_compile as poetx


def kept(model: nn.Module, x: Tensor, **options: object) -> int:
    """Bytes autograd holds after a compiled forward, without parameters, buffers and input."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step(x: Tensor) -> Tensor:
        return model(x).square().mean()

    backend = poetx.poetx_backend if options else "aot_eager_decomp_partition"
    compiled = torch.compile(step, backend=backend, options=options or None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compiled(x)
    for tensor in (*model.parameters(), *model.buffers(), x, loss):
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(held.values())
