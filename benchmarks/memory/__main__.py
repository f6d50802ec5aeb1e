"""The command line of `benchmarks.memory`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.memory import estimates, figures, goals, tables
from benchmarks.memory.cases import Case
from benchmarks.memory.methods import VOCABULARY
from benchmarks.memory.plans import PLANS
from benchmarks.memory.queue import Queue, named, summary
from benchmarks.memory.results import all_rows, save, selected
from benchmarks.memory.worker import Place
from benchmarks.options import end_cleanly, list_of, positive
from benchmarks.page import ROOT, Page
from benchmarks.rows import RESULTS, Row, read


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 1 where rows are missing or an estimate is off."""
    args = _parser().parse_args(arguments)
    return args.command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str, run: object) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        made.set_defaults(command=run)
        return made

    plan = command("plan", "list the cases of plans", _plan)
    run = command("run", "measure the cases of plans", _run)
    for one in (plan, run):
        one.add_argument("plans", nargs="+", choices=PLANS, metavar="PLAN")
        one.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    add = run.add_argument
    add("--folder", type=Path, help="of compiled code and logs; default: a temporary one")
    add("--cap-gib", type=float, default=80.0, help="no more GPU memory than that; 0 for all")
    add("--gpus", default="all", help="all, or numbers separated by commas")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--stage", choices=("inductor", "aot_eager", "eager"), default="inductor")
    add("--steps", type=positive, default=4, help="that are timed")
    add("--checkpoint", action="store_true", help="save and load a checkpoint as well")
    add("--limit-seconds", type=float, help="end what runs then; it starts again the next time")
    add("--compile-seconds", type=float, default=600.0, help="of them for compiling first, at most")
    add("--case-seconds", type=float, default=600.0, help="a case that takes longer has failed")

    table = command("table", "rows as a Markdown table", _table)
    _add_selection(table)
    table.add_argument("--columns", type=list_of(str), default=tables.COLUMNS)

    plot = command("plot", "tokens/s against the peak", _plot)
    _add_selection(plot)
    plot.add_argument("--output", type=Path, required=True, help="the .png")

    goal = command("goals", "what was asked, beside the rows", _goals)
    goal.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")

    curve = command("curve", "the loss of a run of examples/pretrain.py", _curve)
    curve.add_argument("rows", type=Path, help="benchmarks/results/pretrain-….json")
    curve.add_argument("--output", type=Path, required=True, help="the .png")

    command("page", "write tables and figures into docs/memory.md", lambda args: PAGE.write())
    estimate = command("estimate", "`poetx_compile.estimate`, beside the measured peaks", _estimate)
    _add_selection(estimate)
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("plans", nargs="*", metavar="PLAN", help="default: all")
    add("--model", help="only of this model")
    add("--seq", type=positive, help="only of this length")
    add("--results", type=Path, default=RESULTS, help="folder of the rows")


def _cases(args: argparse.Namespace) -> list[Case]:
    return [case for name in args.plans for case in PLANS[name]]


def _plan(args: argparse.Namespace) -> int:
    rows = {tables.key(row): row for row in all_rows(args.results)}
    for name in args.plans:
        print(f"{name}: {len(PLANS[name])} cases")
        for case in PLANS[name]:
            row = rows.get(case.key())
            print(f"  {named(case)}" + ("" if row is None else f": {summary(row)}"))
    return 0


def _run(args: argparse.Namespace) -> int:
    place = Place(
        device=args.device,
        cap_gib=args.cap_gib or None,
        stage=args.stage,
        steps=args.steps,
        checkpoint=args.checkpoint,
        vocabulary=64 if args.device == "cpu" else VOCABULARY,
    )
    known = all_rows(args.results)
    known = [row for row in known if row["gpu"] == _gpu(args.device)] if known else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder.resolve() if args.folder else Path(temporary)

        def finished(row: Row) -> None:
            save(args.results, row)

        gpus = _gpus(args)
        queue = Queue(_cases(args), place, gpus, folder, known, finished, args.case_seconds)
        if args.device != "cpu":
            queue.compile(args.compile_seconds)
        complete = queue.run(args.limit_seconds)
    wanted = {case.key() for case in _cases(args)}
    print(tables.plain([row for row in all_rows(args.results) if tables.key(row) in wanted]))
    return 0 if complete else 1


def _gpu(device: str) -> str:
    """Its name, asked in another process: a context here would take memory from the cases."""
    if device == "cpu":
        return "cpu"
    command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _gpus(args: argparse.Namespace) -> tuple[str, ...]:
    if args.device == "cpu":
        return ("",)
    if args.gpus != "all":
        return tuple(args.gpus.split(","))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",") if visible else map(str, range(torch.cuda.device_count())))


def _table(args: argparse.Namespace) -> int:
    rows = all_rows(args.results)
    print(tables.markdown(selected(rows, args.plans, args.model, args.seq), args.columns, rows))
    return 0


def _plot(args: argparse.Namespace) -> int:
    rows = all_rows(args.results)
    chosen = selected(rows, args.plans, args.model, args.seq)
    print(figures.draw(chosen, rows, args.output))
    return 0


def _goals(args: argparse.Namespace) -> int:
    print(goals.markdown(all_rows(args.results)))
    return 0


def _curve(args: argparse.Namespace) -> int:
    print(figures.curve(read(args.rows), args.output))
    return 0


def _estimate(args: argparse.Namespace) -> int:
    cases = [c for name in args.plans or PLANS for c in PLANS[name] if c.model != "tiny"]
    cases = [c for c in cases if args.model in (None, c.model) and args.seq in (None, c.seq)]
    compared = estimates.compared(dict.fromkeys(cases), all_rows(args.results))
    print(estimates.table(compared))
    return int(bool(estimates.missed(compared)))


def _shown(words: Sequence[str]) -> str | None:
    """What a picture of the page shows."""
    args = _parser().parse_args(list(words))
    chosen = selected(all_rows(args.results), args.plans, args.model, args.seq)
    return figures.SHOWN if any(map(tables.is_measured, chosen)) else None


PAGE = Page("memory", ROOT / "docs" / "memory.md", main, _shown)

if __name__ == "__main__":
    end_cleanly()
    sys.exit(main())
