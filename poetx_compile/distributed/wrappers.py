"""Wrappers: those that spread a model over processes, and names without those of compiled parts."""

from __future__ import annotations

import sys

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from poetx_compile.errors import ParallelismError

PREPARE_FIRST = (
    "poetx_compile.prepare(model) comes first, then DistributedDataParallel(model) or "
    "fully_shard(...), then the optimiser"
)


def user_name(name: str) -> str:
    """A name without the wrappers of what was compiled by itself, wherever they are in it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether `fully_shard` (FSDP2) was called on `module`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nobody called it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def wrapper_name(module: nn.Module) -> str | None:
    """What reduces or shards the gradients of a module's parameters, if it is such a wrapper."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if isinstance(module, DistributedDataParallel):
        return "DistributedDataParallel"
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        return "FullyShardedDataParallel"
    return "fully_shard (FSDP2)" if is_fsdp_module(module) else None


def wrapper_of(model: nn.Module) -> str | None:
    """The outermost wrapper in `model`, by name; ``None`` where there is none."""
    return next((name for m in model.modules() if (name := wrapper_name(m)) is not None), None)


def active_ddp() -> DistributedDataParallel | None:
    """The wrapper whose forward is running, if there is one."""
    return DistributedDataParallel._get_active_ddp_module()


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put sharded parameters back where it left whole ones (after an evaluation)."""
    for module in model.modules():
        if is_fsdp_module(module):
            module.reshard()  # type: ignore[operator]


def check_reduced(*parameters: Tensor) -> None:
    """Raise `ParallelismError` where DDP runs a model and would not reduce these parameters."""
    known = getattr(
        active_ddp(), "_module_parameters", None
    )  # as they were when the model was wrapped
    if known is None:
        return
    reduced = {id(p) for p in known}
    if any(id(p) not in reduced for p in parameters):
        raise ParallelismError(
            "the model was prepared after it was given to DistributedDataParallel, which reduces "
            f"the gradients of none of its rotations: {PREPARE_FIRST}"
        )
