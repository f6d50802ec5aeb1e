"""Checks of bf16 models and mixed precision policies, where the rotations stay fp32."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.errors import ParallelismError
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.optim.merge import merge
from tests.distributed.ddp import choices
from tests.distributed.fsdp import Checkpointed
from tests.distributed.training import (
    COMPILED,
    Collectives,
    adamw,
    alone,
    assert_alike,
    batch,
    build,
    digest,
    loss_of,
    muon,
    raises,
    same_everywhere,
    train,
    world,
)
from tests.helpers.rotations import skews, turn

BF16 = torch.bfloat16
POLICY = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """The rotations of each block in a group of their own, the rest as usual."""
    for block in model.layers:
        poetx.fully_shard_rotations(block, mesh=options.get("mesh"))
        fully_shard(block, **options)
    return fully_shard(model, **options)


def plainly(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def check_bf16_models() -> None:
    expected = alone(dtype=BF16)
    model = build(BF16)
    assert_alike(train(DistributedDataParallel(model), muon(model)), expected, BF16)
    assert same_everywhere(digest(model))
    model = shard(build(BF16))
    assert_alike(train(model, muon(model)), expected, BF16)
    for _, _, e in prepared_linears(model):
        assert e.skew_in.dtype == e.skew_out.dtype == torch.float32
        assert e.draw == 3


def check_mixed_precision_policies() -> None:
    model = build()
    with torch.autocast("cpu", BF16):
        expected = train(model, adamw(model), alone=True)
    model = shard(build(), mp_policy=POLICY)
    assert_alike(train(model, adamw(model)), expected, BF16)


def check_rotations_are_gathered_and_reduced_in_fp32() -> None:
    model = shard(build(BF16, layers=2))
    seen: list[Any] = []
    first = next(e for _, _, e in prepared_linears(model))
    handle = model.layers[0].register_forward_pre_hook(lambda *_: seen.append(first.skew_in.dtype))
    with Collectives() as collectives:
        loss_of(model, batch(0)).backward()
    handle.remove()
    assert first.skew_in.grad.dtype == torch.float32
    names = [name for name, _ in collectives.calls]
    # Two blocks with two groups each, and the root: gathered in the forward, again (but for the
    # root) in the backward, and reduced once.
    assert names.count("_allgather_base_") == 5 + 4
    assert names.count("_reduce_scatter_base_") == 5


def check_in_fp32_both_recipes_are_the_same() -> None:
    one, other = shard(build()), plainly(build())
    assert train(one, muon(one)) == train(other, muon(other))


def check_replicated_and_sharded_dimensions_of_a_mesh() -> None:
    mesh = init_device_mesh("cpu", (world(), 1), mesh_dim_names=("replicate", "shard"))
    model = shard(build(max_angle=0.05, merge_interval=100, redraw_interval=3), mesh=mesh)
    losses = train(model, muon(model))
    assert_alike(losses, alone(max_angle=0.05, merge_interval=100, redraw_interval=3))
    assert same_everywhere(digest(model))


def check_merges() -> None:
    model, single = shard(build(BF16)), build(BF16)
    for seed in range(2):
        turn(model, seed=seed)
        turn(single, seed=seed)
        merge(model, redraw=True)
        merge(single, redraw=True)
        assert digest(model) == digest(single)


def check_compiled_without_a_break_inside_a_block() -> None:
    expected = alone(dtype=BF16, small=True)
    for how in ("blocks before", "wrapped blocks before", "whole after"):
        torch._dynamo.reset()
        model = build(BF16, small=True)
        if how == "blocks before":
            model.layers[0].compile(**COMPILED)
        if how == "wrapped blocks before":
            model.layers[0] = torch.compile(model.layers[0], **COMPILED)
        shard(model)
        forward = torch.compile(model, **COMPILED) if how == "whole after" else model
        if how == "blocks before":
            model.layers[0] = Checkpointed(model.layers[0])
        with choices() as seen:
            assert_alike(train(forward, muon(model)), expected, BF16)
        assert [choice for choice in seen if choice[1]] == [("mem", 3)], (how, seen)


def check_activation_checkpointing() -> None:
    model = shard(build(BF16))
    for block in model.layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    assert_alike(train(model, muon(model)), alone(dtype=BF16), BF16)


def check_accumulation_without_synchronising() -> None:
    model = shard(build(BF16))
    model.set_requires_gradient_sync(False)
    loss_of(model, batch(0)).backward()
    rotations = skews(model)
    assert all(p.grad is None for p in rotations)
    model.set_requires_gradient_sync(True)
    loss_of(model, batch(0)).backward()
    accumulated = [p.grad.full_tensor().clone() for p in rotations]
    model.zero_grad()
    loss_of(model, batch(0)).backward()
    for twice, p in zip(accumulated, rotations, strict=True):
        assert torch.allclose(twice, 2 * p.grad.full_tensor(), rtol=1e-2, atol=1e-6)


def check_the_wrong_way_says_what_to_do() -> None:
    with raises(ParallelismError, "fully_shard_rotations(module) before fully_shard(module)"):
        muon(plainly(build(BF16)))
    model = plainly(build(), mp_policy=POLICY)
    tokens = batch(0)[:, :-1]
    with raises(ParallelismError, "poetx_compile.fully_shard_rotations(module) before"):
        model(tokens)
    model = plainly(build(), mp_policy=POLICY)
    with raises(ParallelismError, "poetx_compile.fully_shard_rotations(module) before"):
        torch.compile(model, **COMPILED)(tokens)
    with raises(ParallelismError, "call it before fully_shard"):
        poetx.fully_shard_rotations(plainly(build()))
    with raises(ParallelismError, "has its rotations sharded already"):
        poetx.fully_shard_rotations(shard(build()))
    with raises(ParallelismError, "has no prepared layer"):
        poetx.fully_shard_rotations(build().embedding)
