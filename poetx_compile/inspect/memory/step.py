"""The memory of a training step: of the graphs that were traced, or with more layers than those.

Of a long run of equal layers two are traced. Each node knows its layer, so the graphs show what the
second of them keeps and where its kernels are. The first may differ: it may hold what all layers
share, or need no gradient of its input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from poetx_compile.compile.partition import Bytes, storages
from poetx_compile.errors import EstimateError
from poetx_compile.inspect.memory.liveness import run, total
from poetx_compile.inspect.memory.trace import TracedGraph
from poetx_compile.passes import graphs

_BATCHED = (
    torch.ops.poetx.cayley_neumann,
    torch.ops.poetx.rotation_delta,
    torch.ops.poetx.rotation_tangent,
    torch.ops.poetx.cayley_neumann_backward,
    torch.ops.poetx.rotation_tangent_backward,
)
"""What `batch_cayley` builds for several layers at once."""


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes a step needs on top of weights, their buffers, and the state of the optimiser.

    Attributes:
        kept: between forward and backward.
        gradients: that the backward leaves. One may be part of a larger storage.
        forward: most in the forward.
        backward: in each kernel of the backward, in order, gradients included.
    """

    kept: int
    gradients: int
    forward: int
    backward: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Longer:
    """A run of equal layers of which two were traced.

    Attributes:
        first, second: their names in the module that was traced.
        layers: how many more there are.
        gradients: bytes of one layer's.
        share: of the rotations that were traced, one layer's part.
        filling: how many layers still add to a batch of rotations: a full one grows no further.
        rounded: bytes of one layer's gradients that rounding saves as soon as the layer is done.
    """

    first: str
    second: str
    layers: int
    gradients: int
    share: float
    filling: float
    rounded: int = 0


@dataclasses.dataclass(frozen=True)
class _Moment:
    """One kernel, and what is alive in it.

    Attributes:
        layer: of the kernel; in the backward none where it recomputes.
        size: bytes alive.
        batches: of them, batches of rotations; and of these the gradients.
        second: by run, what the second layer made that is not in batches; the gradients apart.
    """

    layer: str
    size: int
    batches: tuple[int, int] = (0, 0)
    second: tuple[tuple[int, int], ...] = ()


def step_memory(traced: Sequence[TracedGraph], longer: Sequence[Longer] = ()) -> StepMemory:
    """Run the forwards of all graphs in order, then their backwards in reverse order.

    Raises:
        EstimateError: the layers of a run are not to be found in the graphs.
    """
    owners = _Owners(traced, longer)
    kept: list[Bytes] = []
    forward: list[_Moment] = []
    for graph in traced:
        before = sum(map(total, kept))
        moments, left = owners.run(graph.forward, {}, before, _FORWARD)
        forward += moments
        kept.append(left)
    backward: list[_Moment] = []
    gradients = 0
    for index, graph in reversed(list(enumerate(traced))):
        others = sum(map(total, kept[:index])) + gradients
        moments, left = owners.run(graph.backward, kept[index], others, _BACKWARD)
        backward += moments
        gradients += total(left)
    all_kept = {s: n for storages_of in kept for s, n in storages_of.items()}
    growths = [
        _Growth(run, number, owners.kept_by(all_kept, run)) for number, run in enumerate(longer)
    ]
    for growth in growths:
        growth.find(forward, backward)
    result = StepMemory(
        kept=total(all_kept) + sum(g.run.layers * g.kept for g in growths),
        gradients=gradients + sum(g.run.layers * g.run.gradients for g in growths),
        forward=max(
            (m.size + sum(g.in_forward(i, m) for g in growths) for i, m in enumerate(forward)),
            default=0,
        ),
        backward=tuple(
            m.size + sum(g.in_backward(i, m) for g in growths) for i, m in enumerate(backward)
        ),
    )
    return dataclasses.replace(result, forward=max(result.forward, result.kept))


class _Growth:
    """What the layers that were not traced add to each moment.

    The second one may stand anywhere among them: all others are still kept, or all have left their
    gradients. Where the first one runs, all have.
    """

    def __init__(self, run: Longer, number: int, kept: int):
        self.run, self.number, self.kept = run, number, kept

    def find(self, forward: Sequence[_Moment], backward: Sequence[_Moment]) -> None:
        """Where the kernels of the two layers begin."""
        try:
            self.forward = _first(forward, self.run.second)
            self.second = _first(backward, self.run.second)
            self.first = _first(backward, self.run.first)
        except StopIteration:
            raise EstimateError(
                f"no kernels of {self.run.first} and {self.run.second} are in the graphs: give "
                "whole=True to trace all layers"
            ) from None
        self.left = self.in_backward(self.first, backward[self.first])

    def in_forward(self, i: int, moment: _Moment) -> int:
        kept = self.kept if i >= self.forward else 0
        return self._of(kept, self.run.share * moment.batches[0])

    def in_backward(self, i: int, moment: _Moment) -> int:
        batch, in_batches = (self.run.share * size for size in moment.batches)
        if i < self.first:
            left = self.left if i >= self.second else 0
            return max(left, self._of(self.kept, batch))
        unfinished, gradients = moment.second[self.number]
        lasting = max(0, gradients + in_batches - self.run.rounded)
        return self._of(lasting, batch + unfinished)

    def _of(self, each: float, each_in_batch: float) -> int:
        filling = min(self.run.layers, self.run.filling)
        return int(self.run.layers * each + filling * each_in_batch)


def _first(moments: Sequence[_Moment], layer: str) -> int:
    own = (i for i, m in enumerate(moments) if _within(m.layer, layer))
    return next(own)


class _Owners:
    """The layers that storages belong to: those of the nodes that made them."""

    def __init__(self, traced: Sequence[TracedGraph], longer: Sequence[Longer]):
        self.longer = longer
        self._layer: dict[int, str] = {}
        self._place: dict[int, int] = {}
        self._begins: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._batched: set[int] = set()
        self._lasting: set[int] = set()
        if not longer:
            return
        made = [g for t in traced for g in (t.forward, t.backward)]
        self._nodes = [n for g in made for n in g.nodes if n.op == "call_function"]
        for place, node in enumerate(self._nodes):
            layer, batched = _layer(node), _is_batched(node)
            for storage in storages(node):
                self._layer.setdefault(storage, layer)
                self._place.setdefault(storage, place)
                if batched:
                    self._batched.add(storage)
            for pair in longer if not batched else ():
                self._bound(place, layer, pair.first)
                self._bound(place, layer, pair.second)
        self._lasting = {
            s for g in made for n in g.output_node().all_input_nodes for s in storages(n)
        }

    def _of(self, alive: Bytes, layer: str) -> Bytes:
        return {s: n for s, n in alive.items() if _within(self._layer.get(s, ""), layer)}

    def _parted(self, alive: Bytes) -> tuple[int, int]:
        """Bytes of what is freed within its graph, and of what is not."""
        lasting = sum(n for s, n in alive.items() if s in self._lasting)
        return total(alive) - lasting, lasting

    def _bound(self, place: int, layer: str, own: str) -> None:
        """Note where a layer begins, and what comes after it that is no part of its parents."""
        if _within(layer, own):
            self._begins.setdefault(own, place)
        elif own in self._begins and not _within(own, layer) and layer.startswith(_OF_THE_STEP):
            self._ends.setdefault(own, place)

    def kept_by(self, kept: Bytes, pair: Longer) -> int:
        """What the second layer makes of it, and its parents right after, such as a residual sum.

        Its output may be kept as the input of a layer behind it, which the last one does not have:
        the input that it has itself counts then.
        """
        begin = self._begins.get(pair.second, 0)
        end = self._ends.get(pair.second, len(self._nodes))
        period = begin - self._begins.get(pair.first, begin)
        second = set(self._nodes[begin:end])
        made = [(self._place.get(storage, -1), size) for storage, size in kept.items()]
        found = sum(size for place, size in made if begin <= place < end)
        places = {place for place, _ in made}
        for place, size in made:
            if not begin - period <= place < begin <= place + period < end:
                continue
            node, output = self._nodes[place], self._nodes[place + period]
            is_input = not second.isdisjoint(node.users) and node.target == output.target
            if is_input and place + period not in places and size in storages(output).values():
                found += size
        return found

    def run(
        self, graph: fx.Graph, held: Bytes, others: int, stack: str
    ) -> tuple[list[_Moment], Bytes]:
        moments: list[_Moment] = []

        def observe(node: fx.Node | None, size: int, alive: Bytes) -> None:
            size += others
            if not self.longer:
                moments.append(_Moment("", size))
                return
            layer = "" if node is None else graphs.layer_of(node, stack).name
            batched = {s: alive[s] for s in self._batched & alive.keys()}
            rest = {s: n for s, n in alive.items() if s not in batched}
            second = tuple(self._parted(self._of(rest, pair.second)) for pair in self.longer)
            moments.append(_Moment(layer, size, self._parted(batched), second))

        left = run(graph, held, observe)
        return moments, left


def _is_batched(node: fx.Node) -> bool:
    """Whether a node is of a batch of rotations: the op, or what it is given in one piece."""
    if graphs.is_op(node, *_BATCHED):
        return any(_is_cat(operand) for operand in node.all_input_nodes)
    return _is_cat(node) and any(graphs.is_op(user, *_BATCHED) for user in node.users)


def _is_cat(node: fx.Node) -> bool:
    return graphs.is_op(node, torch.ops.aten.cat)


_OF_THE_STEP = ("model.", "(root)")
"""How the names of layers begin in an `example.TrainingStep`."""

_FORWARD, _BACKWARD = "nn_module_stack", "fwd_nn_module_stack"
"""Where a node of the forward, and one of the backward proper, say what module they are of."""


def _layer(node: fx.Node) -> str:
    key = _BACKWARD if node.meta.get(_BACKWARD) else _FORWARD
    return graphs.layer_of(node, key).name


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")
