"""`poetx_backend`: from Dynamo's graph through the passes to Inductor."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from poetx_compile import collector, passes
from poetx_compile.adoption import Adopter
from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError, EffectiveWeightError
from poetx_compile.flags import held_to_flags
from poetx_compile.kept import Compiler, FoldKeeper
from poetx_compile.looking import look_first
from poetx_compile.options import COMPILE_TIME, BackendOptions, differing
from poetx_compile.outputs import checked
from poetx_compile.parametrization import OrthogonalEquivalence, equivalence_with_id
from poetx_compile.partition import Partitioner, partitioner_for
from poetx_compile.passes import graphs, input_centric
from poetx_compile.passes.contexts import without_inference_mode
from poetx_compile.passes.writes import writes_to_weights
from poetx_compile.settling import settle
from poetx_compile.wrappers import check_reduced

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
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    limit = torch._dynamo.config.recompile_limit
    if compile_id is not None and compile_id.frame_compile_id == limit - 1:
        log.warning(
            "graph %d of one function, the last that torch._dynamo.config.recompile_limit = %d "
            "allows: whatever needs another one runs eagerly from now on, with every effective "
            "weight built anew, which is slow. TORCH_LOGS=recompiles tells what varies. Sizes: "
            "torch.compile(..., dynamic=True) or torch._dynamo.mark_dynamic. An error in place of "
            "the eager run: torch.compile(..., fullgraph=True)",
            limit,
            limit,
        )


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], parsed: BackendOptions, states: Any = None
) -> Callable[..., Any]:
    """`poetx_backend` with parsed options; `states` as in `rewrite`."""
    config = _choice(gm, parsed)

    def compile_it(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return checked(graph, _compile(graph, inputs, parsed, config))

    graph, extra, bind, record = rewrite(gm, example_inputs, parsed, states, compile_it)
    _announce_static(extra)
    if states is None and parsed.stage == "inductor" and record.applied("adopt_linear"):
        parsed = dataclasses.replace(parsed, stage=PROVISIONAL)
    made = compile_it(graph, [*example_inputs, *extra])
    compiled = bind(held_to_flags(gm, example_inputs, made))
    return look_first(gm, example_inputs, compiled) if states is None else compiled


def rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: BackendOptions,
    states: Any = None,
    compile_folds: Compiler = lambda graph, _: graph,
) -> tuple[fx.GraphModule, list[Any], Callable[[Any], Any], passes.Record]:
    """Run the passes over a copy of Dynamo's graph.

    Args:
        states: where adopted states live, to show what adoption does; by default the registry
            of the process, where what is adopted is adopted for good. Where it is given, kept folds
            are those of this graph alone as well.
        compile_folds: compiles the graph of folds that are kept between calls; by default it runs
            as it is.

    Returns:
        The rewritten graph, its additional inputs, the function that binds a compiled graph to
        them, and the record of what the passes did.
    """
    _check_not_written(gm)
    check_reduced(*(skew for e in _prepared(gm) for skew in (e.skew_in, e.skew_out)))
    graph = graphs.clone(gm)
    record = passes.Record()
    adopter = None
    live = states is None
    if "adopt_linear" not in options.disable_passes:
        adopter = Adopter(
            POETXConfig.from_dict(options.config),
            example_inputs,
            states,
            # Backward may run, and call it, inside of a function that Dynamo compiles.
            settle=torch.compiler.disable(settle) if live else None,
            refuse=live and options.unprepared == "refuse",
            provisional=options.stage == "inductor",
        )
        passes.run([adopter.graph_pass], graph, record, verify=options.verify_passes)
    config = _choice(gm, options)
    keeper = None
    if options.keep_folded == "step":
        _check_may_keep(config)
        own: Any = None if states is None else WeakKeyDictionary()
        keeper = FoldKeeper(gm, example_inputs, options.cuda_graphs, compile_folds, own)
    rest = passes.pipeline(
        variant=config.variant,
        budget=config.memory_budget is not None,
        formulation=config.formulation,
        within_guard=config.may_fold,
        machine=options.machine,
        max_bytes=options.cayley_batch_bytes,
        disabled=options.disable_passes,
        hoist=None if keeper is None else keeper.graph_pass,
    )
    passes.run(rest, graph, record, verify=options.verify_passes)
    if live:
        _warn_of_weights_that_leave(record)
    log.debug("rewritten graph:\n%s", graph.graph)
    parts: list[Adopter | FoldKeeper] = []  # in the order of their inputs
    if adopter is not None and (adopter.graph_pass.slots or adopter.zeros):
        parts.append(adopter)
    if keeper is not None and keeper.graph_pass.module is not None:
        record.hoisted = keeper.graph_pass.module
        parts.append(keeper)

    def bind(compiled: Callable[..., Any]) -> Callable[..., Any]:
        for part in reversed(parts):
            compiled = part.bind(compiled)
        return compiled

    return graph, [t for part in parts for t in part.extra_inputs()], bind, record


def _check_not_written(gm: fx.GraphModule) -> None:
    for weight, writer in writes_to_weights(gm):
        raise EffectiveWeightError(
            f"compiled code writes into the weight of {graphs.layer_of(weight).name} in place "
            f"({writer.name}), which would be lost: the weight of a prepared layer is computed. "
            "Write it in code that is not compiled (torch.compiler.disable), assign it "
            "(linear.weight = value), or train the layer densely (exclude_modules)"
        )


def _warn_of_weights_that_leave(record: passes.Record) -> None:
    left = [e for e in record.refused("input_centric") if e.detail == input_centric.LEAVES]
    if left:
        log.warning(
            "an effective weight of shape %s leaves the compiled graph, built as a dense matrix: "
            "right, and slow; what is written into it there is lost. module.compile() does that "
            "for torch's own classes, such as nn.Sequential: use torch.compile(module). Otherwise "
            "look for a graph break",
            list(left[0].shape or ()),
        )


def _check_may_keep(config: POETXConfig) -> None:
    if config.variant == "mem" or config.memory_budget is not None:
        mem = config.variant == "mem"
        asked = "variant = 'mem'" if mem else f"memory_budget = {config.memory_budget}"
        raise ConfigError(
            f"option keep_folded = 'step' keeps every folded weight between calls, and {asked} is "
            "there to keep less: give one of the two"
        )


def _equivalence_nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The effective weights of prepared layers, in all graphs of a module."""
    for module in graphs.nested(gm):
        yield from (n for n in module.graph.nodes if graphs.is_op(n, *graphs.EQUIVALENCE))


def _prepared(gm: fx.GraphModule) -> Iterator[OrthogonalEquivalence]:
    """The parametrizations a graph was traced through.

    By the modules that Dynamo noted, not by the graph's inputs: FSDP2 gathers into parameters of
    its own, and DDP's graph splitting hands over fake tensors.
    """
    for node in _equivalence_nodes(gm):
        equivalence = equivalence_with_id(graphs.layer_of(node).module_id)
        if equivalence is not None:
            yield equivalence


def _choice(gm: fx.GraphModule, options: BackendOptions) -> POETXConfig:
    """The configuration in force: that of `prepare`, with the compile-time options on top.

    Raises `ConfigError` where an option contradicts what the model was prepared with.
    """
    prepared = next((e.config for e in _prepared(gm)), None)
    if prepared is None:
        return POETXConfig.from_dict(options.config)
    given = POETXConfig.from_dict(options.config)
    before, asked = prepared.to_dict(), given.to_dict()
    wrong = [k for k in differing(prepared, given) if k in options.config]
    if wrong:
        shown = ", ".join(f"{k}: {before[k]!r} at prepare, {asked[k]!r} here" for k in wrong)
        raise ConfigError(
            f"options of poetx_backend contradict the prepared model ({shown}): drop them here, "
            "or merge_and_unload(model) and prepare it again"
        )
    choices = {k: asked[k] for k in options.config if k in COMPILE_TIME}
    return POETXConfig.from_dict(before | choices)


def _compile(
    graph: fx.GraphModule, inputs: list[Any], options: BackendOptions, config: POETXConfig
) -> Callable[..., Any]:
    if options.stage == "eager":
        return graph
    without_inference_mode(graph)
    partitioner = partitioner_for(config)
    if options.stage == "aot_eager":
        return _aot_eager(graph, inputs, partitioner)
    from torch._inductor.compile_fx import compile_fx

    from poetx_compile.lowerings import ExpandOps, chain_passes, compile_inner, register

    register()
    identity = options.identity() | {"config_in_force": config.to_dict()}
    settings = dict(options.inductor)
    if not options.cuda_graphs:
        # Partitions serve CUDA graphs alone, and finding them takes 4 % of a compilation.
        settings.setdefault("graph_partition", False)
    users = settings.get("post_grad_custom_pre_pass", _configured_pre_pass())
    settings["post_grad_custom_pre_pass"] = chain_passes(users, ExpandOps(identity))
    if partitioner is not None:
        if config.memory_budget is not None and "custom_partitioner_fn" in settings:
            raise ConfigError("memory_budget and custom_partitioner_fn contradict: give one")
        settings.setdefault("custom_partitioner_fn", partitioner)
    compiled = compile_fx(graph, inputs, compile_inner, config_patches=settings)
    return cast("Callable[..., Any]", compiled)


def _announce_static(tensors: Sequence[Tensor]) -> None:
    """Tell AOTAutograd that the sizes of inputs Dynamo does not know are constants.

    It would give them symbolic sizes otherwise, and guards on these, which have no source in the
    user's frame and cannot be checked.
    """
    from torch._dynamo.source import ConstantSource
    from torch._guards import TracingContext
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
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    def as_it_is(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(module.forward)

    partition = partitioner or min_cut_rematerialization_partition
    return aot_autograd(fw_compiler=as_it_is, partition_fn=partition)(graph, inputs)
