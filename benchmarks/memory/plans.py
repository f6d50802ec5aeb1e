"""The cases of each plan, what matters most first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from benchmarks.memory.cases import DENSE, IN_BACKWARD, POETX, Case

ADAMW = Case("8b", 1024, DENSE, "adamw")
"""What the others are compared with: bf16 weights, gradients and moments."""


def stored(block_size: int, variant: str = "fast", **fields: object) -> Case:
    """A case of 8B at 1024 tokens with stored rotations; `fields` of `Case`, over the defaults."""
    case = Case(
        "8b", 1024, POETX, "muon", block_size=block_size, merge_interval=200, variant=variant,
        base="dense", momentum="float32", gradients="float32",
    )  # fmt: skip
    return dataclasses.replace(case, **fields)  # type: ignore[arg-type]


def merged(block_size: int, momentum: str = "int8", **fields: object) -> Case:
    """A case merged every step, gradients of the rotations in bf16."""
    values = {"merge_interval": 1, "momentum": momentum, "gradients": "bfloat16"} | fields
    return stored(block_size, **values)  # type: ignore[arg-type]


def at(cases: Iterable[Case], **fields: object) -> list[Case]:
    """The same cases with other `fields`."""
    return [dataclasses.replace(case, **fields) for case in cases]  # type: ignore[arg-type]


IN_THE_BACKWARD = dataclasses.replace(ADAMW, method=IN_BACKWARD)
PAPER = {"optimizer": "adamw", "momentum": None}
XQ = {"base": "int8"}

TARGETS = [
    ADAMW,
    merged(256),
    merged(512),
    merged(1024),
    merged(256, variant="mem"),
    IN_THE_BACKWARD,
    stored(256, "mem", **PAPER),
    stored(256, "fast", **PAPER),
]
QUANTIZED = [
    stored(256, "mem", gradients="bfloat16", momentum="int8", **XQ),
    stored(256, "fast", gradients="bfloat16", momentum="int8", **XQ),
    stored(256, "mem", gradients="bfloat16", momentum="int8", checkpointing=True, **XQ),
]
RIVALS = [
    dataclasses.replace(IN_THE_BACKWARD, optimizer="adafactor"),
    dataclasses.replace(ADAMW, optimizer="adamw8bit"),
    dataclasses.replace(IN_THE_BACKWARD, optimizer="adamw8bit"),
    dataclasses.replace(ADAMW, optimizer="adafactor"),
    dataclasses.replace(ADAMW, optimizer="muon"),
    dataclasses.replace(ADAMW, weights="float32"),
]
DTYPES = [
    merged(256, "float32", gradients="float32"),
    merged(256, "float32"),
    merged(256, "bfloat16"),
    merged(1024, "float32", gradients="float32"),
    merged(1024, "bfloat16"),
    stored(256, "fast", memory_budget=0.72),
    stored(512, "mem"),
    stored(512, "fast"),
]
CHECKPOINTED = at(
    [merged(256), merged(1024), stored(256, "mem", **PAPER), ADAMW], checkpointing=True
)
SWEPT = [merged(256), merged(1024), stored(256, "mem", **PAPER), ADAMW]
LONG = [merged(256, variant="mem", checkpointing=True, loss_chunk=2048)]

PLANS: dict[str, list[Case]] = {
    "targets": TARGETS,
    "quantized": QUANTIZED,
    "rivals": RIVALS,
    "dtypes": DTYPES,
    "checkpointed": CHECKPOINTED,
    "13b": at([merged(256), merged(256, variant="mem"), *SWEPT[1:]], model="13b", seq=2048),
    "long": [
        *at(LONG, seq=32768),
        *at(LONG, seq=16384),
        *at(LONG, seq=8192),
        *at(LONG, seq=32768, loss_chunk=None),
        *at([ADAMW], seq=8192, checkpointing=True),
        *at([ADAMW], seq=32768, checkpointing=True, loss_chunk=2048),
    ],
    "sequences": [*at(SWEPT, seq=2048), *at(SWEPT, seq=512)],
    "3b": [c for seq in (1024, 512, 2048) for c in at(SWEPT, model="3b", seq=seq)],
    "13b-sequences": [c for seq in (1024, 512) for c in at(SWEPT, model="13b", seq=seq)],
    "whole": at([ADAMW, merged(256), stored(256, "fast", **PAPER)], compile="whole"),
    "smoke": [],
}
"""`smoke` is every kind of case at a size for a CPU."""

PLANS["smoke"] = at(
    [
        *TARGETS,
        *RIVALS,
        merged(64, variant="mem", checkpointing=True, loss_chunk=8),
        stored(64, memory_budget=0.8),
        dataclasses.replace(ADAMW, compile="whole"),
    ],
    model="tiny",
    seq=16,
)
