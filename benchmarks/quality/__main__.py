"""The command line of `benchmarks.quality`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.options import end_cleanly, positive
from benchmarks.page import ROOT, Page
from benchmarks.quality import corpora, methods, results, tables
from benchmarks.quality.lines import best, lines
from benchmarks.quality.queue import Machine, Queue, label, summary
from benchmarks.quality.settings import PlanError, Settings, load
from benchmarks.rows import RESULTS, Row
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
    _add_rows(table)
    table.add_argument("--columns", default=",".join(tables.COLUMNS))
    table.add_argument("--order", choices=tables.ORDERS, default="loss", help="of the lines")
    table.set_defaults(command=_table)

    plot = commands.add_parser("plot", help="figures of rows", formatter_class=formatter)
    _add_rows(plot)
    plot.add_argument("--kind", choices=("blocks", "rates", "curves", "spectra"), required=True)
    plot.add_argument("--output", type=Path, required=True, help="the .png")
    plot.set_defaults(command=_plot)

    pages = commands.add_parser("page", help="write tables and figures into docs/quality.md")
    pages.set_defaults(command=lambda args: PAGE.write())

    reference = commands.add_parser(
        "reference", help="our losses beside the reference implementation's, step by step",
        formatter_class=formatter,
    )  # fmt: skip
    add = reference.add_argument
    add("--reference", type=Path, required=True, metavar="PATH", help="a checkout of it, or its "
        "git directory")  # fmt: skip
    add("--steps", type=positive, default=60)
    add("--merge-interval", type=positive, default=20)
    add("--block-size", type=positive, default=32)
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "float64"), default="float32")
    reference.set_defaults(command=_reference)
    return parser


def _add_rows(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("plans", nargs="+", metavar="PLAN", help="a plan, or a .json file of rows")
    add("--results", type=Path, default=RESULTS, help="folder of the rows")
    add("--best", action="store_true", help="of each method and block size the best run")


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
    rows, known = _rows(args)
    print(tables.markdown(rows, args.columns.split(","), known, args.best, args.order))
    return 0


def _plot(args: argparse.Namespace) -> int:
    from benchmarks.quality import figures

    rows, known = _rows(args)
    if args.best:
        rows = [line.row for line in best(lines(rows))]
    print(figures.draw(rows, args.kind, args.output, known))
    return 0


def _rows(args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """The rows of the plans, and those among which AdamW is looked for."""
    rows = results.load_all(args.plans, args.results)
    return rows, [*results.all_rows([args.results]), *rows]


def _reference(args: argparse.Namespace) -> int:
    from benchmarks.quality import reference

    sizes = args.steps, args.merge_interval, args.block_size, args.seed
    return reference.compare(args.reference, *sizes, args.dtype)


def _shown(words: Sequence[str]) -> str | None:
    """The plans of a picture of the page, and its kind."""
    plans = [word for word in words[1 : words.index("--kind")] if not word.startswith("-")]
    if not results.load_all(plans):
        return None
    return f"{' '.join(plans)}: {words[words.index('--kind') + 1]}"


PAGE = Page("quality", ROOT / "docs" / "quality.md", main, _shown)

if __name__ == "__main__":
    end_cleanly()
    sys.exit(main())
