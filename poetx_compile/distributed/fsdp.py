"""FSDP2: modules that are sharded as one group within another module, and what a group holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from poetx_compile.distributed.wrappers import is_fsdp_module


def shard_together(
    modules: Sequence[nn.Module],
    *,
    within: nn.Module,
    mesh: Any,
    reshard_after_forward: bool | int,
    offload_policy: Any,
) -> None:
    """Shard `modules` as one group in the dtypes they have, gathered and resharded with `within`.

    Args:
        modules: parts of `within`, whose hooks move there.
        mesh, reshard_after_forward, offload_policy: as for `fully_shard`.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard

    before = [_hooks(module) for module in modules]
    fully_shard(
        list(modules),
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        mp_policy=MixedPrecisionPolicy(),
        offload_policy=offload_policy or OffloadPolicy(),
    )
    _move_hooks(modules, before, within)


def _hooks(module: nn.Module) -> tuple[set[int], set[int]]:
    return set(module._forward_pre_hooks), set(module._forward_hooks)


def _move_hooks(
    modules: Sequence[nn.Module], before: list[tuple[set[int], set[int]]], to: nn.Module
) -> None:
    """Gather and reshard with the whole of `to`, not in the middle of its layers.

    There the hooks of FSDP2 would break a compiled graph between parameters and the product that
    they belong to. The group opens with its first module and closes with its last.
    """
    opens, closes = [], []
    for e, (pre, post) in zip(modules, before, strict=True):
        for key in set(e._forward_pre_hooks) - pre:
            opens.append((e, e._forward_pre_hooks.pop(key)))
            e._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in set(e._forward_hooks) - post:
            closes.append((e, e._forward_hooks.pop(key)))
            e._forward_hooks_always_called.pop(key, None)

    @torch.compiler.disable  # as FSDP2 does with its own
    def gather(_: nn.Module, args: Any, kwargs: Any) -> Any:
        first, hook = opens[0]
        return hook(first, args, kwargs)

    @torch.compiler.disable
    def close(_: nn.Module, args: Any, output: Any) -> Any:
        for e, hook in closes:
            result = hook(e, args, output)
            output = output if result is None else result
        return output

    to.register_forward_pre_hook(gather, with_kwargs=True)
    to.register_forward_hook(close)


def keeps_rows(placement: Any) -> bool:
    """Whether a placement of a DTensor cuts no row."""
    from torch.distributed.tensor import Replicate, Shard

    return type(placement) is Replicate or (type(placement) is Shard and placement.dim == 0)


def own_parameters(unit: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters below `unit`, but for those below another call of `fully_shard`."""
    yield from unit.parameters(recurse=False)
    for child in unit.children():
        if not is_fsdp_module(child):
            yield from own_parameters(child)
