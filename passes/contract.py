"""What a graph pass is, and the runner that applies any of them.

A pass works on Dynamo's graph, before AOTAutograd: it sees the whole model, forward only, in the
user's own terms. Each pass decides, then applies: `sites` finds the candidates, `decide` returns
what to do at a site or raises `Refusal` with the reason, `apply` rewrites. The runner catches
refusals, keeps the metadata true and the graph linted, and knows nothing of any pass. It also
holds every pass to what must not change: which inputs receive a gradient.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from torch import fx

from poetx_compile.errors import RewriteError
from poetx_compile.passes import gradients, graphs, metadata
from poetx_compile.passes.contexts import Contexts
from poetx_compile.passes.cost import Choice

S = TypeVar("S")


class Refusal(Exception):
    """A site is left as it is; `reason` is shown by `explain`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Event:
    """One decision of one pass about one layer (or several, for a pass over groups).

    `choices` says how each side of a layer runs, and why (`formulation`).
    """

    pass_name: str
    layers: tuple[graphs.Layer, ...]
    applied: bool
    detail: str
    shape: tuple[int, int] | None = None
    blocks: str = "-"
    choices: tuple[Choice, ...] = ()


class Record:
    """What the passes did to one graph: read by `explain`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.hoisted: fx.GraphModule | None = None
        """What was taken out of the graph, to run less often (`hoist_folds`)."""

    def applied(self, pass_name: str) -> list[Event]:
        """The rewrites of one pass."""
        return [e for e in self.events if e.pass_name == pass_name and e.applied]

    def refused(self, pass_name: str) -> list[Event]:
        """The refusals of one pass."""
        return [e for e in self.events if e.pass_name == pass_name and not e.applied]


class GraphPass(ABC, Generic[S]):
    """One rewrite. Its docstring is its specification: the graph before, the graph after.

    Nodes may be merged, shared or moved only where `contexts` says that they run under the same
    settings (grad mode, autocast, …).
    """

    name: ClassVar[str]
    contexts: Contexts
    """What each node runs under, bodies included; the runner sets it before `sites`."""
    into_checkpoints: ClassVar[bool] = True
    """Whether the bodies of activation checkpoints are rewritten as well."""

    @abstractmethod
    def sites(self, graph: fx.Graph) -> Iterable[S]:
        """The candidates in graph order."""

    @abstractmethod
    def decide(self, site: S) -> str:
        """What will be done, in a few words. Raises `Refusal` where the site is left alone."""

    @abstractmethod
    def describe(self, site: S) -> dict[str, Any]:
        """The other fields of a decided site's event: ``layers`` and what applies of ``shape``,
        ``blocks``, ``choices``, and a ``pass_name`` where the outcome has a name of its own."""

    @abstractmethod
    def apply(self, graph: fx.Graph, site: S) -> None:
        """Rewrite one decided site."""


def run(
    passes: Sequence[GraphPass[Any]], root: fx.GraphModule, record: Record, *, verify: bool = False
) -> None:
    """Apply `passes` in order to `root` and to the checkpointed bodies nested in it.

    Args:
        root: a graph of our own (`graphs.clone`), never Dynamo's.
        record: takes what was done and what was refused.
        verify: after each pass that rewrote something, and at the end, lint and check every node's
            metadata against a fresh propagation.

    Raises:
        RewriteError: a pass changed which inputs of the graph receive a gradient.
    """
    contexts = Contexts(root)
    before = gradients.reached(contexts)
    checked: metadata.Checked = {}
    for number, graph_pass in enumerate(passes, 1):
        graph_pass.contexts = contexts
        modules = graphs.nested(root) if graph_pass.into_checkpoints else [root]
        rewrites = sum(_run_one(graph_pass, module, record) for module in modules)
        if rewrites:
            contexts = Contexts(root)
            metadata.refresh(root, contexts)
            if gradients.reached(contexts) != before:
                raise RewriteError(
                    f"the pass {graph_pass.name} changed which inputs of a graph receive a "
                    f"gradient, so nothing was compiled: options={{'disable_passes': "
                    f"['{graph_pass.name}']}} leaves it out. This is a fault of poetx-compile: "
                    "please report the model"
                )
        if verify and (rewrites or number == len(passes)):
            metadata.verify(root, contexts, checked)


def _run_one(graph_pass: GraphPass[Any], module: fx.GraphModule, record: Record) -> int:
    """Apply one pass to one module; returns the number of rewrites."""
    decided = []
    for site in graph_pass.sites(module.graph):
        try:
            detail, applied = graph_pass.decide(site), True
            decided.append(site)
        except Refusal as refusal:
            detail, applied = refusal.reason, False
        event = Event(graph_pass.name, (), applied, detail)
        record.events.append(dataclasses.replace(event, **graph_pass.describe(site)))
    for site in decided:
        graph_pass.apply(module.graph, site)
    return len(decided)
