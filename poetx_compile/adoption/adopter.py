"""Adoption for one compiled graph: which of its weights get layers, and which layers a call meets.

A backend cannot put parameters into the user's model while Dynamo is compiling it, and code that
Dynamo reuses for a second instance never calls the backend again. So the layer of an adopted weight
is in the registry, keyed by the weight itself; the compiled code looks it up at every call and
makes what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poetx_compile._torch import FakeTensor
from poetx_compile.adoption.awaiting import Awaiting, at_the_end_of_backward, is_awaiting
from poetx_compile.adoption.eligibility import EligibilityCheck, declined_for
from poetx_compile.config import POETXConfig, differing
from poetx_compile.distributed.wrappers import PREPARE_FIRST, active_ddp, user_name
from poetx_compile.errors import AdoptionError, ConfigError
from poetx_compile.layers.eligibility import HOOKED, ZEROS, is_all_zeros, name_refusal
from poetx_compile.layers.live_objects import LiveObjects
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.permutation import Permutation
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.layers.registry import registry
from poetx_compile.passes.adopt_linear import AdoptLinear, Slot, StateSpec

log = logging.getLogger("poetx_compile")

MANY_CALLS = 16
"""Calls without a backward after which a model is told to run its first pass over and over."""


class Adopter:
    """Adoption for one compiled graph: binds the pass to the registry and to the graph's inputs.

    Args:
        config: of the states.
        inputs: the graph's example inputs.
        settle: called with no argument at the end of a backward through the bound graph; without
            it the adoption is a dry run.
        states: where a dry run keeps the states that it makes.
        refuse: raise `AdoptionError` in place of adopting.
        provisional: the graph is compiled cheaply, because it is compiled again once settled.
    """

    def __init__(
        self,
        config: POETXConfig,
        inputs: Sequence[Any],
        settle: Callable[[], None] | None = None,
        states: Any = None,
        refuse: bool = False,
        provisional: bool = False,
    ):
        self.config, self.inputs, self.settle = config, inputs, settle
        self.refuse, self.provisional = refuse, provisional
        self.states = registry.adopted if states is None else states
        self.check: EligibilityCheck | None = None
        self.left: list[tuple[int, str]] = []
        self.zeros: list[tuple[int, str]] = []
        self.permutations: dict[int, Permutation] = {}
        gains = [f"gain_{side}" for side in config.gained_sides]
        self.graph_pass = AdoptLinear(self._refuse, self._create, gains)

    def _refuse(self, layer: str, index: int) -> str | None:
        weight = self.inputs[index]
        if not isinstance(weight, nn.Parameter):
            return "the weight is not a parameter"
        if isinstance(weight, FakeTensor):
            return self._refuse_split(layer)
        self.check = self.check or EligibilityCheck(self.config)
        reason = self.check(weight).reason
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
        if self.config.initialises:
            raise AdoptionError(
                "init and init_scale change the weights, and a model is not changed while it is "
                "compiled: call poetx_compile.prepare(model, config) first"
            )
        if self.config.base != "dense":
            raise AdoptionError(
                f"base={self.config.base!r} changes the weights, and a model is not changed while "
                "it is compiled: call poetx_compile.prepare(model, config) first"
            )
        state = self._state(slot, self.inputs[slot.index], self.permutations)
        blocks = state.block_in, state.block_out
        return StateSpec(_tensors(state), *blocks, state.order, state.merged)

    def _state(
        self, slot: Slot, weight: nn.Parameter, permutations: dict[int, Permutation]
    ) -> OrthogonalEquivalence:
        state = self.states.get(weight)
        if state is None:
            state = _new_state(slot, weight, self.config, permutations)
            if self.states is registry.adopted:
                registry.adopt(weight, state)
            else:
                self.states[weight] = state
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
        # Neither inputs nor graphs nor modules are kept alive.
        self.inputs, self.permutations, self.check = (), {}, None
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
                    if (reason := declined_for(weight)) is not None:
                        raise reused(slot.layer, reason)
                    state = self._state(slot, weight, permutations)
                tensors = _tensors(state)
                extra += [tensors[name] for name in slot.tensors]
            out = compiled(*inputs, *extra)
            if settle is not None and slots:
                awaiting = {args[slot.index]: Awaiting(slot.layer, True, config) for slot in slots}
                awaiting |= {args[index]: Awaiting(layer, False, config) for index, layer in left}
                at_the_end_of_backward(out, awaiting, settle)
                calls += 1
                if calls == MANY_CALLS and any(is_awaiting(args[slot.index]) for slot in slots):
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
    known = {id(weight) for weight, _ in registry.declined_weights()}
    if not (new := [weight for weight in weights if id(weight) not in known]):
        return
    live = LiveObjects()
    for weight in new:
        if not is_all_zeros(weight):
            raise reused_dense(weights[weight])
        for module in live.owners(weight):
            registry.decline(module, ZEROS)


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


def _tensors(state: OrthogonalEquivalence) -> dict[str, Tensor]:
    return {
        "skew_in": state.skew_in,
        "skew_out": state.skew_out,
        "perm_in": state.perm_in.pair,
        "perm_out": state.perm_out.pair,
        **state.gains,
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
