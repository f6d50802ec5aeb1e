"""Checks of FSDP2 (`fully_shard`) in fp32, where it needs nothing of this package."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.distributed import shards
from poetx_compile.errors import (
    AdoptionError,
    IncompatibleStateError,
    NothingToTrainError,
    ParallelismError,
)
from poetx_compile.inspect.diagnostics import diagnostics, effective_weight
from poetx_compile.layers import effective
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from poetx_compile.optim.merge import merge
from tests.distributed.ddp import choices
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
    muon8,
    prepared_draw,
    raises,
    rank,
    same_everywhere,
    train,
    world,
)
from tests.helpers.models import OddZoo, TinyLM
from tests.helpers.rotations import skews, turn
from tests.helpers.tolerances import assert_close


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Each block, then the rest."""
    for block in model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def check_losses_and_states_are_those_of_one_process() -> None:
    for make in (muon, muon8, adamw, attached, adopted):
        model = shard(build())
        optimizer = make(model)
        assert_alike(train(model, optimizer), alone(make))
        assert [e.draw for _, _, e in prepared_linears(model)] == [3] * 7
        states = [v for state in optimizer.state.values() for v in state.values() if v.dim() > 0]
        assert all(isinstance(value, DTensor) for value in states)
        assert same_everywhere([e.layout.tolist() for _, _, e in prepared_linears(model)])


def check_compiled_before_and_after_whole_and_by_block() -> None:
    expected = alone(small=True)
    for how in ("blocks before", "blocks after", "whole after"):
        torch._dynamo.reset()
        model = build(small=True)
        if how == "blocks before":
            model.layers[0].compile(**COMPILED)
        forward = shard(model)
        if how == "blocks after":
            model.layers[0].compile(**COMPILED)
        if how == "whole after":
            forward = torch.compile(model, **COMPILED)
        with choices() as seen:
            assert_alike(train(forward, muon(forward)), expected)
        # The hooks of FSDP2 cut at the block and nowhere else, and merges compile nothing.
        assert [choice for choice in seen if choice[1]] == [("mem", 3)], (how, seen)


def check_merged_bits_are_those_of_one_process() -> None:
    model, single = shard(build()), build()
    for seed in range(2):
        turn(model, seed=seed)
        turn(single, seed=seed)
        merge(model, redraw=True)
        merge(single, redraw=True)
        assert digest(model) == digest(single)
    for (_, a, _), (_, b, _) in zip(prepared_linears(model), prepared_linears(single), strict=True):
        assert torch.equal(effective_weight(a), b.weight)


def check_whole_plain_weights_are_kept_in_parts_also_from_meta() -> None:
    plain = TinyLM()
    weights = {f"{n}.weight": m.weight for n, m in plain.named_modules() if "proj" in n}
    with torch.device("meta"):
        fresh = TinyLM()
    poetx.prepare(fresh, poetx.POETXConfig(block_size=4))
    fresh = shard(fresh).to_empty(device="cpu")
    trained = shard(build())
    turn(trained, seed=1)
    for model in (fresh, trained):
        for name, parameter in model.named_parameters():
            if "parametrizations" not in name:
                nn.init.constant_(parameter, 0.5)
        model.load_state_dict(weights, strict=False)
        for name, linear, e in prepared_linears(model):
            assert isinstance(e.skew_in, DTensor)
            assert torch.equal(effective_weight(linear), weights[f"{name}.weight"]), name
        model.eval()
        with torch.no_grad():
            before = [model(batch(0)[:, :-1]) for _ in range(2)][-1]
        assert not any(e in effective._cache for _, _, e in prepared_linears(model))
        merge(model, redraw=True)
        assert_close(model(batch(0)[:, :-1]), before)
        with raises(ParallelismError, "give the whole weight to model.load_state_dict"):
            model.layers[0].mlp.up_proj.weight = torch.zeros(40, 16)


def check_a_merge_holds_one_whole_weight_at_a_time() -> None:
    model = shard(build(layers=2))
    turn(model, seed=1)
    shapes = {stored_weight(m).shape for _, m, _ in prepared_linears(model)}
    gathered: list[Any] = []
    most = 0
    real = DTensor.full_tensor

    def spy(self, **kwargs):
        nonlocal most
        result = real(self, **kwargs)
        if result.shape in shapes:
            gathered.append(weakref.ref(result))
            most = max(most, sum(ref() is not None for ref in gathered))
        return result

    DTensor.full_tensor = spy
    gc.disable()  # what only the collector frees counts as held
    try:
        merge(model, redraw=True)
    finally:
        DTensor.full_tensor = real
        gc.enable()
    assert len(gathered) == 14
    assert most == 1


def check_rotations_are_reduced_and_frozen_weights_are_not() -> None:
    model = shard(build(layers=2))
    optimizer = muon(model)
    with Collectives() as seen:
        loss_of(model, batch(rank())).backward()
    reduced = sum(n for name, n in seen.calls if name == "_reduce_scatter_base_")
    assert reduced == sum(map(padded, (p for p in model.parameters() if p.requires_grad)))
    assert all(stored_weight(m).grad is None for _, m, _ in prepared_linears(model))
    with Collectives() as seen:
        optimizer.step()
    layers = len(list(prepared_linears(model)))
    assert seen.calls == [("allreduce_", layers)]  # the first looks at the weights: a flag of each


def padded(parameter: Tensor) -> int:
    """Elements of a parameter whose first dimension is made to divide by the processes."""
    rows = -(-parameter.shape[0] // world()) * world()
    return rows * (parameter.numel() // parameter.shape[0])


def check_accumulation_without_synchronising() -> None:
    model = shard(build())
    optimizer = muon(model)
    losses = []
    for step in range(5):
        mine = batch(step)[rank() :: world()].split(1)
        parts = []
        for i, tokens in enumerate(mine):
            model.set_requires_gradient_sync(i == len(mine) - 1)
            loss = loss_of(model, tokens) / len(mine)
            loss.backward()
            parts.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        total = torch.stack(parts).sum()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / world())
    assert_alike(losses, alone())


def check_early_merges_come_at_the_same_step() -> None:
    assert_early_merges_as_alone(shard)


def check_uneven_blocks_and_sides_of_size_one() -> None:
    """Three blocks, one block and none over two processes."""
    results = []
    for single in (False, True):
        torch.manual_seed(1)
        model = OddZoo()
        poetx.prepare(
            model,
            poetx.POETXConfig(
                block_size=4, exclude_modules=(), merge_interval=2, redraw_interval=2
            ),
        )
        if not single:
            fully_shard(model)
        optimizer = poetx.POETXMuon(model, lr=1e-2)
        x = torch.randn(world() * 3, 7)
        losses = []
        for _ in range(5):
            mine = x if single else x.chunk(world())[rank()]
            loss = (model(mine) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            value = loss.detach().clone()
            if not single:
                torch.distributed.all_reduce(value)
                value /= world()
            losses.append(value.item())
        assert optimizer.schedule.merges == 2
        results.append(losses)
    assert_alike(*results)


def check_activation_checkpointing() -> None:
    expected = alone(small=True)
    for compiled in (False, True):
        model = build(small=True)
        (block,) = model.layers
        if compiled:
            block.compile(**COMPILED)
        shard(model)
        if compiled:  # outside of what is compiled
            model.layers[0] = Checkpointed(block)
        else:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        assert_alike(train(model, muon(model)), expected)


class Checkpointed(nn.Module):
    """A module whose forward runs again in the backward, with its FSDP2 hooks."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def check_an_evaluation_between_steps() -> None:
    """Without a backward FSDP2 leaves the root's parameters whole, beside the sharded ones."""
    model, single = fully_shard(build()), build()  # one group, the root
    optimizer = muon(model)
    losses = []
    for step in range(5):
        losses += train(model, optimizer, range(step, step + 1))
        with torch.no_grad():
            model(batch(9)[:, :-1])
        diagnostics(model)
    assert_alike(losses, alone())
    single.load_state_dict({k: shards.whole(v).clone() for k, v in model.state_dict().items()})
    with torch.no_grad():
        model(batch(9)[:, :-1])
    merge(model, redraw=True)  # not into what FSDP2 has gathered, and drops
    merge(single, redraw=True)
    model.reshard()
    assert digest(model) == digest(single)


def check_reading_a_sharded_weight_is_refused() -> None:
    model = shard(build())
    linear = model.layers[0].attention.q_proj
    with raises(ParallelismError, "effective_weight(linear) gathers it"):
        linear.weight  # noqa: B018
    with raises(ParallelismError, "cannot be unloaded in place"):
        poetx.merge_and_unload(model)
    assert prepared_draw(model) == 1


def check_the_wrong_order_is_refused() -> None:
    model = shard(TinyLM())
    for act in (lambda: poetx.prepare(model), lambda: poetx.POETXAdamW(model)):
        with raises(ParallelismError, "fully_shard (FSDP2) before it was prepared"):
            act()
    with raises(AdoptionError, "poetx_compile.prepare(model)"):
        torch.compile(model, **COMPILED)(batch(0)[:, :-1])


def check_the_original_fsdp_is_refused() -> None:
    model = FullyShardedDataParallel(build(), use_orig_params=True, device_id=torch.device("cpu"))
    with raises(ParallelismError, "use torch.distributed.fsdp.fully_shard"):
        muon(model)


def check_other_layouts_are_refused() -> None:
    def across(parameter: nn.Parameter) -> Shard:
        return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % 2 == 0 else Shard(0)

    with raises(ParallelismError, "which cuts their blocks"):
        muon(shard(build(), shard_placement_fn=across))
    with raises(ParallelismError, "with merge_interval=1 every step would gather"):
        muon(shard(build(merge_interval=1)))
    with raises(ParallelismError, "with merge_interval=1 every step would gather"):
        poetx.fully_shard_rotations(build(merge_interval=1))
    refusal: tuple[type[Exception], str] = (
        ParallelismError,
        "base='int8' is not supported under FSDP2",
    )
    if torch.__version__ < "2.12":  # torch itself refuses it before
        refusal = RuntimeError, "only Tensors of floating point dtype can require gradients"
    with raises(*refusal):
        muon(shard(build(base="int8")))
    with raises(ParallelismError, "base='int8' is not supported under FSDP2"):
        poetx.fully_shard_rotations(build(base="int8"))
    model = build()
    rotations = set(skews(model))
    with raises(ParallelismError, "nobody reduces their gradients"):
        muon(shard(model, ignored_params=rotations))
    with raises(IncompatibleStateError, "prepared this model differently"):
        muon(shard(build(seed=rank())))


def check_weights_sharded_by_columns() -> None:
    def across(parameter: nn.Parameter) -> Shard | None:
        return None if parameter.requires_grad else Shard(1)

    model = shard(build(), shard_placement_fn=across)
    assert_alike(train(model, muon(model)), alone())


def check_tensor_parallelism_is_refused() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world(),))
    plan = {"layers.0.mlp.up_proj": ColwiseParallel()}
    model = parallelize_module(TinyLM(), mesh, plan)
    report = {row.name: row for row in poetx.prepare(model, poetx.POETXConfig(block_size=8))}
    assert "tensor parallelism" in report["layers.0.mlp.up_proj"].reason
    assert report["layers.0.mlp.down_proj"].status == "prepared"
    with raises(ParallelismError, "tensor parallelism"):
        parallelize_module(build(), mesh, plan)
    model = build()
    stored = model.layers[0].mlp.up_proj.parametrizations["weight"]
    stored.original = nn.Parameter(distribute_tensor(stored.original, mesh, [Shard(0)]), False)
    with raises(ParallelismError, "tensor parallelism"):
        model(batch(0)[:, :-1])


def check_a_weight_of_zeros_is_one_in_every_process_or_in_none() -> None:
    """A part of zeros says nothing: the other process may hold the rest."""
    model = build(small=True)
    rows = torch.zeros(16, 40)
    rows[0] = 1
    model.layers[0].down_proj.weight = rows
    model = shard(model)
    optimizer = adamw(model)
    train(model, optimizer, range(1))
    model.load_state_dict({"layers.0.down_proj.weight": torch.zeros(16, 40)}, strict=False)
    with raises(NothingToTrainError, "the weight of layers.0.down_proj is all zeros"):
        train(model, optimizer, range(1))
