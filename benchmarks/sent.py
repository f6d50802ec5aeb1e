"""Bytes that a training step gives to collectives: counted, and by a formula."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
)

from poetx_compile.layers.prepared import prepared_linears

_GATHERS = ("all_gather_into_tensor", "all_gather_single")
_REDUCTIONS = ("reduce_scatter_tensor", "reduce_scatter_single", "all_reduce")
"""What FSDP2 calls of `torch.distributed`; the names differ between versions of torch."""


@dataclasses.dataclass
class Sent:
    """Bytes that one process gives to collectives: to be reduced, and of whole gathered tensors."""

    reduced: int = 0
    gathered: int = 0


def counted_allreduce(sent, bucket):  # type: ignore[no-untyped-def]  # DDP refuses strings
    """What DDP does without a hook, and the bytes of it."""
    sent.reduced += bucket.buffer().nbytes
    return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]


def counted_in_bf16(sent, bucket):  # type: ignore[no-untyped-def]
    """torch's hook that reduces in bf16, and the bytes of it."""
    sent.reduced += 2 * bucket.buffer().numel()
    return bf16_compress_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]


@contextlib.contextmanager
def counting(sent: Sent) -> Iterator[None]:
    """Inside, add up the bytes of the collectives that FSDP2 calls."""

    def counted(real: Callable[..., Any], field: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            setattr(sent, field, getattr(sent, field) + max(t.nbytes for t in tensors))
            return real(*args, **kwargs)

        return call

    real = {name: getattr(dist, name, None) for name in (*_GATHERS, *_REDUCTIONS)}
    for name, function in real.items():
        if function is not None:
            setattr(dist, name, counted(function, "gathered" if name in _GATHERS else "reduced"))
    try:
        yield
    finally:
        for name, function in real.items():
            if function is not None:
                setattr(dist, name, function)


def by_formula(
    model: nn.Module, block_size: int, *, sharded: bool, reduced_size: int | None = None
) -> Sent:
    """What a step has to send, from shapes alone.

    Reduced: the gradients of what trains; of a prepared weight [n, m] these are b(b − 1)/2 fp32
    values for each block of its two sides. Gathered, by FSDP2: what is in blocks once for the
    forward and once for the backward, and the rest once.

    Args:
        reduced_size: bytes of an element that is reduced; default: of its gradient.
    """
    sent = Sent()
    prepared = {name for name, _, _ in prepared_linears(model)}
    for name, parameter in model.named_parameters():
        if name.removesuffix(".parametrizations.weight.original") in prepared:
            n, m = parameter.shape
            count = _packed(n, block_size) + _packed(m, block_size)
            trained = (reduced_size or 4) * count
            held = 4 * count + n * m * parameter.element_size()
        elif ".parametrizations." in name:
            continue  # the rotations, counted with their weight
        else:
            trained = (reduced_size or parameter.element_size()) * parameter.numel()
            held = parameter.numel() * parameter.element_size()
        sent.reduced += trained
        if sharded:
            sent.gathered += held * (2 if name.startswith("layers.") else 1)
    return sent


def _packed(size: int, block: int) -> int:
    block = min(block, size)
    return size // block * (block * (block - 1) // 2)
