"""torchtitan: any configuration of its registry, trained by this package.

>>> def llama3_poetx() -> Trainer.Config:
...     return with_poetx(llama3_8b(), POETXConfig(block_size=256), lr=3e-4)

Read against torchtitan 0.3.0. Its override mechanism reaches configurations, and what has to happen
between building a model and sharding it is none: hence a `ModelSpec` with another `parallelize_fn`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed.fsdp import get_fsdp_reshard_after_forward_policy

from poetx_compile.compile.backend import poetx_backend
from poetx_compile.config import POETXConfig
from poetx_compile.errors import ParallelismError
from poetx_compile.layers.prepare import prepare
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.layers.sharding import fully_shard_rotations
from poetx_compile.optim import POETXAdamW, POETXMuon

SPMD = "partial_dtensor"
"""The backend of torchtitan that leaves parameters to FSDP2."""


def with_poetx(
    config: Any,
    poetx: POETXConfig | None = None,
    *,
    lr: float,
    poetx_lr: float | None = None,
    weight_decay: float = 0.1,
    optimizer: Literal["muon", "adamw"] = "muon",
    compile: bool = True,
    options: dict[str, Any] | None = None,
) -> Any:
    """A `Trainer.Config` of torchtitan like `config`, whose model trains through rotations.

    The model is prepared before it is sharded; its blocks are compiled with the backend ``poetx``;
    the optimiser is one of this package. The model is left out of ``compile.components``:
    torchtitan takes no backend but two for a model with FlexAttention.

    Args:
        config: of torchtitan's registry, or of your own; it is not changed.
        poetx: as for `prepare`.
        lr, poetx_lr, weight_decay, optimizer: of `POETXMuon` or `POETXAdamW`.
        compile: whether to compile the blocks.
        options: of the backend.
    """
    spec = config.model_spec
    parallelize = partial(
        _parallelize, wrapped=spec.parallelize_fn, poetx=poetx, compile=compile, options=options
    )
    components = [name for name in config.compile.components if name != "model"]
    return dataclasses.replace(
        config,
        model_spec=dataclasses.replace(spec, parallelize_fn=parallelize),
        optimizer=POETXOptimizers.Config(
            name=optimizer, lr=lr, poetx_lr=poetx_lr, weight_decay=weight_decay
        ),
        compile=dataclasses.replace(config.compile, components=components),
        parallelism=dataclasses.replace(config.parallelism, spmd_backend=SPMD),
    )


def _parallelize(
    model: Any,
    *,
    wrapped: Any,
    poetx: POETXConfig | None,
    compile: bool,
    options: dict[str, Any] | None,
    parallel_dims: Any,
    training: Any,
    parallelism: Any,
    **others: Any,
) -> nn.Module:
    """`prepare`, the groups of the rotations, torchtitan's own parallelisation, then compile."""
    for name in ("tp", "pp", "cp", "ep"):
        if getattr(parallel_dims, f"{name}_enabled"):
            raise ParallelismError(
                f"torchtitan with {name} > 1: rotations train under FSDP2 alone, set it to 1"
            )
    prepare(model, poetx)
    for _, linear, _ in prepared_linears(model):
        linear._init_self_parameters = MethodType(_initialise, linear)  # type: ignore[assignment]
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    policy = parallelism.fsdp_reshard_after_forward
    for block in model.layers.values():
        fully_shard_rotations(
            block,
            mesh=parallel_dims.get_mesh(names),
            reshard_after_forward=get_fsdp_reshard_after_forward_policy(policy, False),
            offload_policy=CPUOffloadPolicy() if training.enable_cpu_offload else None,
        )
    model = wrapped(
        model, parallel_dims=parallel_dims, training=training, parallelism=parallelism, **others
    )
    if compile:
        for block in model.layers.values():
            block.compile(backend=poetx_backend, fullgraph=True, options=options)
    return model


@torch.no_grad()
def _initialise(linear: Any) -> None:
    """The weight as torchtitan draws it, each value by itself: so in the stored order as well."""
    equivalence = equivalence_of(linear)
    assert equivalence is not None
    linear._param_init["weight"](stored_weight(linear))
    if linear.bias is not None:
        linear._param_init["bias"](linear.bias)
    for skew in equivalence.skews:
        skew.zero_()


class POETXOptimizers(OptimizersContainer):
    """torchtitan's container with an optimiser of this package for each part of the model."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        name: Literal["muon", "adamw"] = "muon"
        lr: float = 1e-3
        poetx_lr: float | None = None
        weight_decay: float = 0.1

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.model_parts = model_parts
        made = POETXMuon if config.name == "muon" else POETXAdamW
        self.optimizers = [
            made(model, config.lr, config.poetx_lr, weight_decay=config.weight_decay)
            for model in model_parts
        ]
        every = []
        for model, optimizer in zip(model_parts, self.optimizers, strict=True):
            names = {id(p): canonical_fqn(name) for name, p in model.named_parameters()}
            for group in optimizer.param_groups:  # checkpoints have the state by these names
                group["param_names"] = [names[id(p)] for p in group["params"]]
                every += group["params"]
        self._validate_params(every)
        self._post_init(every)
