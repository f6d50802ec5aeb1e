"""The command line: `estimate` and `explain` for a configuration file or a model of one's own."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError, POETXError
from poetx_compile.inspect.memory.parts import OPTIMIZERS
from poetx_compile.version import __version__

DTYPES = ("bfloat16", "float16", "float32")

_ESTIMATE = """examples:
  poetx estimate config.json --batch-size 8 --dtype bfloat16
  poetx estimate path/to/checkpoint --dtype bfloat16 --gpu-memory 80GB --checkpointing
  poetx estimate path/to/checkpoint --block-size 512 --json -
  poetx estimate --factory mypackage.model:build --input 8x3x224x224:bfloat16
"""

_EXPLAIN = """examples:
  poetx explain config.json --dtype bfloat16 --html page.html
  poetx explain --factory mypackage.model:build --input 8x1024:int64 --graphs
  poetx explain config.json --option disable_passes='["batch_cayley"]'
"""


def main(arguments: Sequence[str] | None = None, prog: str = "poetx") -> int:
    """Run one command; returns the exit status, 2 where the arguments do not work."""
    parser = command_parser(prog)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (POETXError, OSError) as error:  # of an OSError: a file that is not to be written
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def command_parser(prog: str = "poetx") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="What POET-X makes of a model, before anybody trains it. This takes no GPU and "
        "no memory for the weights: everything happens on the meta device.",
    )
    version = f"poetx-compile {__version__}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="estimate|explain")
    command = _command(commands, "estimate", "memory of training, part by part", _ESTIMATE)
    command.set_defaults(run=_estimate)
    add = command.add_argument
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="muon",
        help="of the POET-X columns (default: muon); the dense one is AdamW",
    )
    add("--variants", default="fast,mem", help="a column each (default: fast,mem)")
    add(
        "--memory-budget", type=float, metavar="F",
        help="of the fast column: the fraction of its activations that may be kept",
    )  # fmt: skip
    add("--gpu-memory", metavar="SIZE", help="such as 80GB: what fits, and what is needed if not")
    add(
        "--checkpointing",
        action="store_true",
        help="activation checkpointing of every layer, for a model of transformers",
    )
    add("--autocast", choices=DTYPES, help="dtype of an autocast region around the forward")
    add("--whole", action="store_true", help="trace every layer of a long run of equal ones")
    add("--json", metavar="FILE", help="write the result in bytes as JSON; - for the output")

    command = _command(commands, "explain", "what is rewritten, what is not, and why", _EXPLAIN)
    command.set_defaults(run=_explain)
    add = command.add_argument
    add("--verbose", action="store_true", help="a row for every layer, and what passes did")
    add("--html", metavar="FILE", type=Path, help="write a page with the drawn graphs")
    add("--graphs", action="store_true", help="print the graph after the passes as well")
    add("--adopt", action="store_true", help="as compiled without prepare: the backend adopts it")
    add("--variant", choices=("fast", "mem"), default="fast", help="what is kept (default: fast)")
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="an option of poetx_backend; may be given several times",
    )
    return parser


def _command(commands: Any, name: str, what: str, examples: str) -> argparse.ArgumentParser:
    """A command with the options that both share."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", nargs="?", help="a Hugging Face config.json, or the folder it is in")
    add("--factory", metavar="MODULE:FUNCTION", help="a function that returns the model instead")
    add("--batch-size", type=int, metavar="N", help="of the inputs, without --input (default: 1)")
    add("--sequence-length", type=int, metavar="N", help="the same (default: 1024)")
    add(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE[:DTYPE]",
        help="an input of the forward, such as 8x1024:int64; once for each input, in their order",
    )
    add("--dtype", choices=DTYPES, help="convert the model (default: as it is)")
    add("--block-size", type=int, default=256, metavar="B", help="default: 256")
    add("--base", choices=("dense", "int8"), default="dense", help="default: dense")
    add("--permutation", choices=("random", "chunked"), default="chunked", help="default: chunked")
    add(
        "--formulation",
        choices=("auto", "input_centric", "folded"),
        default="auto",
        help="default: auto, the cheaper one for each side",
    )
    return command


def _estimate(args: argparse.Namespace) -> None:
    from poetx_compile.inspect.estimate import estimate  # loads Dynamo

    found = estimate(
        _source(args),
        *map(_tensor, args.input),
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        dtype=_dtype(args.dtype),
        autocast=_dtype(args.autocast),
        optimizer=args.optimizer,
        config=_config(args, memory_budget=args.memory_budget),
        variants=[name.strip() for name in args.variants.split(",") if name.strip()],
        whole=args.whole,
        gpu_memory=args.gpu_memory,
        checkpointing=args.checkpointing,
        progress=_progress if sys.stderr.isatty() else None,
    )
    if sys.stderr.isatty():
        _progress("")
    if args.json != "-":
        print(found)
    if args.json:
        text = json.dumps(found.to_dict(), indent=2)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n", encoding="utf-8")


def _progress(line: str) -> None:
    """One line that the next one overwrites."""
    print(f"\r\x1b[K{line[:79]}", end="", file=sys.stderr, flush=True)


def _explain(args: argparse.Namespace) -> None:
    from poetx_compile.compile.options import without_adoption
    from poetx_compile.inspect.explain import explain
    from poetx_compile.inspect.memory import meta
    from poetx_compile.inspect.memory.inputs import check_sizes, make_inputs
    from poetx_compile.inspect.memory.source import model_on_meta

    model = model_on_meta(_source(args))
    if args.dtype:
        model.to(_dtype(args.dtype))
    config = _config(args, variant=args.variant)
    options = _options(args.option)
    inputs: tuple[Any, ...] = tuple(map(_tensor, args.input))
    kwargs: dict[str, Any] = {}
    check_sizes(args.batch_size, args.sequence_length, bool(inputs))
    if not inputs:
        inputs, kwargs = make_inputs(model, args.batch_size or 1, args.sequence_length or 1024)
    if args.adopt:
        options = config.to_dict() | options
    else:
        model = meta.prepared(model, config)
        options = without_adoption(options)
    found = explain(model, *inputs, options=options, **kwargs)
    print(found.text(verbose=args.verbose))
    if args.graphs:
        print(f"\n{found.after}")
    if args.html:
        print(f"page: {found.save_html(args.html)}")


def _source(args: argparse.Namespace) -> Any:
    """What was named: a path, or the model that the factory makes, on the meta device."""
    if (args.model is None) == (args.factory is None):
        raise ConfigError("give either the path of a config.json or --factory MODULE:FUNCTION")
    if args.model is not None:
        return args.model
    module_name, _, name = args.factory.partition(":")
    if not module_name or not name:
        raise ConfigError(f"--factory {args.factory}: write it as MODULE:FUNCTION")
    if (here := os.getcwd()) not in sys.path:  # as with `python -m`
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--factory {args.factory}: {error}") from error
    if not callable(function):
        raise ConfigError(
            f"--factory {args.factory} is a {type(function).__name__}, no function: name one that "
            "makes the model"
        )
    with torch.device("meta"):
        model = function()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"--factory {args.factory} returned a {type(model).__name__}, no module: let it return "
            "the model"
        )
    return model


def _config(args: argparse.Namespace, **fields: Any) -> POETXConfig:
    return POETXConfig(
        block_size=args.block_size,
        base=args.base,
        permutation=args.permutation,
        formulation=args.formulation,
        **fields,
    )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _tensor(text: str) -> torch.Tensor:
    """``8x1024:int64`` on the meta device; fp32 where no dtype is named."""
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        sizes = [int(size) for size in shape.lower().split("x")]
    except ValueError:
        sizes = []
    if not isinstance(dtype, torch.dtype) or not sizes or min(sizes) < 1:
        raise ConfigError(f"--input {text}: write it as SHAPE or SHAPE:DTYPE, such as 8x1024:int64")
    return torch.empty(sizes, dtype=dtype, device="meta")


def _options(given: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text}: write it as NAME=JSON")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value  # a bare word is a string
    return options
