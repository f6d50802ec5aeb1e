"""`poetx_compile.estimate` beside what training takes on a GPU, part by part.

For each preset the dense model and each variant are trained for some steps, each in a process of
its own (as `benchmarks.step` does it), and their memory is compared with the estimate, which is
made on the CPU. The peak has to be within `TOLERANCE`; the exit status is 1 where one is not.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch

import poetx_compile as poetx
from benchmarks import options
from benchmarks.options import list_of, positive
from benchmarks.rows import Row, result_path, table, write
from benchmarks.step import in_process
from benchmarks.step_worker import DENSE, OPTIMIZERS, POETX, StepCase, untrained
from poetx_compile.inspect.estimate import MIB, MemoryRow

TOLERANCE = 0.10

PARTS = ("weights", "gradients", "optimizer", "activations", "peak")
COLUMNS = ("preset", "method", "variant", "part", "measured_mib", "estimated_mib", "error_percent")


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; returns its rows, one for each part of each case."""
    args = _parser().parse_args(arguments)
    device = options.pick_device(args.device)
    if device.type != "cuda":
        raise SystemExit("the memory of a CPU has no counters: run this on a CUDA GPU")
    rows: list[Row] = []
    for preset in args.presets:
        case = StepCase(
            method=DENSE,
            preset=preset,
            dtype=str(options.pick_dtype(args.dtype, device)).removeprefix("torch."),
            **{name: getattr(args, name) for name in _SHARED},
        )
        cases = [case]
        cases += [dataclasses.replace(case, method=POETX, variant=v) for v in args.variants]
        for one, estimated in zip(cases, estimates(case, args.variants), strict=True):
            rows += compared(in_process(one), estimated)
            path = result_path(args.output, args.name, rows[-1]["gpu"])
            write(path, rows)
            print(f"{preset} {estimated.method}: done", file=sys.stderr, flush=True)
    print(f"{table(rows, COLUMNS)}\n\n{len(rows)} rows in {path}")
    return rows


_SHARED = (
    "device", "block_size", "permutation", "optimizer", "vocabulary", "batch", "length", "warmup",
    "steps", "rounds", "seed",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("estimate", str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--presets", type=list_of(str), default=("350m", "1b"), help="shapes of examples/llama.py")
    add("--variants", type=list_of(str), default=("fast", "mem"))
    add("--permutation", default="chunked", choices=("random", "chunked"))
    add("--optimizer", default="adamw", choices=tuple(OPTIMIZERS))
    add("--block-size", type=positive, default=256)
    add("--vocabulary", type=positive, default=32000)
    add("--batch", type=positive, default=8)
    add("--length", type=positive, default=1024)
    add("--warmup", type=int, default=2, help="steps after the first, before the peak is taken")
    add("--steps", type=positive, default=5)
    add("--rounds", type=positive, default=1)
    return parser


def estimates(case: StepCase, variants: Sequence[str]) -> tuple[MemoryRow, ...]:
    """The estimate of what `case` trains: the dense row, and one for each variant."""
    dtype = getattr(torch, case.dtype)
    with torch.device("meta"):
        model = untrained(case).to(dtype)
    config = poetx.POETXConfig(
        block_size=case.block_size, permutation=case.permutation, formulation=case.formulation
    )
    found = poetx.estimate(
        model,
        batch_size=case.batch,
        sequence_length=case.length,
        optimizer=case.optimizer,
        config=config,
        variants=variants,
    )
    return found.rows


def compared(measured: Row, estimated: MemoryRow) -> list[Row]:
    """A row for each part, with the relative error of the estimate."""
    names = {"optimizer": "optimizer_state"}
    rows = []
    for part in PARTS:
        mib = getattr(estimated, names.get(part, part)) / MIB
        values: dict[str, Any] = {
            "part": part,
            "measured_mib": measured[f"{part}_mib"],
            "estimated_mib": mib,
            "error_percent": 100 * (mib / measured[f"{part}_mib"] - 1),
        }
        rows.append({k: v for k, v in measured.items() if not k.endswith("_mib")} | values)
    return rows


def missed(rows: Sequence[Row]) -> list[Row]:
    """The peaks that the estimate missed by more than `TOLERANCE`."""
    peaks = [row for row in rows if row["part"] == "peak"]
    return [row for row in peaks if abs(row["error_percent"]) > 100 * TOLERANCE]


if __name__ == "__main__":
    sys.exit(bool(missed(main())))
