"""From Dynamo's graph to the one that is compiled: the passes, and what is bound to its inputs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from poetx_compile import passes
from poetx_compile.adoption.adopter import Adopter
from poetx_compile.adoption.settling import settle
from poetx_compile.compile.folds import Compiler, FoldCache
from poetx_compile.compile.options import BackendOptions
from poetx_compile.config import COMPILE_TIME, POETXConfig, differing
from poetx_compile.distributed.wrappers import check_reduced
from poetx_compile.errors import ConfigError, EffectiveWeightError
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.registry import registry
from poetx_compile.passes import graphs
from poetx_compile.passes.writes import writes_to_weights

log = logging.getLogger("poetx_compile")


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a rewrite makes that only shows what the passes do: nothing of the process changes.

    Attributes:
        adopted: weight → the state that adoption would make for it.
        folds: folded weights that would be cached between calls, by layer.
    """

    adopted: Any = dataclasses.field(default_factory=WeakTensorKeyDictionary)
    folds: Any = dataclasses.field(default_factory=WeakKeyDictionary)


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A graph after the passes.

    Attributes:
        graph: to be compiled.
        inputs: its inputs beyond those of Dynamo's graph.
        bind: turns the compiled graph into one that takes the inputs of Dynamo's.
        record: what the passes did.
    """

    graph: fx.GraphModule
    inputs: list[Any]
    bind: Callable[[Callable[..., Any]], Callable[..., Any]]
    record: passes.Record


def rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: BackendOptions,
    *,
    dry_run: DryRun | None = None,
    compile_folds: Compiler = lambda graph, _: graph,
) -> Rewritten:
    """Run the passes over a copy of Dynamo's graph.

    Args:
        dry_run: where what is made goes; without it, what is adopted is adopted for good.
        compile_folds: compiles the graph of cached folds; by default it runs
            as it is.
    """
    _check_not_written(gm)
    check_reduced(*(skew for e in _prepared(gm) for skew in e.skews))
    graph = graphs.clone(gm)
    record = passes.Record()
    adopter = None
    if "adopt_linear" not in options.disable_passes:
        adopter = Adopter(
            POETXConfig.from_dict(options.config),
            example_inputs,
            # Backward may run, and call it, inside of a function that Dynamo compiles.
            settle=torch.compiler.disable(settle) if dry_run is None else None,
            states=None if dry_run is None else dry_run.adopted,
            refuse=dry_run is None and options.unprepared == "refuse",
            provisional=options.stage == "inductor",
        )
        passes.run([adopter.graph_pass], graph, record, verify=options.verify_passes)
    config = config_in_force(gm, options)
    folds = None
    if options.keep_folded == "step":
        _check_may_keep(config)
        cache = None if dry_run is None else dry_run.folds
        folds = FoldCache(gm, example_inputs, options.cuda_graphs, compile_folds, cache)
    rest = passes.pipeline(
        variant=config.variant,
        budget=config.memory_budget is not None,
        formulation=config.formulation,
        within_guard=config.may_fold,
        machine=options.machine,
        max_bytes=options.cayley_batch_bytes,
        disabled=options.disable_passes,
        hoist=None if folds is None else folds.graph_pass,
    )
    passes.run(rest, graph, record, verify=options.verify_passes)
    if dry_run is None:
        _warn_of_weights_that_leave(graph)
    log.debug("rewritten graph:\n%s", graph.graph)
    parts: list[Adopter | FoldCache] = []  # in the order of their inputs
    if adopter is not None and (adopter.graph_pass.slots or adopter.zeros):
        parts.append(adopter)
    if folds is not None and folds.graph_pass.module is not None:
        record.hoisted = folds.graph_pass.module
        parts.append(folds)

    def bind(compiled: Callable[..., Any]) -> Callable[..., Any]:
        for part in reversed(parts):
            compiled = part.bind(compiled)
        return compiled

    return Rewritten(graph, [t for part in parts for t in part.extra_inputs()], bind, record)


def _check_not_written(gm: fx.GraphModule) -> None:
    for weight, writer in writes_to_weights(gm):
        raise EffectiveWeightError(
            f"compiled code writes into the weight of {graphs.layer_of(weight).name} in place "
            f"({writer.name}), which would be lost: the weight of a prepared layer is computed. "
            "Write it in code that is not compiled (torch.compiler.disable), assign it "
            "(linear.weight = value), or train the layer densely (exclude_modules)"
        )


def _warn_of_weights_that_leave(graph: fx.GraphModule) -> None:
    left = [n for n in _equivalence_nodes(graph) if any(u.op == "output" for u in n.users)]
    if left:
        log.warning(
            "an effective weight of shape %s leaves the compiled graph, built as a dense matrix: "
            "right, and slow; what is written into it there is lost. Look for a graph break. "
            "Before torch 2.14 module.compile() does that for torch's own classes, such as "
            "nn.Sequential: use torch.compile(module)",
            list(graphs.shape_of(left[0]) or ()),
        )


def _check_may_keep(config: POETXConfig) -> None:
    if config.variant == "mem" or config.memory_budget is not None:
        mem = config.variant == "mem"
        asked = "variant = 'mem'" if mem else f"memory_budget = {config.memory_budget}"
        raise ConfigError(
            f"option keep_folded = 'step' keeps every folded weight between calls, and {asked} is "
            "there to keep less: give one of the two"
        )
    if config.base != "dense":
        raise ConfigError(
            "option keep_folded = 'step' keeps every folded weight between calls, a dense copy of "
            f"what base = {config.base!r} is there to keep small: give one of the two"
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
        equivalence = registry.with_id(graphs.layer_of(node).module_id)
        if equivalence is not None:
            yield equivalence


def config_in_force(gm: fx.GraphModule, options: BackendOptions) -> POETXConfig:
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
