"""Tensors spread over processes (DTensors, as FSDP2 makes them): the local part, the whole, back.

Every function takes a plain tensor as well, which is its own local part and its own whole: what is
written with these runs in one process, under DDP and under FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poetx_compile._torch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_PLAIN = (Tensor, torch.nn.Parameter)
"""Told by their type alone, which saves Dynamo tracing the question for every layer."""


def is_sharded(*tensors: Tensor) -> bool:
    """Whether any of `tensors` is a DTensor."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
            from torch.distributed.tensor import DTensor  # importing it takes long

            if isinstance(tensor, DTensor):
                return True
    return False


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, the same memory; without gradients."""
    part: Any = tensor.detach()
    return part.to_local() if is_sharded(tensor) else part


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process. Collective for a DTensor: every process has to call it."""
    full: Any = tensor.detach()
    return full.full_tensor() if is_sharded(tensor) else full


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Copy `value`, whole and the same on every process, into `target`; no communication."""
    local(target).copy_(local(shard_like(value, target)))


@torch.no_grad()
def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, whole and the same on every process, spread as `like` is; no communication."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    spread = DTensor.from_local(value.to(local(like).device), mesh, everywhere, run_check=False)
    return spread.redistribute(placements=like.placements)


def groups_of(tensors: Iterable[Tensor]) -> list[ProcessGroup]:
    """The process groups that hold different parts of `tensors`, each once, in order."""
    groups = {}
    for tensor in tensors:
        if is_sharded(tensor):
            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            for dim, placement in enumerate(placements):
                if not placement.is_replicate():
                    groups[id(mesh.get_group(dim))] = mesh.get_group(dim)
    return list(groups.values())


def reduce_over(groups: Sequence[ProcessGroup], value: Tensor, operation: str) -> Tensor:
    """`value` reduced in place over each group (``"max"``, ``"min"`` or ``"sum"``)."""
    if groups:
        import torch.distributed as dist

        how = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "sum": dist.ReduceOp.SUM}
        for group in groups:
            dist.all_reduce(value, op=how[operation], group=group)
    return value
