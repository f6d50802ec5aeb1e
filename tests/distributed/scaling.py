"""Checks of `benchmarks.scaling`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from benchmarks import gate, scaling
from benchmarks.rows import Row
from tests.distributed.training import raises, rank


def compared(cases: str, *more: str) -> list[Row]:
    arguments = "--preset tiny --vocabulary 256 --length 8 --batch 1 --block-size 32 --lr 1e-2"
    arguments += " --stage eager --warmup 1 --steps 1 --output results"
    return scaling.compare(
        scaling._parser().parse_args([*arguments.split(), "--cases", cases, *more])
    )


def check_the_benchmark_of_scaling_counts_what_is_sent() -> None:
    rows = compared("interval-alone,interval-ddp,interval-fsdp2,adamw-fsdp2")
    if rank() == 0:
        assert json.loads(Path("results/scaling-cpu.json").read_text()) == rows
    alone, ddp, sharded, dense = rows
    rotations = 2 * (4 * 2 * 4 + 3 * (4 + 12)) * 32 * 31 // 2  # of 2 layers with 7 linears each
    others = 2 * 256 * 128 + 5 * 128
    for row in (ddp, sharded):
        assert row["reduced_mib"] == pytest.approx(4 * (rotations + others) / 2**20, rel=1e-4)
    assert ddp["gathered_mib"] == 0 < sharded["gathered_mib"]
    assert ddp["efficiency"] == pytest.approx(ddp["tokens_per_s"] / alone["tokens_per_s"])
    assert dense["over_adamw"] == 1
    assert dense["efficiency"] is None
    with raises(gate.GateError, "reduced 1 bytes in a step, not 2"):
        scaling._check_sent(scaling.CASES[1], scaling.Sent(1), scaling.Sent(2))


def check_half_of_it_is_sent_in_bf16() -> None:
    def in_bf16(state, bucket):  # type: ignore[no-untyped-def]  # DDP keeps torch's to NCCL, by name
        return bf16_compress_hook(state, bucket)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "bf16_compress_hook", in_bf16)
        (narrow,) = compared("interval-ddp", "--reduced-in", "bfloat16")
    (wide,) = compared("interval-ddp")
    assert narrow["reduced_mib"] == narrow["reduced_formula_mib"] == wide["reduced_mib"] / 2
