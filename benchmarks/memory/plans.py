"""The cases of each plan, what matters most first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from benchmarks.memory.cases import DENSE, IN_BACKWARD, POETX, Case

ADAMW = Case("8b", 1024, DENSE, "adamw")
"""What the others are compared with: bf16 weights, gradients and moments."""


def stored(block_size: int, variant: str = "fast", **fields: Any) -> Case:
    """A case of 8B at 1024 tokens with stored rotations; `fields` of `Case`, over the defaults."""
    case = Case(
        "8b", 1024, POETX, "muon", block_size=block_size, merge_interval=200, variant=variant,
        base="dense", momentum="float32", gradients="float32",
    )  # fmt: skip
    return dataclasses.replace(case, **fields)


def merged(block_size: int, momentum: str = "int8", **fields: Any) -> Case:
    """A case merged every step, gradients of the rotations in bf16."""
    values: dict[str, Any] = {
        "merge_interval": 1,
        "momentum": momentum,
        "gradients": "bfloat16",
    } | fields
    return stored(block_size, **(values | fields))


def at(cases: Iterable[Case], **fields: Any) -> list[Case]:
    """The same cases with other `fields`."""
    return [dataclasses.replace(case, **fields) for case in cases]


IN_THE_BACKWARD = dataclasses.replace(ADAMW, method=IN_BACKWARD)
PAPER: dict[str, Any] = {"optimizer": "adamw", "momentum": None}
"""The optimiser of the paper, everything in fp32."""
LEAN: dict[str, Any] = {"momentum": "int8", "gradients": "bfloat16"}
IN_TURN: dict[str, Any] = {"turn_every": 4}
RARELY: dict[str, Any] = {"turn_every": 8}
"""Of large blocks, whose turn costs more."""
XQ = LEAN | IN_TURN | {"base": "int8"}

LEANEST = merged(256, variant="mem", checkpointing=True, **IN_TURN)
LONG = dataclasses.replace(LEANEST, loss_chunk=2048)

GRAPHS = at(
    [
        ADAMW,
        merged(256, **IN_TURN),
        merged(256, variant="mem", **IN_TURN),
        stored(256, "mem", **XQ),
    ],
    compile="graphs",
)
TARGETS = [
    ADAMW,
    merged(256, **IN_TURN),
    merged(256, variant="mem", **IN_TURN),
    merged(512, **IN_TURN),
    merged(1024, **RARELY),
    stored(256, "mem", **XQ),
    stored(256, "mem", checkpointing=True, **XQ),
    stored(256, "fast", **LEAN),
    *at([merged(256, variant="mem", **IN_TURN)], model="13b", seq=2048),
    dataclasses.replace(ADAMW, optimizer="adamw8bit"),
    dataclasses.replace(IN_THE_BACKWARD, optimizer="adafactor"),
    dataclasses.replace(ADAMW, weights="float32"),
]
RIVALS = [
    IN_THE_BACKWARD,
    dataclasses.replace(ADAMW, optimizer="adafactor"),
    dataclasses.replace(ADAMW, optimizer="muon"),
    dataclasses.replace(IN_THE_BACKWARD, optimizer="adamw8bit"),
]
FORMS = [
    merged(256),
    merged(256, variant="mem"),
    stored(256, "mem", **LEAN),
    merged(1024),
    merged(512),
    *at([LONG], seq=32768),
    stored(256, "fast", **XQ),
    stored(256, "mem", **PAPER),
    stored(256, "fast", **PAPER),
    stored(256, "fast", memory_budget=0.5, **LEAN),
    merged(256, "float32", gradients="float32"),
    merged(256, "float32"),
    merged(256, "bfloat16"),
    merged(1024, "float32", gradients="float32"),
    stored(512, "mem", **LEAN),
    stored(512, "fast", **LEAN),
]
CHECKPOINTED = [
    LEANEST,
    *at([merged(1024), ADAMW], checkpointing=True),
]
COMPARED = [ADAMW, merged(256, **IN_TURN), stored(256, "mem", **XQ)]
"""At other sizes and lengths."""
SWEPT = [*COMPARED, merged(1024, **RARELY), stored(256, "mem", **LEAN)]
PLANS: dict[str, list[Case]] = {
    "targets": TARGETS,
    "rivals": RIVALS,
    "forms": FORMS,
    "checkpointed": CHECKPOINTED,
    "13b": at(SWEPT, model="13b", seq=2048),
    "long": [
        *at([LONG], seq=16384),
        *at([LONG], seq=8192),
        *at([LONG], seq=32768, loss_chunk=None),
        *at([ADAMW], seq=8192, checkpointing=True),
        *at([ADAMW], seq=32768, checkpointing=True, loss_chunk=2048),
    ],
    "sequences": [c for seq in (2048, 512) for c in at(COMPARED, seq=seq)],
    "3b": [
        c
        for seq in (1024, 512, 2048)
        for c in at(COMPARED, model="3b", seq=seq, compile="graphs")  # the host counts
    ],
    "13b-sequences": [c for seq in (1024, 512) for c in at(COMPARED, model="13b", seq=seq)],
    "turns": [merged(b, turn_every=k) for b in (256, 512, 1024) for k in (2, 4, 8)],
    "graphs": GRAPHS,
    "whole": at([ADAMW, merged(256), stored(256, "fast", **LEAN)], compile="whole"),
    "smoke": [],
}
"""`smoke` is every kind of case at a size for a CPU."""

_SMALL = [
    *TARGETS,
    *RIVALS,
    merged(256),
    stored(256, "mem", **PAPER),
    merged(64, variant="mem", checkpointing=True, loss_chunk=8),
    stored(64, memory_budget=0.8),
    dataclasses.replace(ADAMW, compile="whole"),
]
PLANS["smoke"] = list(dict.fromkeys(at(_SMALL, model="tiny", seq=16)))
