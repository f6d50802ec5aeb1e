"""`poetx_backend`: from Dynamo's graph through the passes to Inductor."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from poetx_compile._torch import CompileContext, ConstantSource, TracingContext
from poetx_compile.compile import collector
from poetx_compile.compile.flags import held_to_flags
from poetx_compile.compile.looking import look_first
from poetx_compile.compile.options import BackendOptions
from poetx_compile.compile.outputs import checked
from poetx_compile.compile.partition import Partitioner, partitioner_for
from poetx_compile.compile.rewrite import DryRun, config_in_force, rewrite
from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError
from poetx_compile.passes.contexts import without_inference_mode

log = logging.getLogger("poetx_compile")

PROVISIONAL = "aot_eager"
"""The stage of a graph that runs once: until adopted weights settle."""


def poetx_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The `torch.compile` backend: ``torch.compile(model, backend=poetx_backend)``.

    Rewrites the linears of a prepared model, so that activations are rotated or rotations folded
    into weights, whichever costs less, and compiles the result.

    A model that nobody prepared is served as well, once it is called for training: its linears are
    adopted (`adopt_linear`) with the configuration given in `options`, and any optimiser over
    ``model.parameters()`` takes the rotations over. Its first graph is compiled without Inductor:
    at the end of the first backward the rotations move into the model, which is compiled again.

    Args:
        mode: as for Inductor (``"default"``, ``"reduce-overhead"``, ``"max-autotune"``, …).
            `torch.compile` takes a mode or options; what a mode sets are options too:
            ``{"triton.cudagraphs": True}`` is ``"reduce-overhead"``.
        options: fields of `POETXConfig`; ``stage``, ``unprepared``, ``keep_folded``,
            ``disable_passes``, ``verify_passes``, ``cayley_batch_bytes``, ``machine`` (see
            `BackendOptions`); any option of Inductor.

    Raises:
        ConfigError: an unknown option, a value out of range, or an option that contradicts the
            configuration the model was prepared with.
        AdoptionError: an unprepared model under DDP or FSDP2, or with ``unprepared="refuse"``.
        ParallelismError: a model that was prepared after it was given to DDP.
    """
    parsed = BackendOptions.parse(mode, options)
    _register()
    _warn_at_the_limit()
    with collector.paused():
        return compile_graph(gm, example_inputs, parsed)


def _register() -> None:
    """Be a backend that Dynamo knows, installed or not.

    Of such a one it drops what refers to parameters weakly at the end of a compilation, which
    `torch.utils.swap_tensors` refuses.
    """
    if "poetx" in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.lookup_backend("poetx")  # the entry point, which may not be loaded yet
    else:
        torch._dynamo.register_backend(poetx_backend, name="poetx")


def _warn_at_the_limit() -> None:
    """Say so before Dynamo compiles no more of a function: what is new then runs eagerly.

    That is right and slow, and the one line Dynamo logs does not say what it means here.
    """
    compile_id = CompileContext.current_compile_id()
    limit = torch._dynamo.config.recompile_limit
    if compile_id is not None and compile_id.frame_compile_id == limit - 1:
        log.warning(
            "graph %d of one function, the last that torch._dynamo.config.recompile_limit = %d "
            "allows: whatever needs another one runs eagerly from now on, with every effective "
            "weight recomputed, which is slow. TORCH_LOGS=recompiles tells what varies. Use "
            "torch.compile(..., dynamic=True) or torch._dynamo.mark_dynamic for sizes, and "
            "torch.compile(..., fullgraph=True) for an error in place of the eager run",
            limit,
            limit,
        )


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    parsed: BackendOptions,
    dry_run: DryRun | None = None,
) -> Callable[..., Any]:
    """`poetx_backend` with parsed options; `dry_run` as in `rewrite`."""
    config = config_in_force(gm, parsed)

    def compile_it(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return checked(graph, _compile(graph, inputs, parsed, config))

    made = rewrite(gm, example_inputs, parsed, dry_run=dry_run, compile_folds=compile_it)
    _announce_static(made.inputs)
    if dry_run is None and parsed.stage == "inductor" and made.record.applied("adopt_linear"):
        parsed = dataclasses.replace(parsed, stage=PROVISIONAL)
    compiled = compile_it(made.graph, [*example_inputs, *made.inputs])
    bound = made.bind(held_to_flags(gm, example_inputs, compiled))
    return look_first(gm, example_inputs, bound) if dry_run is None else bound


def _compile(
    graph: fx.GraphModule, inputs: list[Any], options: BackendOptions, config: POETXConfig
) -> Callable[..., Any]:
    if options.stage == "eager":
        return graph
    without_inference_mode(graph)
    partitioner = partitioner_for(config)
    if options.stage == "aot_eager":
        return _aot_eager(graph, inputs, partitioner)
    from poetx_compile._torch import compile_fx
    from poetx_compile.compile.lowerings import ExpandOps, chain_passes, compile_inner, register

    register()
    identity = options.identity() | {"config_in_force": config.to_dict()}
    settings = dict(options.inductor)
    if not options.cuda_graphs:
        # Partitions serve CUDA graphs alone, and finding them takes 4 % of a compilation.
        settings.setdefault("graph_partition", False)
    if hasattr(torch._inductor.config, STATIC_LAUNCH):
        settings.setdefault(STATIC_LAUNCH, True)
    users = settings.get("post_grad_custom_pre_pass", _configured_pre_pass())
    settings["post_grad_custom_pre_pass"] = chain_passes(users, ExpandOps(identity))
    if partitioner is not None:
        if config.memory_budget is not None and "custom_partitioner_fn" in settings:
            raise ConfigError("memory_budget and custom_partitioner_fn contradict: give one")
        settings.setdefault("custom_partitioner_fn", partitioner)
    compiled = compile_fx(graph, inputs, compile_inner, config_patches=settings)
    return cast("Callable[..., Any]", compiled)


STATIC_LAUNCH = "static_launch_user_defined_triton_kernels"
"""Inductor launches its own kernels without Python of Triton's; so may it ours: 8 of 68 ms of host
time in the backward of 8B."""


def _announce_static(tensors: Sequence[Tensor]) -> None:
    """Tell AOTAutograd that the sizes of inputs Dynamo does not know are constants.

    It would give them symbolic sizes otherwise, and guards on these, which have no source in the
    user's frame and cannot be checked.
    """
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

    tracing = TracingContext.try_get()
    if tracing is None:
        return
    for number, tensor in enumerate(tensors):
        tracing.tensor_to_context[tensor] = StatefulSymbolicContext(
            dynamic_sizes=[DimDynamic.STATIC] * tensor.dim(),
            dynamic_strides=[DimDynamic.INFER_STRIDE] * tensor.dim(),
            constraint_sizes=[None] * tensor.dim(),
            constraint_strides=[None] * tensor.dim(),
            tensor_source=ConstantSource(f"poetx_state_{number}"),
            shape_env_to_source_to_symbol_cache={},
        )


def _configured_pre_pass() -> Any:
    return torch._inductor.config.post_grad_custom_pre_pass


def _aot_eager(
    graph: fx.GraphModule, inputs: list[Any], partitioner: Partitioner | None = None
) -> Callable[..., Any]:
    from poetx_compile._torch import (
        aot_autograd,
        make_boxed_func,
        min_cut_rematerialization_partition,
    )

    def as_it_is(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(module.forward)

    partition = partitioner or min_cut_rematerialization_partition
    return aot_autograd(fw_compiler=as_it_is, partition_fn=partition)(graph, inputs)
