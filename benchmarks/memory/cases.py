"""What is measured: a model, a sequence length, and a way to train."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.rows import Row

DENSE, IN_BACKWARD, POETX = "dense", "in-backward", "poetx"

GIVES_UP = "accumulation, clipping, DDP"
"""What a step inside the backward gives up: there is never a whole gradient to add to, to take the
norm of, or to reduce."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row; its fields are the row's.

    Args:
        model: shapes of `examples/llama.py`.
        seq: tokens, in a batch of one sequence.
        method: ``"dense"``, ``"in-backward"`` (dense, each weight updated in the backward, as soon
            as it has its gradient), or ``"poetx"``.
        optimizer: ``"adamw"`` or ``"muon"`` of either; ``"adamw8bit"`` (torchao), ``"adafactor"``.
        weights: dtype of the weights; ``"float32"`` runs under bf16 autocast.
        block_size, merge_interval, variant, memory_budget, base: of `POETXConfig`.
        momentum: `momentum_dtype` of `POETXMuon`.
        turn_every: of `POETXMuon`.
        gradients: dtype of the gradients of rotations (`Tensor.grad_dtype`).
        checkpointing: activation checkpointing of each decoder block.
        loss_chunk: tokens whose logits are made at a time; ``None`` for all.
        compile: ``"blocks"`` compiles decoder blocks and loss by themselves, as torchtitan does, so
            that the first step takes seconds; ``"graphs"`` replays them as CUDA graphs; ``"whole"``
            compiles the model as one.
    """

    model: str
    seq: int
    method: str
    optimizer: str
    weights: str = "bfloat16"
    block_size: int | None = None
    merge_interval: int | None = None
    variant: str | None = None
    memory_budget: float | None = None
    base: str | None = None
    momentum: str | None = None
    turn_every: int = 1
    gradients: str | None = None
    checkpointing: bool = False
    loss_chunk: int | None = None
    compile: str = "blocks"

    @property
    def merged(self) -> bool:
        return self.merge_interval == 1

    def key(self) -> tuple[Any, ...]:
        """What tells rows of one GPU apart."""
        return dataclasses.astuple(self)


def compiled_alike(case: Case) -> tuple[Any, ...]:
    """What is one for cases that run the same compiled code: of an optimiser's step, torchao's."""
    ours = case.method == POETX
    form = (case.merged, case.block_size, case.variant, case.memory_budget, case.base)
    step = case.optimizer if case.optimizer == "adamw8bit" else None
    return case.model, case.seq, case.weights, case.loss_chunk, ours, form, step, case.compile


def of_row(row: Row) -> Case:
    """The case of a row."""
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})


NAMES = {"adamw": "AdamW", "adamw8bit": "AdamW8bit", "adafactor": "Adafactor", "muon": "Muon"}


def label(case: Case) -> str:
    """How a row is trained, on one line."""
    if case.method != POETX:
        dtype = "" if case.weights == "bfloat16" else ", fp32"
        where = ", step in the backward" if case.method == IN_BACKWARD else ""
        return f"{NAMES[case.optimizer]}{dtype}{where}{_activations(case)}"
    form = "merged" if case.merged else case.variant
    name = "POET-XQ" if case.base == "int8" else "POET-X"
    parts = [f"{name} {form}", f"b = {case.block_size}"]
    if case.merged and case.variant == "mem":
        parts[0] += " mem"
    if case.memory_budget is not None:
        parts.append(f"budget {case.memory_budget:g}")
    if case.optimizer != "muon":
        parts.append(NAMES[case.optimizer])
    elif case.momentum != "float32":
        parts.append(f"{_SHORT[case.momentum]} momentum")
    if case.turn_every > 1:
        parts.append(f"turned every {case.turn_every} steps")
    if case.gradients != "float32":
        parts.append(f"{_SHORT[case.gradients]} gradients")
    return ", ".join(parts) + _activations(case)


_SHORT = {"bfloat16": "bf16", "int8": "int8", "float32": "fp32", None: ""}


def _activations(case: Case) -> str:
    found = ", checkpointed" if case.checkpointing else ""
    found += ", loss in chunks" if case.loss_chunk else ""
    return found + {"whole": ", compiled whole", "graphs": ", CUDA graphs"}.get(case.compile, "")


def gives_up(case: Case) -> str:
    """What cannot be done with it that AdamW allows."""
    return GIVES_UP if case.method == IN_BACKWARD else ""
