"""What trains densely although its model went to the compiler: told once for each optimiser.

A backend is given graphs. What Dynamo runs outside of them (a frame that it skips, a graph break in
a loop), and what a graph reads inside of `torch.cond`, is trained by autograd as ever,
and nobody would hear of it. So after the first step of an optimiser its gradients are looked at.
"""

from __future__ import annotations

import gc
import inspect
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from poetx_compile._torch import OptimizedModule, innermost_backend
from poetx_compile.compile.backend import poetx_backend
from poetx_compile.compile.options import BackendOptions
from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError
from poetx_compile.layers.eligibility import ZEROS, linears, refusals, user_name
from poetx_compile.layers.live_objects import LiveObjects
from poetx_compile.layers.prepared import equivalence_of, prepared_linears
from poetx_compile.layers.registry import registry
from poetx_compile.layers.tables import compact
from poetx_compile.optim.hooks import After, step_hooks
from poetx_compile.optim.ownership import enrolled, prepared_by_hand

log = logging.getLogger("poetx_compile")

_told: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _after_step(optimizer: Optimizer) -> None:
    if optimizer in _told:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.grad is not None for p in parameters):
        _told.add(optimizer)
        if len(parameters) > 1:  # else one of many, an optimiser for each parameter
            _tell(optimizer, {p for p in parameters if p.dim() == 2 and p.grad is not None})


def _tell(optimizer: Optimizer, held: set[torch.Tensor]) -> None:
    """Name the linears among `held` weights that `prepare` would train by rotations."""
    if not held or prepared_by_hand(optimizer):  # the report has said it
        return
    if not _compiles() and not any(e.adopted for _, e in enrolled()):
        return
    zeros: list[str] = []
    live = LiveObjects()
    for scope, config in _compiled(live):
        root = live.root(scope)
        if any(not e.adopted for _, _, e in prepared_linears(root)):
            continue
        inside = {id(m) for m in scope.modules()}
        found = {n: m for n, m in linears(root).items() if id(m) in inside}
        plain = {n: m for n, m in found.items() if equivalence_of(m) is None and m.weight in held}
        reasons = refusals(root, config)
        reasons |= {n: why for n, m in plain.items() if (why := registry.declined(m)) is not None}
        zeros += [user_name(n) for n in plain if reasons[n] == ZEROS]
        if dense := [user_name(n) for n in plain if reasons[n] is None]:
            log.warning(
                "%d of %d nn.Linear of %s train densely: %s. Dynamo ran them outside of its graphs "
                "(a frame that it skips, a graph break in a loop, before torch 2.15 nn.LSTM; "
                "TORCH_LOGS=graph_breaks tells), or inside of torch.cond or map. Call "
                "poetx_compile.prepare(model) before compiling: its rotations train everywhere",
                len(dense),
                len(found),
                type(root).__name__,
                ", ".join(compact(dense)),
            )
    if zeros:
        log.info("%s: %s", ", ".join(compact(zeros)), ZEROS)


def _compiles() -> bool:
    """Whether anything alive was given to our backend: a third of the time of `LiveObjects`."""
    holders = gc.get_referrers(poetx_backend)
    # An object holds its attributes itself, or by a dictionary.
    attributes = (h if type(h) is dict else getattr(h, "__dict__", {}) for h in holders)
    return any(held.get("compiler_fn") is poetx_backend for held in attributes)


def _compiled(live: LiveObjects) -> Iterator[tuple[nn.Module, POETXConfig]]:
    """The outermost modules that were compiled by our backend, or of which parts were adopted."""
    scopes: dict[int, tuple[nn.Module, POETXConfig]] = {}
    for module in live.modules:
        if (config := _given(module)) is not None:
            plain = getattr(module, "_orig_mod", module)
            scopes[id(plain)] = plain, config
    below = {id(m) for scope, _ in scopes.values() for m in scope.modules() if m is not scope}
    for module, e in enrolled():
        if e.adopted and id(module) not in below and id(module) not in scopes:
            root = live.root(module)  # of a function that was compiled
            scopes[id(root)] = root, e.config
            below |= {id(m) for m in root.modules() if m is not root}
    yield from (scope for key, scope in scopes.items() if key not in below)


def _given(module: nn.Module) -> POETXConfig | None:
    """The configuration that a module was given to our backend with, or ``None``."""
    call = vars(module).get("_compiled_call_impl")
    if isinstance(module, OptimizedModule):
        callback = getattr(module.dynamo_ctx, "callback", None)
    elif inspect.isfunction(call):
        callback = inspect.getclosurevars(call).nonlocals.get("callback")
    else:
        return None
    wrapper: Any = innermost_backend(callback)  # type: ignore[arg-type]
    if getattr(wrapper, "compiler_fn", None) is not poetx_backend:
        return None
    given = wrapper.kwargs
    try:
        options = BackendOptions.parse(given.get("mode"), given.get("options"))
    except ConfigError:  # raised where that module is called, not by somebody else's step
        return None
    return POETXConfig.from_dict(options.config)


step_hooks.after(After.DENSE, _after_step)
