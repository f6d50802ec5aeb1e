"""Prepared layers under FSDP2: a group of their own for the rotations, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from poetx_compile.distributed.fsdp import keeps_rows, own_parameters, shard_together
from poetx_compile.distributed.shards import groups_of, is_sharded, reduce_over
from poetx_compile.distributed.wrappers import is_fsdp_module, reshard, user_name, wrapper_of
from poetx_compile.errors import IncompatibleStateError, ParallelismError
from poetx_compile.layers.eligibility import unwrap_compiled
from poetx_compile.layers.integrity import check_layouts
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.prepared import prepared_linears, stored_weight

NOT_INT8 = (
    "base='int8' is not supported under FSDP2, whose mixed precision would cast the int8 weights "
    "apart from their scales: use DDP, or prepare the model with base='dense'"
)
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
    layers = [e for _, _, e in prepared_linears(unwrap_compiled(module))]
    rotations = [e for e in layers if not is_fsdp_module(e)]
    if not rotations:
        what = "has no prepared layer" if not layers else "has its rotations sharded already"
        raise ParallelismError(
            f"fully_shard_rotations: {type(module).__name__} {what}. Call it once on each module "
            "that fully_shard is called on, after prepare(model)"
        )
    if any(e.merged for e in rotations):
        raise ParallelismError(
            "fully_shard_rotations: with merge_interval=1 every step would gather every weight of "
            "a sharded model: prepare it with a larger merge_interval, or use DDP"
        )
    if any(e.quantised for e in rotations):
        raise ParallelismError(f"fully_shard_rotations: {NOT_INT8}")
    if any(is_sharded(*e.skews) for e in rotations):
        raise ParallelismError(
            "fully_shard_rotations: the rotations are in the group of another module: call it "
            "before fully_shard"
        )
    shard_together(
        rotations,
        within=module,
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        offload_policy=offload_policy,
    )


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
    _check_form(layers)
    check_layouts([e for _, _, e in layers])
    for name, module, e in layers:
        _check_placements(name, module, e)
    rotations = {skew for _, _, e in layers for skew in e.skews}
    for name, unit in model.named_modules():
        if is_fsdp_module(unit):
            trained = [p for p in own_parameters(unit) if p.requires_grad]
            dtypes = {p.dtype for p in trained}
            if len(dtypes) > 1 and not rotations.isdisjoint(trained):
                shown = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
                raise ParallelismError(
                    f"the FSDP2 group of {user_name(name) or 'the model'} trains parameters in "
                    f"{shown}: call {_HELPER} before fully_shard(module), so that the rotations "
                    "get a group of their own"
                )
    _check_alike(layers)


def _check_form(layers: Iterable[tuple[str, nn.Linear, OrthogonalEquivalence]]) -> None:
    """Raise where layers of the merged form, or with int8 weights, are sharded."""
    for name, module, e in layers:
        if e.merged and is_sharded(stored_weight(module), *e.skews):
            raise ParallelismError(
                f"{name}: with merge_interval=1 every step would gather every weight of a sharded "
                "model: prepare it with a larger merge_interval, or use DDP"
            )
        if e.quantised and is_sharded(stored_weight(module), *e.skews):
            raise ParallelismError(f"{name}: {NOT_INT8}")


def _check_placements(name: str, module: nn.Module, e: OrthogonalEquivalence) -> None:
    trained = (*e.skews, *e.gains.values())
    for skew in trained:
        for placement in skew.placements if is_sharded(skew) else ():  # type: ignore[attr-defined]
            if not keeps_rows(placement):
                raise ParallelismError(
                    f"{name}: its rotations are placed {placement}, which cuts their blocks: leave "
                    "them to fully_shard as it is (Shard(0)); tensor parallelism is not supported"
                )
    if is_sharded(stored_weight(module)) and not all(map(is_sharded, trained)):
        raise ParallelismError(
            f"{name}: its weight is sharded, its rotations are not (ignored_params?), and nobody "
            f"reduces their gradients: let fully_shard have them, or call {_HELPER}"
        )


def _check_alike(layers: list[tuple[str, nn.Linear, OrthogonalEquivalence]]) -> None:
    """Compare what decides merges over the processes of a sharded model."""
    skews = [skew for _, _, e in layers for skew in e.skews]
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
