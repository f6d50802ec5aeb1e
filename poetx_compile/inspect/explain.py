"""`explain`: what the compiler makes of a model, layer by layer, before anybody trains it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from poetx_compile._torch import metrics, pytree
from poetx_compile.compile.backend import compile_graph
from poetx_compile.compile.options import BackendOptions
from poetx_compile.compile.rewrite import DryRun, rewrite
from poetx_compile.config import POETXConfig
from poetx_compile.inspect.drawing import Drawn, drawing
from poetx_compile.inspect.page import grouped, page
from poetx_compile.inspect.render import render
from poetx_compile.layers.eligibility import PREPARED, linears, refusals, unwrap_compiled
from poetx_compile.layers.prepare import config_of
from poetx_compile.layers.prepared import equivalence_of
from poetx_compile.layers.tables import (
    folded_rows,
    format_table,
    html_table,
    without_conditions,
    wrapped_lines,
    wrapped_table,
)
from poetx_compile.layers.trained import DenseWeights, Trained, trained
from poetx_compile.passes import LAYER_FORMS, Event, Machine, Record, graphs
from poetx_compile.passes.cost import Cost

_ACROSS_LAYERS = ("share_permutations", "cancel_permutations", "batch_cayley", "hoist_folds")
"""The passes whose decisions are about several layers at once."""

NOT_SEEN = "no graph of these inputs calls it"


@dataclasses.dataclass(frozen=True)
class ExplainRow:
    """One `nn.Linear`: shape [out, in], blocks, how it runs, whether it was rewritten, and why.

    `costs` is what the cost model said of its sides, where it was asked.
    """

    name: str
    shape: tuple[int, int]
    blocks: str
    formulation: str
    status: str
    reason: str
    costs: tuple[Cost, ...] = ()


@dataclasses.dataclass(frozen=True)
class ExplainedGraph:
    """One graph of the model: Dynamo's, and what the passes made of it, as text and as boxes."""

    before: str
    after: str
    nodes_before: int
    nodes_after: int
    record: Record
    boxes_before: list[Drawn]
    boxes_after: list[Drawn]


class Explanation:
    """What `explain` found: prints as a short table; `text` has everything, `save_html` draws it.

    Attributes:
        rows: an `ExplainRow` for each `nn.Linear` of the model.
        graphs: an `ExplainedGraph` for each graph (more than one where the model breaks).
        kernels: number of kernels Inductor generated, forward and backward, or ``None`` where it
            was not asked to compile.
        model: name of the model's class.
        machine: the rates of the cost model.
        trained: a `Trained`: how much of the model trains through rotations, and what does not.
    """

    def __init__(
        self,
        rows: list[ExplainRow],
        graphs: list[ExplainedGraph],
        kernels: int | None,
        model: str = "",
        machine: Machine | None = None,
        trained: Trained | None = None,
    ):
        self.rows, self.graphs, self.kernels = rows, graphs, kernels
        self.model, self.machine = model, machine or Machine()
        self.trained = trained

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one HTML page that needs nothing else, and return its path.

        It shows the table, the graphs before and after side by side, drawn, with modules that open
        and close and equal layers as one box, what was refused and why, and the cost model. Typing
        a layer's name finds it in the table and in both graphs; ``page.html#layers.0`` opens there.

        Raises:
            OSError: the file cannot be written.
        """
        target = Path(path)
        target.write_text(page(self), encoding="utf-8")
        return target

    @property
    def across_layers(self) -> list[Event]:
        """What was done, or refused, for several layers at once: by pass, in graph order."""
        events = [e for g in self.graphs for e in g.record.events]
        return [e for name in _ACROSS_LAYERS for e in events if e.pass_name == name]

    @property
    def before(self) -> str:
        """All graphs before the passes."""
        return "\n\n".join(g.before for g in self.graphs)

    @property
    def after(self) -> str:
        """All graphs after the passes."""
        return "\n\n".join(g.after for g in self.graphs)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return f"<Explanation of {self.model or 'a model'}: {self._counts()}>"

    def _repr_html_(self) -> str:
        return html_table(self._lead(), _FOLDED, self._folded())

    def text(self, verbose: bool = False) -> str:
        """What `print` shows: what trains, and one row for all layers that are alike.

        With `verbose` every layer has a row with its blocks, the cost model's condition and the
        reason, and what was done across layers is listed.
        """
        if not verbose:
            return f"{wrapped_lines(self._lead())}\n{wrapped_table(_FOLDED, self._folded())}"
        header = ("layer", "shape", "blocks in|out", "formulation", "status", "reason")
        cells = [
            (r.name or "(root)", _sizes(r.shape), r.blocks, r.formulation, r.status, r.reason)
            for r in self.rows
        ]
        lines = [str(self.trained)] if self.trained is not None else []
        lines += [f"  dense: {weights}" for weights in self._dense()]
        lines += ["", format_table(header, cells), self._counts()]
        if tokens := {cost.tokens for row in self.rows for cost in row.costs}:
            numbers = ", ".join(f"{n:,}" for n in sorted(tokens))
            lines.append(f"T: tokens of a call, batch x sequence; here {numbers}")
        lines.append(
            f"nodes: {sum(g.nodes_before for g in self.graphs)} before, "
            f"{sum(g.nodes_after for g in self.graphs)} after"
        )
        for name, applied, detail, layers in grouped(self.across_layers):
            lines.append(f"{name}: {'' if applied else 'refused: '}{detail} ({layers})")
        if self.kernels is None:
            lines.append("kernels: not counted (explain(..., kernels=True) compiles to count them)")
        else:
            lines.append(f"kernels: {self.kernels} generated by Inductor, forward and backward")
        return "\n".join(lines)

    def _lead(self) -> str:
        """The share that trains, and how many are rewritten where not all of these are."""
        rewritten = sum(row.status == "rewritten" for row in self.rows)
        lines = [] if self.trained is None else [str(self.trained)]
        if self.trained is None or rewritten != self.trained.layers:
            lines.append(self._counts())
        return "\n".join(lines)

    def _counts(self) -> str:
        rewritten = sum(row.status == "rewritten" for row in self.rows)
        graphs = "1 graph" if len(self.graphs) == 1 else f"{len(self.graphs)} graphs"
        return f"{rewritten} of {len(self.rows)} nn.Linear rewritten in {graphs}"

    def _dense(self) -> tuple[DenseWeights, ...]:
        return self.trained.weights if self.trained is not None else ()

    def _folded(self) -> list[tuple[str, ...]]:
        cells = [(r.name or "(root)", _sizes(r.shape), _how(r)) for r in self.rows]
        shown = folded_rows(cells)
        linears = {row.name or "(root)" for row in self.rows} | {name for name, *_ in shown}
        for weights in self._dense():
            if not linears.issuperset(weights.names):
                shown.append((", ".join(weights.names), _sizes(weights.shape), weights.reason))
        return shown


_FOLDED = ("layer", "shape", "how it runs, or why it is dense")


def _how(row: ExplainRow) -> str:
    if row.status == "rewritten":
        return without_conditions(row.formulation)
    if row.status == "refused":
        return f"weight-centric, slow: {row.reason}"
    return row.reason


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def explain(
    model: nn.Module,
    *inputs: Any,
    options: dict[str, Any] | None = None,
    kernels: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Run the passes over `model` on example inputs and say what they did and what not, and why.

    First comes the share of the model that trains through rotations, and every weight of two
    dimensions or more that trains densely.

    The model's forward runs once, uncompiled. Nothing of the model changes: a plain model is shown
    as it would be adopted, without any state being created; buffers (running statistics) and the
    random number generators are left as they were. As with `torch._dynamo.explain`, compiled code
    of this process is dropped: what was compiled is compiled again at its next call.

    Args:
        model: prepared or plain, compiled or not.
        inputs, kwargs: arguments of its forward.
        options: as for `poetx_backend`.
        kernels: compile forward and backward with Inductor as well, and count its kernels.

    Returns:
        An `Explanation`; print it, or read ``rows``, ``before``, ``after``.
    """
    plain = unwrap_compiled(model)
    parsed = BackendOptions.parse(None, options)
    seen: list[ExplainedGraph] = []
    dry_run = DryRun()

    def record(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        rewritten = rewrite(gm, example_inputs, parsed, dry_run=dry_run)
        graph, made = rewritten.graph, rewritten.record
        nodes = _nodes(gm), _nodes(graph)
        boxes = drawing(gm), drawing(graph)
        after = render(graph)
        if made.hoisted is not None:
            after += f"\n\nkept between calls:\n{render(made.hoisted)}"
        seen.append(ExplainedGraph(render(gm), after, *nodes, made, *boxes))
        return rewritten.bind(graph)

    with (
        torch.random.fork_rng(device_type=_device_type(plain)),
        _undisturbed(plain),
        torch.enable_grad(),  # as it trains, whatever the grad mode of the caller
    ):
        torch.compile(plain, backend=record)(*inputs, **kwargs)
        count = _count_kernels(plain, parsed, inputs, kwargs) if kernels else None
    config = config_of(plain) or POETXConfig.from_dict(parsed.config)
    rows = _rows(plain, config, seen)
    # Rotations of a prepared model train everywhere, those of another where a graph adopts them.
    left = {r.name: r.reason for r in rows if r.status in ("skipped", "not seen")}
    what = trained(plain, config, left)
    return Explanation(rows, seen, count, type(plain).__name__, parsed.machine, what)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave neither compiled code nor changed buffers behind; modules compiled in place run plain.

    A graph compiled here would count against the user's recompile limit, past which Dynamo runs the
    model eagerly, and its sizes would decide which sizes of the user's inputs become dynamic.
    """
    in_place = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl}
    saved = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    torch.compiler.reset()
    for module in in_place:
        module._compiled_call_impl = None
    try:
        with _no_weak_references():
            yield
    finally:
        torch.compiler.reset()
        for module, call in in_place.items():
            module._compiled_call_impl = call
        with torch.no_grad():
            for buffers, name, buffer, value in saved:
                buffers[name] = buffer
                if not torch.equal(buffer, value):  # batch norm writes past the version counter
                    buffer.copy_(value)


def _no_weak_references() -> contextlib.AbstractContextManager[None]:
    """Let Dynamo drop its weak references to parameters, which `torch.utils.swap_tensors` refuses,
    as it does for registered backends. Torch 2.11 has no such setting."""
    settings = torch._dynamo.config
    if not hasattr(settings, "invalidate_compile_context_weakrefs"):
        return contextlib.nullcontext()
    return settings.patch(invalidate_compile_context_weakrefs=True)


def _rows(model: nn.Module, config: POETXConfig, seen: list[ExplainedGraph]) -> list[ExplainRow]:
    by_module: dict[int, Event] = {}
    by_name: dict[str, Event] = {}
    for graph in seen:
        for event in graph.record.events:
            if event.pass_name not in ("adopt_linear", *LAYER_FORMS):
                continue
            for layer in event.layers:
                _note(by_name, layer.name, event)
                if layer.module_id is not None:
                    _note(by_module, layer.module_id, event)
    reasons = refusals(model, config)
    rows = []
    for name, module in linears(model).items():
        shape = (module.out_features, module.in_features)
        ids = id(module), id(equivalence_of(module))
        found = next((by_module[i] for i in ids if i in by_module), None)
        rows.append(_row(name, shape, found or by_name.get(name or "(root)"), reasons[name]))
    return rows


def _nodes(gm: torch.fx.GraphModule) -> int:
    """The nodes of a graph and of the bodies in it."""
    return sum(len(module.graph.nodes) for module in graphs.nested(gm))


def _note(events: dict[Any, Event], key: Any, event: Event) -> None:
    """Keep the last word on a layer; where its weight is read twice, the reading refused."""
    earlier = events.get(key)
    if (
        earlier is None
        or earlier.applied
        or (earlier.pass_name in LAYER_FORMS) != (event.pass_name in LAYER_FORMS)
    ):
        events[key] = event


def _row(name: str, shape: tuple[int, int], event: Event | None, reason: str | None) -> ExplainRow:
    if event is not None and event.pass_name in LAYER_FORMS:
        if event.applied:
            costs = tuple(choice.cost for choice in event.choices if choice.cost)
            return ExplainRow(name, shape, event.blocks, event.detail, "rewritten", "", costs)
        return ExplainRow(name, shape, event.blocks, "weight_centric", "refused", event.detail)
    if reason not in (None, PREPARED):
        return ExplainRow(name, shape, "-", "plain", "skipped", reason)
    if event is not None:
        return ExplainRow(name, shape, "-", "plain", "skipped", event.detail)
    return ExplainRow(name, shape, "-", "-", "not seen", NOT_SEEN)


def _device_type(model: nn.Module) -> str:
    device = next((p.device.type for p in model.parameters()), "cpu")
    return device if device != "cpu" else "cuda"  # fork_rng always covers the CPU


def _count_kernels(
    model: nn.Module,
    options: BackendOptions,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> int:
    """Generate all code afresh and read Inductor's own counter; gradients are not stored.

    What C++ it has compiled before is taken from its cache: that is no part of the count.
    """
    fresh = dataclasses.replace(options, stage="inductor")
    dry_run = DryRun()

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return compile_graph(gm, example_inputs, fresh, dry_run)

    before = metrics.generated_kernel_count
    with (
        torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        torch._functorch.config.patch(
            enable_autograd_cache=False, enable_remote_autograd_cache=False
        ),
    ):
        out = torch.compile(model, backend=backend)(*inputs, **kwargs)
        leaves = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        loss = [t.float().sum() for t in leaves if t.requires_grad]
        wanted = [p for p in model.parameters() if p.requires_grad]
        if loss and wanted:
            torch.autograd.grad(torch.stack(loss).sum(), wanted, allow_unused=True)
    return metrics.generated_kernel_count - before
