"""State of weights that nobody prepared: found by the weight's identity when compiled code runs.

A backend cannot put parameters into the user's model, and code that Dynamo reuses for a second
instance never calls it again. So an adopted weight's state is an `OrthogonalEquivalence` in a
registry keyed by the weight itself; the compiled code looks it up at every call and creates what is
missing. `prepare` (and with it every optimiser of this package) moves the states into the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from poetx_compile.config import POETXConfig
from poetx_compile.eligibility import name_refusal, weight_refusal
from poetx_compile.errors import AdoptionError, ConfigError, UnownedRotationsError
from poetx_compile.options import differing
from poetx_compile.parametrization import OrthogonalEquivalence
from poetx_compile.passes.adopt_linear import AdoptLinear, Slot, StateSpec
from poetx_compile.permutation import Permutation

log = logging.getLogger("poetx_compile")

_states: Any = WeakTensorKeyDictionary()
_declined: Any = WeakTensorKeyDictionary()
_next_group = 0


def adopted_state(weight: Tensor) -> OrthogonalEquivalence | None:
    """The state of an adopted weight, or ``None``."""
    return _states.get(weight)


def release(weight: Tensor) -> OrthogonalEquivalence | None:
    """Take a weight's state out of the registry (into the model, or to drop it)."""
    return _states.pop(weight, None)


def decline(weight: Tensor, reason: str) -> None:
    """Note that `prepare` left this weight alone: compiled graphs must not adopt it."""
    _declined[weight] = reason


class Adopter:
    """Adoption for one compiled graph: binds the pass to the registry and to the graph's inputs."""

    def __init__(self, config: POETXConfig, example_inputs: Sequence[Any], states: Any = None):
        self.config = config
        self.states = _states if states is None else states
        self.inputs = example_inputs
        self.permutations: dict[int, Permutation] = {}
        self.graph_pass = AdoptLinear(self._refuse, self._create)

    def _refuse(self, layer: str, index: int) -> str | None:
        weight = self.inputs[index]
        if not isinstance(weight, nn.Parameter):
            return "the weight is not a parameter"
        if (reason := _declined.get(weight)) is not None:
            return reason
        return name_refusal([layer], self.config) or weight_refusal(weight)

    def _create(self, slot: Slot) -> StateSpec:
        _check_process_group(slot.layer, self.inputs[slot.index])
        state = self._state(slot, self.inputs[slot.index], self.permutations)
        tensors = _tensors(state)
        return StateSpec(tensors, state.block_in, state.block_out, state.order)

    def _state(
        self, slot: Slot, weight: nn.Parameter, permutations: dict[int, Permutation]
    ) -> OrthogonalEquivalence:
        state = self.states.get(weight)
        if state is None:
            state = self.states[weight] = _new_state(slot, weight, self.config, permutations)
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
        slots, states, config = self.graph_pass.slots, self.states, self.config
        self.inputs, self.permutations = (), {}  # neither inputs nor graphs are kept alive
        del self.graph_pass

        def run(*args: Any) -> Any:
            extra: list[Tensor] = []
            permutations: dict[int, Permutation] = {}
            for slot in slots:
                weight = args[slot.index]
                state = states.get(weight)
                if (
                    state is None
                    or state.skew_in.device != weight.device
                    or state.config is not config
                ):
                    if (reason := _declined.get(weight)) is not None:
                        raise AdoptionError(
                            f"compiled code of {slot.layer} was reused for a weight that prepare "
                            f"left alone ({reason}): call poetx_compile.prepare on every instance "
                            "before compiling, or torch._dynamo.reset() after it"
                        )
                    state = self._state(slot, weight, permutations)
                tensors = _tensors(state)
                extra += [tensors[name] for name in slot.tensors]
            return compiled(*args, *extra)

        return run


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

    Slots that read one tensor share an input permutation. The first merge draws real ones.
    """
    with torch.no_grad():
        if slot.siblings not in permutations:
            permutations[slot.siblings] = _identity(weight.shape[1], weight, config)
        perm_out = _identity(weight.shape[0], weight, config)
        state = OrthogonalEquivalence(weight, config, permutations[slot.siblings], perm_out)
    _watch_optimisers()
    return state


def _identity(size: int, weight: Tensor, config: POETXConfig) -> Permutation:
    global _next_group
    group, _next_group = _next_group, _next_group + 1
    return Permutation(
        size,
        group,
        seed=config.seed,
        draw=0,
        kind=config.permutation,
        block=config.smallest_block,
        device=weight.device,
    )


def _check_process_group(layer: str, weight: Tensor) -> None:
    from torch.distributed import is_available

    if not is_available():
        return
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    wrapper = None
    if isinstance(weight, DTensor):
        wrapper = "FSDP2 or tensor parallelism"
    elif DistributedDataParallel._get_active_ddp_module() is not None:
        wrapper = "DistributedDataParallel"
    if wrapper is not None:
        raise AdoptionError(
            f"{layer} was not prepared and runs under {wrapper}, which would not see rotations "
            "that the compiler adds: call poetx_compile.prepare(model) before wrapping the model"
        )


_unowned_steps = 0
_last_seen: Any = WeakTensorKeyDictionary()  # skew parameter → its gradient at the last step
_watching = False


def _watch_optimisers() -> None:
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_after_any_step)
        _watching = True


def _after_any_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise when rotations got gradients before two optimiser steps and nobody updates them.

    A gradient counts once: one that is left over from an earlier backward (of another model, or
    because two optimisers step after each backward) says nothing new.
    """
    global _unowned_steps
    states = list(_states.values())
    skews = {p: s for s in states for p in (s.skew_in, s.skew_out) if p.grad is not None}
    fresh = [p for p in skews if _last_seen.get(p) != (id(p.grad), p.grad._version)]
    for p in fresh:
        _last_seen[p] = (id(p.grad), p.grad._version)
    if not skews:
        _unowned_steps = 0
    elif fresh:
        _unowned_steps += 1
    if _unowned_steps >= 2:
        _unowned_steps = 0
        weights = len({id(state) for state in skews.values()})
        raise UnownedRotationsError(
            f"the rotations of {weights} adopted weight(s) had gradients at "
            f"two steps of {type(optimizer).__name__}, but no optimiser updates them, and their "
            "dense weights are frozen: the model does not train. Build "
            "poetx_compile.POETXAdamW(model) or POETXMuon(model) instead, or call "
            "poetx_compile.prepare(model) first and give poetx_compile.param_groups(model, lr=...) "
            "to your optimiser"
        )
