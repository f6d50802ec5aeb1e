"""State of weights that nobody prepared: found by the weight's identity when compiled code runs.

A backend cannot put parameters into the user's model while Dynamo is compiling it, and code that
Dynamo reuses for a second instance never calls the backend again. So an adopted weight's state is
an `OrthogonalEquivalence` in a registry keyed by the weight itself; the compiled code looks it up
at every call and creates what is missing. At the end of the first backward `settling` moves the
states into the modules that own the weights; `prepare`, where it is called before, does the same.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from poetx_compile import ownership
from poetx_compile.census import Census, hidden
from poetx_compile.config import POETXConfig
from poetx_compile.eligibility import (
    HOOKED,
    ZEROS,
    check_targets,
    is_all_zeros,
    linears,
    name_refusal,
    refusals,
)
from poetx_compile.errors import AdoptionError, ConfigError
from poetx_compile.options import differing
from poetx_compile.parametrization import OrthogonalEquivalence, prepared_linears
from poetx_compile.passes.adopt_linear import AdoptLinear, Slot, StateSpec
from poetx_compile.permutation import Permutation
from poetx_compile.shards import is_sharded
from poetx_compile.wrappers import PREPARE_FIRST, active_ddp, user_name, wrapper_name

log = logging.getLogger("poetx_compile")

MANY_CALLS = 16
"""Calls without a backward after which a model is told to run its first pass over and over."""

_states: Any = WeakTensorKeyDictionary()  # weight → state, until the state is in a module
_bound: WeakSet[OrthogonalEquivalence] = WeakSet()  # states that compiled code looked for
_declined: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # why prepare left it alone
_ripe: Any = WeakTensorKeyDictionary()  # weight → what a backward that went through it tells


def adopted_state(weight: Tensor) -> OrthogonalEquivalence | None:
    """The state of an adopted weight that is not in its module yet, or ``None``."""
    return _states.get(weight)


def release(weight: Tensor) -> OrthogonalEquivalence | None:
    """Take a weight's state out of the registry (into the model, or to drop it)."""
    return _states.pop(weight, None)


def bound(equivalence: OrthogonalEquivalence) -> bool:
    """Whether there is compiled code that adopts the weight of this state, and would again."""
    return equivalence in _bound


def decline(module: nn.Module, reason: str) -> None:
    """Note that `prepare` left this linear alone: compiled graphs must not adopt its weight."""
    _declined[module] = reason


def _declined_for(weight: Tensor) -> str | None:
    """Why `prepare` left the linear alone that has this weight."""
    modules = _declined.items()  # no dictionary by weights: torch cannot swap a referenced tensor
    return next((why for m, why in modules if m._parameters.get("weight") is weight), None)


def declined(module: nn.Module) -> str | None:
    """Why compiled graphs must not adopt the weight of a linear, or ``None``."""
    return _declined.get(module)


class Ripe(NamedTuple):
    """A weight of a graph whose backward is over: its layer, whether the graph adopts it, how."""

    layer: str
    adopted: bool
    config: POETXConfig


def harvest() -> dict[Tensor, Ripe]:
    """The weights of the graphs that backwards went through since the last time."""
    ripe = dict(_ripe.items())
    _ripe.clear()
    return ripe


class Place(NamedTuple):
    """Where a weight belongs: the outermost model, the linear's name in it, and the linear."""

    root: nn.Module
    name: str
    module: nn.Linear


class Verdict(NamedTuple):
    """Whether a weight may be adopted: ``reason`` is ``None`` if so, and ``place`` then known."""

    reason: str | None
    place: Place | None = None


class Judge:
    """Says of a weight what `prepare` would say of it, called on the outermost model around it.

    Args:
        config: names and exclusions.
        census: taken here by default.
    """

    def __init__(self, config: POETXConfig, census: Census | None = None):
        self.config = config
        self.census = census or Census()
        self._roots: dict[int, dict[int, tuple[str, str | None]]] = {}

    def __call__(self, weight: Tensor) -> Verdict:
        if (reason := _declined_for(weight)) is not None:
            return Verdict(reason)
        owners = self.census.owners(weight)
        if len(owners) > 1:  # one of them may be garbage that nobody has collected yet
            gc.collect()
            self.census, self._roots = Census(), {}
            owners = self.census.owners(weight)
        if not owners and hidden():
            raise AdoptionError(
                "the module that owns a weight cannot be found, because gc.freeze() hides it: call "
                "poetx_compile.prepare(model), or freeze after the first step"
            )
        if not owners:
            return Verdict("no module owns the weight")
        if len(owners) > 1:
            kinds = ", ".join(type(owner).__name__ for owner in owners)
            return Verdict(f"tied: the weight belongs to several modules ({kinds})")
        (module,) = owners
        if not isinstance(module, nn.Linear):
            return Verdict(f"the weight belongs to {type(module).__name__}, which is no nn.Linear")
        root = self.census.root(module)
        name, reason = self._verdicts(root)[id(module)]
        if reason is None or is_sharded(weight):
            self._check_wrappers(name, module, weight)
        return Verdict(reason, Place(root, name, module))

    def _verdicts(self, root: nn.Module) -> dict[int, tuple[str, str | None]]:
        """id(linear) → its first name in `root`, and the reason why it is left alone."""
        if id(root) not in self._roots:
            found = linears(root)
            check_targets(list(found), self.config)
            reasons = refusals(root, self.config)
            if any(not e.adopted for _, _, e in prepared_linears(root)):
                other = "the model was prepared, and this layer was not"
                reasons = {name: reason or other for name, reason in reasons.items()}
            verdicts: dict[int, tuple[str, str | None]] = {}
            for name, module in found.items():
                verdicts.setdefault(id(module), (name or "(root)", reasons[name]))
            self._roots[id(root)] = verdicts
        return self._roots[id(root)]

    def _check_wrappers(self, name: str, module: nn.Module, weight: Tensor) -> None:
        wrapper = "tensor parallelism" if is_sharded(weight) else None
        for outer in self.census.above(module):
            wrapper = wrapper_name(outer) or wrapper
        if wrapper is not None:
            raise AdoptionError(
                f"{name} was not prepared and is under {wrapper}, which would not see "
                f"rotations that the compiler adds: {PREPARE_FIRST}"
            )


class Adopter:
    """Adoption for one compiled graph: binds the pass to the registry and to the graph's inputs.

    Args:
        config: of the states.
        inputs: the graph's example inputs.
        states: where states live; default the registry of the process.
        settle: called with no argument at the end of a backward through the bound graph.
        refuse: raise `AdoptionError` in place of adopting.
        provisional: the graph is compiled cheaply, because it is compiled again once settled.
    """

    def __init__(
        self,
        config: POETXConfig,
        inputs: Sequence[Any],
        states: Any = None,
        settle: Callable[[], None] | None = None,
        refuse: bool = False,
        provisional: bool = False,
    ):
        self.config, self.inputs, self.settle = config, inputs, settle
        self.refuse, self.provisional = refuse, provisional
        self.states = _states if states is None else states
        self.judge: Judge | None = None
        self.left: list[tuple[int, str]] = []
        self.zeros: list[tuple[int, str]] = []
        self.permutations: dict[int, Permutation] = {}
        self.graph_pass = AdoptLinear(self._refuse, self._create)

    def _refuse(self, layer: str, index: int) -> str | None:
        weight = self.inputs[index]
        if not isinstance(weight, nn.Parameter):
            return "the weight is not a parameter"
        if isinstance(weight, FakeTensor):
            return self._refuse_split(layer)
        self.judge = self.judge or Judge(self.config)
        reason = self.judge(weight).reason
        if reason == HOOKED:  # prepare reports it; here nobody would hear of it
            raise AdoptionError(
                f"the weight of {user_name(layer)} {HOOKED}: step an optimiser after the backward, "
                "name the layer in exclude_modules, or remove the hook"
            )
        if reason is not None:
            self.left.append((index, layer))
        if reason == ZEROS:
            self.zeros.append((index, layer))
        return reason

    def _refuse_split(self, layer: str) -> str:
        """Of a weight that is not there yet: DDP's graph splitting compiles with fake tensors."""
        ddp = active_ddp()
        if reason := name_refusal([layer], self.config):
            return reason
        if ddp is not None and not any(True for _ in prepared_linears(ddp)):
            raise AdoptionError(
                f"{user_name(layer)} was not prepared and is under DistributedDataParallel, which "
                f"would not see rotations that the compiler adds: {PREPARE_FIRST}"
            )
        return "the model was prepared, and this layer was not"

    def _create(self, slot: Slot) -> StateSpec:
        if self.refuse:
            raise AdoptionError(
                f"nobody prepared the model ({slot.layer} is a plain nn.Linear), and the option "
                "unprepared='refuse' of poetx_backend keeps it from being adopted: call "
                "poetx_compile.prepare(model) first"
            )
        if self.config.normalize_rows:
            raise AdoptionError(
                "normalize_rows changes the weights, and a model is not changed while it is "
                "compiled: call poetx_compile.prepare(model, config) first"
            )
        state = self._state(slot, self.inputs[slot.index], self.permutations)
        return StateSpec(_tensors(state), state.block_in, state.block_out, state.order)

    def _state(
        self, slot: Slot, weight: nn.Parameter, permutations: dict[int, Permutation]
    ) -> OrthogonalEquivalence:
        state = self.states.get(weight)
        if state is None:
            state = self.states[weight] = _new_state(slot, weight, self.config, permutations)
            if self.states is _states:
                _bound.add(state)
            return state
        if changed := differing(state.config, self.config):
            before, asked = state.config.to_dict(), self.config.to_dict()
            shown = ", ".join(f"{k}: {before[k]!r} then, {asked[k]!r} here" for k in changed)
            raise ConfigError(
                f"{slot.layer} was adopted by an earlier torch.compile with other options of "
                f"poetx_backend ({shown}): give the same options here, or call "
                "poetx_compile.prepare(model, config) before compiling"
            )
        if state.skew_in.device != weight.device:
            state.to(weight.device)
        return state

    def extra_inputs(self) -> list[Tensor]:
        """The tensors of the adopted states, in the order of the graph's new inputs."""
        return [
            _tensors(self.states[self.inputs[slot.index]])[name]
            for slot in self.graph_pass.slots
            for name in slot.tensors
        ]

    def bind(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled` with the states of its weights looked up at each call."""
        slots, left, states, config = self.graph_pass.slots, self.left, self.states, self.config
        zeros = self.zeros if self.settle is not None else []
        settle = self.settle
        if settle is not None and slots:
            ownership.watch()
        # Neither inputs nor graphs nor modules are kept alive.
        self.inputs, self.permutations, self.judge = (), {}, None
        del self.graph_pass
        calls = 0

        def run(*args: Any) -> Any:
            nonlocal calls
            extra: list[Tensor] = []
            permutations: dict[int, Permutation] = {}
            inputs = list(args)
            if zeros:
                _keep_dense({args[index]: layer for index, layer in zeros})
            for slot in slots:
                weight = args[slot.index]
                inputs[slot.index] = weight.detach()  # its hooks would be called with None
                state = states.get(weight)
                if (
                    state is None
                    or state.skew_in.device != weight.device
                    or state.config is not config
                ):
                    if (reason := _declined_for(weight)) is not None:
                        raise reused(slot.layer, reason)
                    state = self._state(slot, weight, permutations)
                tensors = _tensors(state)
                extra += [tensors[name] for name in slot.tensors]
            out = compiled(*inputs, *extra)
            if settle is not None and slots:
                ripe = {args[slot.index]: Ripe(slot.layer, True, config) for slot in slots}
                ripe |= {args[index]: Ripe(layer, False, config) for index, layer in left}
                _at_the_end_of_backward(out, ripe, settle)
                calls += 1
                if calls == MANY_CALLS and any(args[slot.index] in _ripe for slot in slots):
                    log.warning(
                        "a model that nobody prepared has been called %d times, and its rotations "
                        "wait for the step of a torch optimiser: nothing trains until then. "
                        "Compiled autograd tells of no end of a backward: call "
                        "poetx_compile.prepare(model) first",
                        calls,
                    )
                elif calls == MANY_CALLS and self.provisional:
                    log.warning(
                        "a model that nobody prepared has been called %d times without a backward: "
                        "until the first one it runs unfused. Evaluate under torch.no_grad(), or "
                        "call poetx_compile.prepare(model) first.",
                        calls,
                    )
            return out

        return run


def _keep_dense(weights: dict[Tensor, str]) -> None:
    """Weights that were all zeros when their code was compiled train densely, and go on so when
    they are none any more; the code may have been made for another instance."""
    known = {id(module._parameters.get("weight")) for module in _declined}
    if not (new := [weight for weight in weights if id(weight) not in known]):
        return
    census = Census()
    for weight in new:
        if not is_all_zeros(weight):
            raise reused_dense(weights[weight])
        for module in census.owners(weight):
            decline(module, ZEROS)


def reused_dense(layer: str) -> AdoptionError:
    """Code of a layer that was left alone meets a weight that is to be adopted."""
    return AdoptionError(
        f"compiled code of {layer}, which is left alone, was reused for a layer that is not: call "
        "poetx_compile.prepare on the whole model before compiling"
    )


def reused(layer: str, reason: str) -> AdoptionError:
    """Code of a layer that was adopted meets a weight that must be left alone."""
    return AdoptionError(
        f"compiled code of {layer} was reused for a weight that has to be left alone ({reason}): "
        "call poetx_compile.prepare on every instance before compiling, or torch._dynamo.reset() "
        "after it"
    )


def _at_the_end_of_backward(
    outputs: Iterable[Any], ripe: dict[Tensor, Ripe], settle: Callable[[], None]
) -> None:
    """Call `settle` when a backward that passes through one of `outputs` is over.

    Not earlier: checkpointed code that the same backward runs again must find what it found before.
    """

    @torch.compiler.disable
    def queue(_: Tensor) -> None:
        _ripe.update(ripe)
        torch.autograd.Variable._execution_engine.queue_callback(settle)

    for output in outputs:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(queue)


def _tensors(state: OrthogonalEquivalence) -> dict[str, Tensor]:
    return {
        "skew_in": state.skew_in,
        "skew_out": state.skew_out,
        "perm_in": state.perm_in.pair,
        "perm_out": state.perm_out.pair,
    }


def _new_state(
    slot: Slot, weight: nn.Parameter, config: POETXConfig, permutations: dict[int, Permutation]
) -> OrthogonalEquivalence:
    """A state at the identity, under identity permutations: the weight stays as the user sees it.

    Slots that read one tensor share an input permutation. These permutations serve until the state
    is moved into its module, where it gets those of the model.
    """
    with torch.no_grad():
        if slot.siblings not in permutations:
            permutations[slot.siblings] = _identity(weight.shape[1], weight, config)
        perm_out = _identity(weight.shape[0], weight, config)
        state = OrthogonalEquivalence(weight, config, permutations[slot.siblings], perm_out)
    state.adopted = True
    return state


def _identity(size: int, weight: Tensor, config: POETXConfig) -> Permutation:
    return Permutation(
        size,
        group=0,
        seed=config.seed,
        draw=0,
        kind=config.permutation,
        block=config.smallest_block,
        device=weight.device,
    )
