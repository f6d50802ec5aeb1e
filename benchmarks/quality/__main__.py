"""The command line of `benchmarks.quality`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.options import positive
from benchmarks.quality import corpora, methods, results
from benchmarks.quality.queue import Machine, Queue, label, summary
from benchmarks.quality.settings import PlanError, Settings, load
from benchmarks.rows import RESULTS
from pretraining.failure import RunError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 1 where runs are missing or something is wrong."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        return args.command(args)
    except (PlanError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    formatter = argparse.ArgumentDefaultsHelpFormatter

    plan = commands.add_parser("plan", help="list the runs of plans", formatter_class=formatter)
    plan.add_argument("plans", nargs="+", metavar="PLAN", help="a name in plans/, or a .json file")
    plan.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    plan.set_defaults(command=_plan)

    run = commands.add_parser("run", help="do the runs of plans", formatter_class=formatter)
    run.add_argument("plans", nargs="+", metavar="PLAN", help="a name in plans/, or a .json file")
    add = run.add_argument
    add("--out", type=Path, required=True, help="folder of corpus, rows, logs, models and caches")
    add("--results", type=Path, default=RESULTS, help="folder of quality-<plan>.json")
    add("--data", nargs="+", default=(), metavar="FILE", help="text or jsonl; default: all Python "
        "sources of the interpreter and its packages")  # fmt: skip
    add("--gpus", default="all", help="all, or numbers separated by commas")
    add("--per-gpu", type=positive, default=1, help="runs at once on each GPU")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--stage", choices=("inductor", "aot_eager", "eager", "none"), default="inductor")
    add("--windows", type=positive, nargs=2, default=(1024, 8192), metavar=("BETWEEN", "END"),
        help="windows of a validation")  # fmt: skip
    add("--limit-seconds", type=float, help="end what runs then; it starts again the next time")
    run.set_defaults(command=_run)

    table = commands.add_parser("table", help="rows as Markdown", formatter_class=formatter)
    table.add_argument("plans", nargs="+", metavar="PLAN", help="a plan, or a .json file of rows")
    table.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    table.add_argument("--columns", default=",".join(results.COLUMNS))
    table.set_defaults(command=_table)

    plot = commands.add_parser("plot", help="figures of rows", formatter_class=formatter)
    plot.add_argument("plans", nargs="+", metavar="PLAN", help="a plan, or a .json file of rows")
    plot.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    plot.add_argument("--kind", choices=("blocks", "rates", "curves", "spectra"), required=True)
    plot.add_argument("--output", type=Path, required=True, help="the .png")
    plot.set_defaults(command=_plot)
    return parser


def _plans(names: Sequence[str]) -> dict[str, list[Settings]]:
    """The runs of each plan, checked against this checkout."""
    plans = {name: load(name) for name in names}
    for name, runs in plans.items():
        for number, settings in enumerate(runs, 1):
            try:
                methods.check(settings)
            except PlanError as error:
                raise PlanError(f"plan {name}, run {number}: {error}") from error
    return plans


def _plan(args: argparse.Namespace) -> int:
    known = {row["run"]: row for row in results.all_rows([args.results])}
    for name, runs in _plans(args.plans).items():
        left = sum(run.cost() for run in runs if run.run not in known)
        print(f"{name}: {len(runs)} runs, {left / 1e15:.1f} PFLOP to do")
        for run in runs:
            row = known.get(run.run)
            print(f"  {run.run}  {label(run.to_dict()) if row is None else summary(row)}")
    return 0


def _run(args: argparse.Namespace) -> int:
    plans = _plans(args.plans)
    folder: Path = args.out.resolve()
    corpus = corpora.store(folder, args.data)
    sizes = ", ".join(f"{len(part) / 1e6:.1f} MB" for part in (corpus.train, corpus.validation))
    print(f"{corpus.name}: {sizes}, {corpus.fingerprint}", file=sys.stderr, flush=True)
    machine = Machine(_gpus(args), args.per_gpu, args.stage, tuple(args.windows), folder)
    known = [
        row
        for row in results.all_rows(dict.fromkeys([RESULTS, args.results]))
        if row["corpus"] == corpus.fingerprint
    ]
    queue = Queue(
        list(plans.values()), machine, known, lambda rows: results.save(args.results, plans, rows)
    )
    complete = queue.run(args.limit_seconds)
    results.save(args.results, plans, queue.rows)
    for name in plans:
        print(results.path(args.results, name))
    return 0 if complete else 1


def _gpus(args: argparse.Namespace) -> tuple[str, ...]:
    if args.device == "cpu":
        return ()
    if args.gpus != "all":
        return tuple(args.gpus.split(","))
    if not torch.cuda.is_available():
        raise PlanError("there is no CUDA GPU: give --device cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",") if visible else map(str, range(torch.cuda.device_count())))


def _table(args: argparse.Namespace) -> int:
    for name in args.plans:
        print(results.markdown(results.load(name, args.results), args.columns.split(",")))
    return 0


def _plot(args: argparse.Namespace) -> int:
    from benchmarks.quality import figures

    rows = [row for name in args.plans for row in results.load(name, args.results)]
    print(figures.draw(rows, args.kind, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
