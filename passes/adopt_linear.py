"""Pass `adopt_linear`: a plain linear becomes one over an orthogonal-equivalence weight."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from poetx_compile.ops.gains import GAINS
from poetx_compile.passes import gradients, graphs
from poetx_compile.passes.contexts import Context
from poetx_compile.passes.contract import GraphPass, Refusal

STATE = ("skew_in", "skew_out", "perm_in", "perm_out")
"""The tensors of an adopted weight, in the order of the op's arguments."""


Path = tuple[tuple[fx.Node, fx.GraphModule], ...]
"""Nested activation checkpoints: each call and the body it calls."""


@dataclasses.dataclass
class Use:
    """The calls of ``F.linear`` with one weight inside one graph module."""

    module: fx.GraphModule
    weight: fx.Node  # the weight's placeholder in that module
    path: Path  # the checkpoint calls that lead there from the root, outermost first
    linears: list[fx.Node]


@dataclasses.dataclass
class WeightSite:
    """One weight of the graph, everything that reads it, and its position among the inputs."""

    placeholder: fx.Node
    index: int
    uses: list[Use]
    others: list[str]
    hidden: list[fx.Node]
    """Linears that read the weight where no new input can be handed on to."""

    @property
    def linears(self) -> list[fx.Node]:
        return [node for use in self.uses for node in use.linears]

    @property
    def layer(self) -> str:
        return graphs.layer_of(self.linears[0]).name


@dataclasses.dataclass(frozen=True)
class Slot:
    """An adopted weight: the tensors of its state follow the graph's own inputs, slot by slot."""

    index: int
    layer: str
    siblings: int
    """Slots with one number read the same tensor and share an input permutation."""
    tensors: tuple[str, ...]
    """Which of `STATE` and of the gains follow for this slot: a later sibling brings no ``perm_in``
    of its own."""


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """What the pass has to know of a state: its tensors by name, and the op's integer arguments."""

    tensors: Mapping[str, Tensor]
    block_in: int
    block_out: int
    order: int | None
    merged: bool = False
    """Whether the rotations are the identity whenever the model runs (``merge_interval=1``)."""

    def equivalence(
        self, stored: fx.Node, operands: Mapping[str, fx.Node]
    ) -> tuple[Any, tuple[Any, ...]]:
        """The op that gives the effective weight, and its arguments; `operands` by their names."""
        target = graphs.IDENTITY.default if self.merged else graphs.ROTATED.default
        state = (operands[name] for name in STATE)
        order = () if self.merged else (self.order,)
        gains = tuple(map(operands.get, GAINS))
        gains = gains if any(gains) else ()
        return target, (stored, *state, self.block_in, self.block_out, *order, *gains)


class AdoptLinear(GraphPass[WeightSite]):
    """Plain linear of a model nobody prepared → linear over an orthogonal-equivalence weight.

    Before (W an input of the graph, a parameter)::

        y: [..., n] = linear(x, W, bias)

    After (four new inputs at the end: the state of W)::

        S: [n, m] = W.detach()
        w: [n, m] = poetx.orthogonal_equivalence(S, skew_in, skew_out, perm_in, perm_out, b, b', k)
        y: [..., n] = linear(x, w, bias)

    With ``merge_interval=1`` it is ``poetx.identity_equivalence`` (without k). Gains are the last
    arguments, where there are any.

    The same value (the rotations start at the identity); W gets no gradient, the skew parameters
    do. A weight that is read in several contexts (grad modes, autocast regions) is built in each.
    The state comes from outside (`create`) and is looked up by the identity of W at every call of
    the compiled code. Handles weights inside activation checkpoints, nested ones too: the new
    inputs are handed on as operands. Refuses a weight that is read where autograd records nothing
    (a teacher under ``no_grad``), one with any other reader (a tied embedding), one inside another
    higher-order op or a transform, and whatever `refuse` names (excluded, frozen, no weight of an
    `nn.Linear`).

    Args:
        refuse: (layer name, position of the weight among the inputs) → reason, or ``None``.
        create: slot → the state of its weight.
        gains: the names of the gains that a state has.
    """

    name = "adopt_linear"
    into_checkpoints = False  # it follows the weights into them by itself

    def __init__(
        self,
        refuse: Callable[[str, int], str | None],
        create: Callable[[Slot], StateSpec],
        gains: Sequence[str] = (),
    ):
        self.refuse = refuse
        self.create = create
        self.gains = tuple(gains)
        self.slots: list[Slot] = []
        self._sources: dict[Any, int] = {}
        self._perm_in: dict[int, fx.Node] = {}
        self._handed_on: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def sites(self, graph: fx.Graph) -> Iterable[WeightSite]:
        root = graph.owning_module
        assert root is not None
        placeholders = graph.find_nodes(op="placeholder")
        readers = _readers(root)
        found = []
        for index, placeholder in enumerate(placeholders):
            site = WeightSite(placeholder, index, [], [], [])
            _follow(root, placeholder, (), site)
            if site.others and not site.linears:
                site.hidden = readers.get(id(placeholder.meta.get(graphs.VALUE)), [])
            if site.linears or site.hidden:
                found.append(site)
        return found

    def describe(self, site: WeightSite) -> dict[str, Any]:
        shape = graphs.shape_of(site.placeholder)
        return {
            "layers": graphs.layers_of(site.linears or site.hidden),
            "shape": None if shape is None else (int(shape[0]), int(shape[1])),
        }

    def decide(self, site: WeightSite) -> str:
        if not site.linears:
            raise Refusal(
                f"the weight is read inside {', '.join(site.others)}: call poetx_compile.prepare "
                "before compiling"
            )
        if site.others:
            raise Refusal(f"the weight is read by {', '.join(site.others)} as well (tied?)")
        for linear in site.linears:
            if graphs.in_transform(linear):
                raise Refusal("inside a torch.func transform: call poetx_compile.prepare")
        if not any(self.contexts.of(linear).records for linear in site.linears):
            raise Refusal("read without gradients: nothing trains it here")
        if reason := self.refuse(site.layer, site.index):
            raise Refusal(reason)
        return "adopted"

    def apply(self, graph: fx.Graph, site: WeightSite) -> None:
        source = graphs.linear_arguments(site.linears[0])[0]
        siblings = self._sources.setdefault(source, len(self._sources))
        shared = self._perm_in.get(siblings)
        state = (*STATE, *self.gains)
        own = tuple(name for name in state if shared is None or name != "perm_in")
        slot = Slot(site.index, site.layer, siblings, own)
        spec = self.create(slot)
        self.slots.append(slot)
        inputs = {} if shared is None else {"perm_in": shared}
        for name in own:
            value = _fake(site.placeholder, spec.tensors[name])
            inputs[name] = _add_input(graph, f"{site.placeholder.name}{name}", value)
            inputs[name].meta[gradients.STANDS_FOR] = site.placeholder
        self._perm_in[siblings] = inputs["perm_in"]
        for use in site.uses:
            operands = {name: self._operand(use, inputs[name]) for name in state}
            body = use.module.graph
            built: dict[Context, fx.Node] = {}
            for linear in sorted(use.linears):
                context = self.contexts.of(linear)
                if context not in built:
                    with body.inserting_before(linear):
                        # Not in inference mode, where AOTAutograd cannot trace it.
                        detach = context.records
                        stored = body.call_method("detach", (use.weight,)) if detach else use.weight
                        weight = body.call_function(*spec.equivalence(stored, operands))
                    built[context] = graphs.inherit(weight, linear)
                linear.replace_input_with(use.weight, built[context])

    def _operand(self, use: Use, node: fx.Node) -> fx.Node:
        """`node` as seen inside the module of `use`: handed on to each checkpoint once."""
        for call, body in use.path:
            key = call, node
            if key not in self._handed_on:
                call.args = (*call.args, node)
                value = node.meta[graphs.VALUE]
                self._handed_on[key] = _add_input(body.graph, node.name, value)
            node = self._handed_on[key]
        return node


def _follow(module: fx.GraphModule, weight: fx.Node, path: Path, site: WeightSite) -> None:
    """Collect the linears that read `weight`, also inside activation checkpoints."""
    linears = []
    for user in weight.users:
        if graphs.is_linear(user) and graphs.linear_arguments(user)[1] is weight:
            x, _, bias = graphs.linear_arguments(user)
            if x is weight or bias is weight:
                site.others.append(user.name)
            else:
                linears.append(user)
        elif user.op == "call_function" and user.target is graphs.CHECKPOINT:
            _follow_operand(module, weight, user, path, site)
        else:
            site.others.append(getattr(user.target, "__name__", str(user.target)))
    if linears:
        site.uses.append(Use(module, weight, path, linears))


def _follow_operand(
    module: fx.GraphModule, weight: fx.Node, call: fx.Node, path: Path, site: WeightSite
) -> None:
    body_node, *operands = call.args
    assert isinstance(body_node, fx.Node)
    assert isinstance(body_node.target, str)
    body = getattr(module, body_node.target)
    calls = [
        u for n in module.graph.find_nodes(op="get_attr", target=body_node.target) for u in n.users
    ]
    if len(calls) > 1:
        site.others.append("a checkpointed function that is called more than once")
        return
    placeholders = body.graph.find_nodes(op="placeholder")
    for position, operand in enumerate(operands):
        if operand is weight:
            _follow(body, placeholders[position], (*path, (call, body)), site)


def _readers(root: fx.GraphModule) -> dict[int, list[fx.Node]]:
    """The linears of all bodies by the weight they read, told by the id of its fake value: Dynamo
    hands that on to the body of any higher-order op."""
    found = defaultdict(list)
    for module in graphs.nested(root):
        for node in module.graph.nodes:
            if graphs.is_linear(node):
                read = graphs.linear_arguments(node)[1]
                if isinstance(read, fx.Node):
                    found[id(read.meta.get(graphs.VALUE))].append(node)
    return found


def _add_input(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    """A new last placeholder, static for CUDA graphs as a parameter is."""
    node = graphs.add_input(graph, name, value)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return node


def _fake(like: fx.Node, tensor: Tensor) -> Tensor:
    mode = like.meta[graphs.VALUE].fake_mode
    return mode.from_tensor(tensor, static_shapes=True)
