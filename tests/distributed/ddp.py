"""Checks of DistributedDataParallel."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.backends.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.compile import backend
from poetx_compile.compile.rewrite import config_in_force
from poetx_compile.errors import AdoptionError, IncompatibleStateError, ParallelismError
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from poetx_compile.optim.merge import merge
from tests.distributed.training import (
    COMPILED,
    Collectives,
    adamw,
    adopted,
    alone,
    assert_alike,
    assert_early_merges_as_alone,
    attached,
    batch,
    build,
    digest,
    loss_of,
    muon,
    raises,
    rank,
    same_everywhere,
    train,
    world,
)
from tests.helpers.models import TinyLM
from tests.helpers.rotations import skews, turn


@contextmanager
def choices() -> Iterator[list[Any]]:
    """The (variant, rewritten layers) of each graph that is compiled inside."""
    seen: list[Any] = []
    rewrite = backend.rewrite

    def spy(gm, inputs, options, **rest):
        result = rewrite(gm, inputs, options, **rest)
        record = result.record
        layers = [*record.applied("input_centric"), *record.applied("folded")]
        seen.append((config_in_force(gm, options).variant, len(layers)))
        return result

    backend.rewrite = spy
    try:
        yield seen
    finally:
        backend.rewrite = rewrite


def check_losses_and_states_are_those_of_one_process() -> None:
    for make in (muon, adamw, attached, adopted):
        model = build()
        wrapped = DistributedDataParallel(model)
        optimizer = make(wrapped)
        assert_alike(train(wrapped, optimizer), alone(make))
        assert [e.draw for _, _, e in prepared_linears(model)] == [3] * 7
        assert same_everywhere(digest(model)), make.__name__


def check_compiled_before_and_after_whole_and_by_block() -> None:
    expected = alone(small=True)
    for how in ("whole before", "whole after", "blocks before"):
        torch._dynamo.reset()
        model = build(small=True)
        if how == "blocks before":
            model.layers[0].compile(**COMPILED)
        if how == "whole before":
            forward = DistributedDataParallel(torch.compile(model, **COMPILED))
        else:
            forward = DistributedDataParallel(model)
        if how == "whole after":
            forward = torch.compile(forward, **COMPILED)
        with choices() as seen:
            assert_alike(train(forward, muon(model)), expected)
        assert seen == [("mem", 3)], how  # merges compile nothing


def check_split_graphs_keep_the_configuration_also_with_checkpoints() -> None:
    """Dynamo's DDPOptimizer cuts the graph at bucket borders and hands over fake tensors."""
    expected = alone(small=True)
    with small_first_bucket():
        for checkpointed in (False, True):
            torch._dynamo.reset()
            model = build(small=True)
            if checkpointed:
                (block,) = model.layers
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
            wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
            with choices() as seen:
                forward = torch.compile(wrapped, **COMPILED)
                assert_alike(train(forward, muon(model)), expected)
            # Only a graph without a checkpoint, which is one node, can be cut inside of the block.
            assert len(seen) > (1 if checkpointed else 2), seen
            assert {variant for variant, rewritten in seen if rewritten} == {"mem"}
            assert sum(rewritten for _, rewritten in seen) == 3
        torch._dynamo.reset()
        wrapped = DistributedDataParallel(TinyLM(), bucket_cap_mb=0.002)
        with raises(AdoptionError, "poetx_compile.prepare(model)"):
            torch.compile(wrapped, **COMPILED)(batch(0)[:, :-1])


@contextmanager
def small_first_bucket() -> Iterator[None]:
    """Let Dynamo's first bucket, a megabyte, be no larger than the others."""
    optimizer = torch._dynamo.backends.distributed.DDPOptimizer
    real = optimizer.__init__

    def init(self, bucket_bytes_cap, *args, **kwargs):
        real(self, bucket_bytes_cap, *args, **{**kwargs, "first_bucket_cap": bucket_bytes_cap})

    optimizer.__init__ = init
    try:
        yield
    finally:
        optimizer.__init__ = real


def check_a_merge_communicates_nothing() -> None:
    model = build()
    wrapped = DistributedDataParallel(model)
    optimizer = muon(wrapped)
    train(wrapped, optimizer, range(1))
    turn(model, seed=3)
    with Collectives() as seen:
        merge(wrapped, redraw=True)
    assert seen.calls == []
    assert same_everywhere(digest(model))
    tokens = batch(0)
    with Collectives() as seen:
        loss_of(wrapped, tokens).backward()
        optimizer.step()  # the second: it merges
    assert optimizer.schedule.merges == 1
    names = {name for name, _ in seen.calls}
    assert names <= {"allreduce_", "broadcast_"}, names  # gradients, and DDP's own of buffers


def check_int8_weights_have_the_same_bits_everywhere() -> None:
    model = build(torch.bfloat16, base="int8", small=True)
    wrapped = DistributedDataParallel(model)
    optimizer = muon(wrapped)
    train(wrapped, optimizer)
    assert optimizer.schedule.merges == 2
    stored = [t for _, m, e in prepared_linears(model) for t in (stored_weight(m), e.scale)]
    assert stored[0].dtype == torch.int8
    assert same_everywhere(digest(model))


def check_every_step_merged_has_the_same_bits_without_traffic() -> None:
    for make, dtype in ((muon, torch.bfloat16), (adopted, torch.float32)):
        model = build(dtype, merge_interval=1, small=True)
        wrapped = DistributedDataParallel(model)
        optimizer = make(wrapped)
        losses = train(wrapped, optimizer)
        if dtype == torch.float32:
            assert_alike(losses, alone(make, merge_interval=1, small=True))
        assert same_everywhere(digest(model)), make.__name__
        loss_of(wrapped, batch(0)[rank() : rank() + 1]).backward()
        with Collectives() as during:
            optimizer.step()
        assert during.calls == []


def check_only_what_trains_is_reduced() -> None:
    model = build()
    wrapped = DistributedDataParallel(model)
    reduced: list[Tensor] = []

    def hook(_, bucket):
        reduced.extend(bucket.parameters())
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    loss_of(wrapped, batch(0)).backward()
    assert {id(p) for p in reduced} == {id(p) for p in model.parameters() if p.requires_grad}
    rotations = set(map(id, skews(model)))
    assert rotations <= {id(p) for p in reduced}
    assert all(stored_weight(m).grad is None for _, m, _ in prepared_linears(model))


def check_accumulation_with_no_sync() -> None:
    model = build()
    wrapped = DistributedDataParallel(model)
    optimizer = muon(wrapped)
    losses = []
    for step in range(5):
        mine = batch(step)[rank() :: world()].split(1)  # one sequence at a time
        parts = []
        for i, tokens in enumerate(mine):
            with wrapped.no_sync() if i < len(mine) - 1 else torch.enable_grad():
                loss = loss_of(wrapped, tokens) / len(mine)
                loss.backward()
            parts.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        total = torch.stack(parts).sum()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / world())
    assert_alike(losses, alone())


def check_early_merges_come_at_the_same_step() -> None:
    assert_early_merges_as_alone(DistributedDataParallel)


def check_the_wrong_order_is_refused() -> None:
    wrapped = DistributedDataParallel(TinyLM())
    for act in (lambda: poetx.prepare(wrapped), lambda: poetx.POETXAdamW(wrapped)):
        with raises(ParallelismError, "prepare(model) comes first, then DistributedDataParallel"):
            act()
    tokens = batch(0)[:, :-1]
    with raises(AdoptionError, "poetx_compile.prepare(model)"):
        torch.compile(wrapped, **COMPILED)(tokens)
    torch._dynamo.reset()
    poetx.prepare(wrapped.module, poetx.POETXConfig(block_size=8))  # DDP does not know of it
    for forward in (wrapped, torch.compile(wrapped, **COMPILED)):
        with raises(ParallelismError, "reduces the gradients of none of its rotations"):
            forward(tokens)


def check_other_seeds_are_refused() -> None:
    model = build(seed=rank())
    wrapped = DistributedDataParallel(model)
    if rank() == 0:
        muon(wrapped)  # what rank 0 has is what all have now
    else:
        with raises(IncompatibleStateError, "prepare the model"):
            muon(wrapped)
