"""A training step of a whole model, POET-X against the same model with fused AdamW.

Each method runs in a process of its own with empty compiler caches: tokens/s (merges spread over
their interval), the time of the first step, and memory by part. With ``--together`` all compile at
once and are timed one after another: minutes less of a GPU, and no times of first steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks import options, peer
from benchmarks.options import fraction, list_of, positive
from benchmarks.rows import Row, line, result_path, table, write
from benchmarks.step_worker import DENSE, OPTIMIZERS, PEER, POETX, StepCase
from poetx_compile.compile.options import CHOICES

GAINS, BASES = ("none", "rows", "both"), ("dense", "int8")

ROOT = Path(__file__).resolve().parent.parent

COLUMNS = (
    "preset", "layers", "method", "optimizer", "turn_every", "variant", "formulation",
    "permutation",
    "block_size", "accumulation", "merge_interval", "gains", "base", "keep_folded",
    "memory_budget", "ms", "linear_ms", "ratio",
    "tokens_per_s", "speed_ratio", "first_step_s", "first_step_ratio", "weights_mib",
    "gradients_mib", "optimizer_mib", "activations_mib", "peak_mib", "peak_ratio", "merge_share",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; returns its rows, of each model the dense one first."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.cuda_graphs and args.stage != "inductor":
        parser.error("--cuda-graphs needs --stage inductor")
    if args.memory_budgets and "step" in args.keep_folded:
        parser.error("--memory-budgets keep less, --keep-folded step keeps more: give one")
    named = ("optimizers", OPTIMIZERS), ("keep_folded", CHOICES["keep_folded"])
    for option, known in named:
        if unknown := sorted(set(getattr(args, option)) - set(known)):
            name = option.replace("_", "-")
            parser.error(f"--{name} {','.join(unknown)}: use some of {','.join(known)}")
    if max(args.turn_every) > 1 and tuple(args.optimizers) != ("muon",):
        parser.error("--turn-every is of POETXMuon: add --optimizers muon")
    made: list[Row] = []
    asked = list(cases(args))
    found = map(in_process, asked) if args.together is None else all_together(asked, args.together)
    for row in found:
        made.append(row)
        rows = [
            row if (dense := beside(row, made)) is None else compared(row, dense) for row in made
        ]
        path = result_path(args.output, args.name, row["gpu"])
        write(path, rows)
        print(f"{len(rows)}: {line(rows[-1], COLUMNS)}", file=sys.stderr, flush=True)
    print(f"{table(rows, COLUMNS)}\n\n{len(rows)} rows in {path}")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = options.parser("step", __doc__)
    options.add_poetx(parser, block_sizes=(256,))
    peer.add_option(parser)
    add = parser.add_argument
    add("--optimizers", type=list_of(str), default=("adamw",), help="of POET-X: adamw,muon")
    add(
        "--presets", "--preset", type=list_of(str), default=("1b",),
        help="shapes of examples/llama.py; 8b:4 has 4 decoder layers",
    )  # fmt: skip
    add("--layers", type=positive, help="decoder layers, in place of the presets' numbers")
    add("--by-layer", action="store_true", help="compile each decoder layer by itself")
    add("--vocabulary", type=positive, default=32000)
    add("--batch", type=positive, help="default: 8, of 8b 1")
    add("--length", type=positive, default=1024)
    options.add_turn_every(parser)
    add(
        "--together", nargs="?", const="", metavar="FILE",
        help="compile all at once; time when the file, if one is given, exists",
    )  # fmt: skip
    add("--accumulation", type=positive, default=1, help="batches in a step of the optimiser")
    add("--keep-folded", type=list_of(str), default=("call",), help="of POET-X: call,step")
    add(
        "--memory-budgets", type=list_of(fraction), default=(), metavar="FRACTIONS",
        help="of POET-X, variant fast: a row for each, beside the one without",
    )  # fmt: skip
    add("--gains", choices=GAINS, default="none", help="of POET-X")
    add("--base", choices=BASES, default="dense", help="of POET-X")
    add("--lr", type=float, default=1e-4)
    add("--cuda-graphs", action="store_true", help="of forward and backward")
    add("--warmup", type=int, default=5, help="steps after the first that are not timed")
    add("--steps", type=positive, default=10, help="steps timed in each round")
    add("--rounds", type=positive, default=3)
    add(
        "--merge-interval",
        type=positive,
        default=200,
        help="over which a merge is spread; 1 is the merged form",
    )
    return parser


def cases(args: argparse.Namespace) -> Iterator[StepCase]:
    """Of each preset the dense model, all choices of POET-X, and a peer's two variants."""
    fields = {field.name for field in dataclasses.fields(StepCase)}
    common = {name: value for name, value in vars(args).items() if name in fields}
    device = options.pick_device(args.device)
    common["dtype"] = str(options.pick_dtype(args.dtype, device)).removeprefix("torch.")
    common["peer"], common["keep_folded"] = None, "call"
    common["turn_every"] = 1
    for given in args.presets:
        preset, _, layers = given.partition(":")
        common["preset"], common["batch"] = preset, args.batch or (1 if preset == "8b" else 8)
        common["layers"] = int(layers) if layers else args.layers
        yield from _cases_of(StepCase(method=DENSE, **common), args)


def _cases_of(dense: StepCase, args: argparse.Namespace) -> Iterator[StepCase]:
    yield dense
    for block_size, optimizer, variant in itertools.product(
        args.block_sizes, args.optimizers, args.variants
    ):
        budgets = (None, *args.memory_budgets) if variant == "fast" else (None,)
        for formulation, permutation, keep_folded, memory_budget, turn_every in itertools.product(
            args.formulations, args.permutations, args.keep_folded, budgets, args.turn_every
        ):
            yield dataclasses.replace(
                dense,
                method=POETX,
                block_size=block_size,
                optimizer=optimizer,
                variant=variant,
                formulation=formulation,
                permutation=permutation,
                keep_folded=keep_folded,
                memory_budget=memory_budget,
                turn_every=turn_every,
            )
        if args.peer is not None:
            yield dataclasses.replace(
                dense,
                method=PEER,
                block_size=block_size,
                variant=variant,
                peer=str(args.peer.resolve()),
            )


def beside(row: Row, rows: Sequence[Row]) -> Row | None:
    """The dense row of the same model."""
    model = row["preset"], row["layers"]
    alike = (r for r in rows if (r["preset"], r["layers"]) == model)
    return next((r for r in alike if r["method"] == DENSE), None)


def compared(row: Row, dense: Row | None) -> Row:
    """A row with its ratios over the dense one; a dense row has no configuration of POET-X."""
    if dense is None:  # not timed yet
        return row
    ratios = {
        "linear_ms": dense["ms"],
        "ratio": row["ms"] / dense["ms"],
        "speed_ratio": row["tokens_per_s"] / dense["tokens_per_s"],
        "first_step_ratio": row["first_step_s"] and row["first_step_s"] / dense["first_step_s"],
        "peak_ratio": row["peak_mib"] / dense["peak_mib"] if row["peak_mib"] else None,
    }
    if row["method"] == POETX:
        return row | ratios
    unused = ["formulation", "permutation", "optimizer", "keep_folded", "memory_budget"]
    unused += ["merge_interval", "gains", "base", "turn_every"]
    unused += ["variant", "block_size"] if row["method"] == DENSE else []
    return row | ratios | dict.fromkeys(unused)


def all_together(cases: Sequence[StepCase], after: str) -> Iterator[Row]:
    """The rows of workers that compile at once, as they come. The GPU holds all models.

    Args:
        after: the file that nobody is timed before; empty: before all have compiled.
    """
    failed = []
    with tempfile.TemporaryDirectory() as room, ThreadPoolExecutor(len(cases)) as pool:
        Path(room, "waits").write_text(json.dumps([len(cases), after]), encoding="utf-8")
        running = [pool.submit(in_process, dataclasses.replace(c, room=room)) for c in cases]
        for worker in as_completed(running):
            try:
                yield worker.result()
            except subprocess.CalledProcessError as error:  # of the others there are rows
                failed.append(error)
    if failed:
        raise failed[0]


def in_process(case: StepCase) -> Row:
    """Run the worker with empty caches and read its row; it writes what it has to say to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
            "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
        }
        command = [sys.executable, "-m", "benchmarks.step_worker"]
        command += [json.dumps(dataclasses.asdict(case)), str(output)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return json.loads(output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
