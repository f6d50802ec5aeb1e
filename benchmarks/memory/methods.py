"""A model made ready to train as a `Case` says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from benchmarks.memory.cases import IN_BACKWARD, POETX, Case
from benchmarks.quality.baselines import muon
from llama import PRESETS, Llama, LlamaConfig
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.optim.merge import merge

VOCABULARY = 32000

RATES = {"adamw": 1e-4, "adamw8bit": 1e-4, "muon": 1e-4, "adafactor": 1e-3}
"""Small, so that a few steps on one batch lower its loss; rotations take their default of it."""


class MissingError(RuntimeError):
    """A rival's library is not installed."""


@dataclasses.dataclass
class Trained:
    """A model with what trains it.

    Attributes:
        model: the plain module, which owns the parameters.
        forward: ``forward(tokens, targets)`` is the loss.
        step: of the optimiser, gradients freed behind it.
        optimizers: for their states.
        merge: does one merge; ``None`` where nothing merges by itself.
    """

    model: Llama
    forward: Callable[[Tensor, Tensor], Tensor]
    step: Callable[[], None]
    optimizers: list[torch.optim.Optimizer]
    merge: Callable[[], Any] | None = None

    def states(self) -> list[Tensor]:
        """The tensors of all states."""
        values = [s for o in self.optimizers for state in o.state.values() for s in state.values()]
        return [value for value in values if isinstance(value, Tensor)]


def untrained(case: Case, vocabulary: int = VOCABULARY, layers: int | None = None) -> Llama:
    """The plain model, made in its dtype on the current default device; with fewer `layers`."""
    shapes = PRESETS[case.model] | ({} if layers is None else {"num_layers": layers})
    config = LlamaConfig(**shapes, vocab_size=vocabulary, max_seq_len=case.seq)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, case.weights))
    try:
        return Llama(
            config, activation_checkpointing=case.checkpointing, loss_chunk=case.loss_chunk
        )
    finally:
        torch.set_default_dtype(before)


def poetx_config(case: Case) -> poetx.POETXConfig:
    """That of a case of POET-X."""
    assert case.block_size is not None
    assert case.variant is not None
    assert case.base is not None
    return poetx.POETXConfig(
        block_size=case.block_size,
        variant=case.variant,
        memory_budget=case.memory_budget,
        # Merges are timed by themselves, but where each step is one.
        merge_interval=1 if case.merged else 10**9,
        redraw_interval=None,
        base=case.base,
    )


def build(case: Case, model: Llama, stage: str) -> Trained:
    """Prepare, compile, and make the optimiser.

    Raises:
        MissingError: the library of a rival is not installed.
    """
    if case.method == POETX:
        return _poetx(case, model, stage)
    forward = _forward(case, model, stage)
    make = functools.partial(_optimizer, case.optimizer)
    if case.method == IN_BACKWARD:
        return Trained(model, forward, lambda: None, _in_backward(model, make))
    if case.optimizer == "muon":
        pair = muon.optimizer(model, lr=RATES["muon"], weight_decay=0.1)
        return Trained(model, forward, _stepping(pair), list(pair.parts))
    optimizer = make(model.parameters())
    return Trained(model, forward, _stepping(optimizer), [optimizer])


def _poetx(case: Case, model: Llama, stage: str) -> Trained:
    poetx.prepare(model, poetx_config(case))
    if case.gradients != "float32":
        for _, _, equivalence in prepared_linears(model):
            for skew in equivalence.skews:
                skew.grad_dtype = getattr(torch, str(case.gradients))
    lr = RATES[case.optimizer]
    optimizer: torch.optim.Optimizer
    if case.optimizer == "muon":
        optimizer = poetx.POETXMuon(
            model, lr=lr, momentum_dtype=case.momentum or "float32", turn_every=case.turn_every
        )
    else:
        optimizer = poetx.POETXAdamW(model, lr=lr)
    forward = _forward(case, model, poetx.poetx_backend, {"stage": stage})
    merging = None if case.merged else functools.partial(merge, model, redraw=True)
    return Trained(model, forward, _stepping(optimizer), [optimizer], merging)


def _forward(
    case: Case, model: Llama, backend: Any, options: dict[str, Any] | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """What gives the loss, compiled; fp32 weights run under bf16 autocast."""
    compiling: dict[str, Any] = {"backend": backend, "options": options}
    if case.compile == "graphs":
        compiling["options"] = (options or {}) | {"triton.cudagraphs": True}
    if case.compile == "whole":
        forward: Callable[[Tensor, Tensor], Tensor] = torch.compile(
            model, dynamic=False, **compiling
        )
    else:
        for block in model.layers:
            block.compile(dynamic=False, **compiling)
        model.loss = torch.compile(model.loss, dynamic=False, **compiling)  # type: ignore[method-assign]
        forward = model
    if case.weights == "bfloat16":
        return forward

    def in_autocast(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            return forward(tokens, targets)

    return in_autocast


def _stepping(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _in_backward(
    model: nn.Module, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> list[torch.optim.Optimizer]:
    """An optimiser for each weight, which steps and frees the gradient as soon as that is there
    (https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html)."""
    optimizers = {parameter: make([parameter]) for parameter in model.parameters()}

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad(set_to_none=True)  # type: ignore[index]

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)
    return list(optimizers.values())


def _optimizer(name: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    lr = RATES[name]
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, lr=lr)
    if name == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise MissingError(f"install torchao for this rival ({error})") from error
        return AdamW8bit(list(parameters), lr=lr, betas=(0.9, 0.95))
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), fused=True)
