"""FSDP2: a group of its own for the rotations, and what a sharded model must be like."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from poetx_compile.eligibility import unwrap_compiled
from poetx_compile.errors import IncompatibleStateError, ParallelismError
from poetx_compile.parametrization import (
    OrthogonalEquivalence,
    check_layouts,
    prepared_linears,
    stored_weight,
)
from poetx_compile.shards import groups_of, is_sharded, reduce_over
from poetx_compile.wrappers import is_fsdp_module, reshard, user_name, wrapper_of

_HELPER = "poetx_compile.fully_shard_rotations(module)"


def fully_shard_rotations(
    module: nn.Module,
    *,
    mesh: Any = None,
    reshard_after_forward: bool | int = True,
    offload_policy: Any = None,
) -> None:
    """Shard the rotations of `module` as an FSDP2 group of their own, in fp32.

    Call it on every module that is going to be given to `fully_shard`, just before that::

        for block in model.layers:
            poetx_compile.fully_shard_rotations(block, mesh=mesh)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    A group of FSDP2 has one dtype for all that trains and one mixed precision policy. Rotations
    are fp32 beside the norms of a bf16 model, and stay fp32 where a policy gathers in bf16; a model
    in fp32 throughout, without a policy, does not need this. The group is gathered and resharded,
    and its gradients reduced in fp32, with `module`: in one more collective each.

    Args:
        module: a part of a prepared model, compiled or not; what is called below it by
            `fully_shard` already is left as it is.
        mesh, reshard_after_forward, offload_policy: as for `fully_shard`.

    Raises:
        ParallelismError: no prepared layer is in `module`, or they are sharded already.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard

    layers = [e for _, _, e in prepared_linears(unwrap_compiled(module))]
    rotations = [e for e in layers if not is_fsdp_module(e)]
    if not rotations:
        what = "has no prepared layer" if not layers else "has its rotations sharded already"
        raise ParallelismError(
            f"fully_shard_rotations: {type(module).__name__} {what}. Call it once on each module "
            "that fully_shard is called on, after prepare(model)"
        )
    if any(is_sharded(e.skew_in, e.skew_out) for e in rotations):
        raise ParallelismError(
            "fully_shard_rotations: the rotations are in the group of another module: call it "
            "before fully_shard"
        )
    before = [_hooks(e) for e in rotations]
    fully_shard(
        rotations,  # type: ignore[arg-type]
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        mp_policy=MixedPrecisionPolicy(),
        offload_policy=offload_policy or OffloadPolicy(),
    )
    _move_hooks(rotations, before, module)


def _hooks(module: nn.Module) -> tuple[set[int], set[int]]:
    return set(module._forward_pre_hooks), set(module._forward_hooks)


def _move_hooks(
    rotations: list[OrthogonalEquivalence], before: list[tuple[set[int], set[int]]], to: nn.Module
) -> None:
    """Gather and reshard with the whole of `to`, not in the middle of its layers.

    There the hooks of FSDP2 would break a compiled graph between the rotations and the product they
    belong to. The group opens with its first module and closes with its last.
    """
    opens, closes = [], []
    for e, (pre, post) in zip(rotations, before, strict=True):
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


def check_processes(model: nn.Module) -> None:
    """Raise where a prepared model is spread over processes in a way that cannot train rotations.

    Collective where the model is sharded: every process has to call it.

    Raises:
        ParallelismError: the original FSDP; rotations whose blocks are cut, whose gradients nobody
            reduces or that share a group with parameters of another dtype.
        IncompatibleStateError: processes prepared the model differently.
    """
    if wrapper_of(model) == "FullyShardedDataParallel":
        raise ParallelismError(
            "FullyShardedDataParallel flattens parameters, and rotations cannot be merged there: "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    reshard(model)
    layers = list(prepared_linears(model))
    check_layouts([e for _, _, e in layers])
    for name, module, e in layers:
        _check_placements(name, module, e)
    rotations = {p for _, _, e in layers for p in (e.skew_in, e.skew_out)}
    for name, unit in model.named_modules():
        if is_fsdp_module(unit):
            trained = [p for p in _own_parameters(unit) if p.requires_grad]
            dtypes = {p.dtype for p in trained}
            if len(dtypes) > 1 and not rotations.isdisjoint(trained):
                shown = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
                raise ParallelismError(
                    f"the FSDP2 group of {user_name(name) or 'the model'} trains parameters in "
                    f"{shown}: call {_HELPER} before fully_shard(module), so that the rotations "
                    "get a group of their own"
                )
    _check_alike(layers)


def _check_placements(name: str, module: nn.Module, e: OrthogonalEquivalence) -> None:
    for skew in (e.skew_in, e.skew_out):
        for placement in skew.placements if is_sharded(skew) else ():  # type: ignore[attr-defined]
            if not _keeps_blocks(placement):
                raise ParallelismError(
                    f"{name}: its rotations are placed {placement}, which cuts their blocks: leave "
                    "them to fully_shard as it is (Shard(0)); tensor parallelism is not supported"
                )
    if is_sharded(stored_weight(module)) and not all(map(is_sharded, (e.skew_in, e.skew_out))):
        raise ParallelismError(
            f"{name}: its weight is sharded, its rotations are not (ignored_params?), and nobody "
            f"reduces their gradients: let fully_shard have them, or call {_HELPER}"
        )


def _keeps_blocks(placement: Any) -> bool:
    from torch.distributed.tensor import Replicate, Shard

    return type(placement) is Replicate or (type(placement) is Shard and placement.dim == 0)


def _own_parameters(unit: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters below `unit`, but for those below another call of `fully_shard`."""
    yield from unit.parameters(recurse=False)
    for child in unit.children():
        if not is_fsdp_module(child):
            yield from _own_parameters(child)


def _check_alike(layers: list[tuple[str, nn.Linear, OrthogonalEquivalence]]) -> None:
    """Compare what decides merges over the processes of a sharded model."""
    skews = [p for _, _, e in layers for p in (e.skew_in, e.skew_out)]
    groups = groups_of(skews)
    if not groups:
        return
    facts = [(name, e.layout_values(), e.config.to_dict()) for name, _, e in layers]
    digest = hashlib.sha256(repr(facts).encode()).digest()
    own = int.from_bytes(digest[:8], "little") >> 1
    # The largest of a number and of its negative: alike where they cancel.
    both = torch.tensor([own, -own], dtype=torch.int64, device=skews[0].device)
    if int(reduce_over(groups, both, "max").sum()) != 0:
        raise IncompatibleStateError(
            "the processes prepared this model differently: every one has to call prepare with "
            "the same configuration, seed included, on the same layers"
        )
