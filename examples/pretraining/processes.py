"""One process, or several that torchrun started: who this is, and what all of them agree on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

import poetx_compile as poetx
from llama import Llama
from poetx_compile.distributed.shards import is_sharded, shard_like, whole
from pretraining.failure import RunError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: number of this one; the first one writes and shows progress.
        count: how many there are.
        local_rank: number of this one on its machine, and of its CUDA device.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.count > 1

    def part(self, batch_size: int) -> slice:
        """The rows of a batch of all processes that this one computes."""
        if batch_size % self.count:
            raise RunError(f"--batch-size {batch_size} does not divide by {self.count} processes")
        size = batch_size // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over the processes; waits for the device."""
        own = value.detach().double().cpu()
        if self.several:
            dist.all_reduce(own)
        return float(own) / self.count

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        if not self.several:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them."""
        box: list[Any] = [make() if self.is_first else None]
        if self.several:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.several:
            dist.barrier()


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun started, as one group; else this one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield Processes(dist.get_rank(), count, local_rank)
    finally:
        dist.destroy_process_group()


def spread(model: Llama, how: str, rotations: bool) -> nn.Module:
    """`model` under DDP, or sharded in place by FSDP2 block by block (with its rotations apart)."""
    if how == "ddp":
        return DistributedDataParallel(model)
    for block in model.layers:
        if rotations:
            poetx.fully_shard_rotations(block)
        fully_shard(block)
    fully_shard(model)
    return model


def gathered(state: Any, group: Processes) -> Any:
    """A nested `state` with whole tensors, those that were sharded on the CPU.

    Only the first process keeps these; every process has to call it.
    """

    def gather(tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        full = whole(tensor)
        return full.cpu() if group.is_first else full.new_empty(0)

    return tree_map_only(Tensor, gather, state)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load whole tensors into a model and its optimiser, however these are sharded."""
    own = model.state_dict()
    model.load_state_dict(
        {k: shard_like(v, own[k]) if k in own else v for k, v in state["model"].items()}
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        index: {
            key: shard_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for key, value in values.items()
        }
        for index, values in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": states})
