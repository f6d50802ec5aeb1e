"""Command line of the benchmarks, and the `Session` that comes of it."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

import poetx_compile as poetx
from benchmarks import machine
from benchmarks.floors import Ceilings
from benchmarks.rows import RESULTS, Row, environment, line, result_path, table, write
from benchmarks.timing import Timer

T = TypeVar("T")

SHAPES = ((2560, 2560), (4096, 4096), (4096, 14336), (14336, 4096))
TOKENS = (2048, 8192, 16384)
BLOCK_SIZES = (128, 256, 512)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def list_of(convert: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """An argparse type: values separated by commas, none of them left out."""

    def parse(text: str) -> tuple[T, ...]:
        return tuple(convert(part.strip()) for part in text.split(","))

    parse.__name__ = f"list of {convert.__name__.strip('_')}"
    return parse


def shape(text: str) -> tuple[int, int]:
    """``"4096x14336"``: (in_features, out_features)."""
    width, height = (int(part) for part in text.lower().split("x"))
    if min(width, height) < 1:
        raise ValueError(text)
    return width, height


def positive(text: str) -> int:
    """An int ≥ 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def fraction(text: str) -> float:
    """A number in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(text)
    return value


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share; `name` is the stem of the results."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=_DTYPES, help="default: bfloat16 on CUDA, float32 on a CPU")
    add("--name", default=name, help="of the results: <name>-<gpu>.json")
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    add("--seed", type=int, default=0, help="of weights, activations and rotations")
    return result


def add_turn_every(parser: argparse.ArgumentParser) -> None:
    """``--turn-every``, of `POETXMuon`."""
    parser.add_argument(
        "--turn-every",
        type=list_of(int),
        default=(1,),
        metavar="STEPS",
        help="from one turn of a side to its next, of POETXMuon: 1,2",
    )


def add_timing(parser: argparse.ArgumentParser, cuda_graphs: bool = True) -> None:
    """The options of `Timer`; what reads from the host cannot run in CUDA graphs."""
    add = parser.add_argument
    add("--warmup-ms", type=float, default=25.0, help="of each function in each round")
    add("--rep-ms", type=float, default=100.0, help="time sampled of each function in each round")
    add("--rounds", type=positive, default=3, help="how often all functions take their turn")
    if cuda_graphs:
        add("--cuda-graphs", action="store_true", help="time replays of CUDA graphs, of both sides")
    else:
        parser.set_defaults(cuda_graphs=False)


def add_poetx(parser: argparse.ArgumentParser, block_sizes: Sequence[int] = BLOCK_SIZES) -> None:
    """The choices of `POETXConfig` that are compared, each a list."""
    add = parser.add_argument
    add("--block-sizes", type=list_of(positive), default=tuple(block_sizes))
    add("--variants", type=list_of(str), default=("fast", "mem"))
    add("--formulations", type=list_of(str), default=("auto",), help="auto,folded,input_centric")
    add("--permutations", type=list_of(str), default=("random", "chunked"))
    add("--stage", default="inductor", choices=("inductor", "aot_eager", "eager"))


def add_shapes(parser: argparse.ArgumentParser, tokens: bool = True) -> None:
    """Shapes of weights, in × out, and numbers of tokens."""
    add = parser.add_argument
    add("--shapes", type=list_of(shape), default=SHAPES, help="in x out, as 4096x14336")
    if tokens:
        add("--tokens", type=list_of(positive), default=TOKENS)


@dataclasses.dataclass
class Session:
    """One run of a benchmark: where it runs, how it takes times, and the rows it has so far."""

    device: torch.device
    dtype: torch.dtype
    timer: Timer
    ceilings: Ceilings
    path: Path
    columns: Sequence[str]
    generator: torch.Generator
    constants: Row
    rows: list[Row] = dataclasses.field(default_factory=list)

    @classmethod
    def start(cls, arguments: argparse.Namespace, columns: Sequence[str]) -> Session:
        """Measure the machine's ceilings and get ready.

        Args:
            arguments: of a parser with `add_timing`.
            columns: which fields of a row the table shows.
        """
        device = pick_device(arguments.device)
        dtype = pick_dtype(arguments.dtype, device)
        timer = Timer(
            device, arguments.warmup_ms, arguments.rep_ms, arguments.rounds, arguments.cuda_graphs
        )
        ceilings = machine.measure(dataclasses.replace(timer, cuda_graphs=False), dtype)
        constants = environment(device, dtype) | {
            "poetx_compile": poetx.__version__,
            "cuda_graphs": arguments.cuda_graphs,
            "copy_gb_per_s": ceilings.bytes_per_s / 1e9,
            "tflops": ceilings.flops_per_s / 1e12,
            "fp32_tflops": ceilings.fp32_flops_per_s / 1e12,
        }
        path = result_path(arguments.output, arguments.name, constants["gpu"])
        generator = torch.Generator(device).manual_seed(arguments.seed)
        return cls(device, dtype, timer, ceilings, path, columns, generator, constants)

    def add(self, **values: Any) -> Row:
        """Append a row, save all rows so far, and print the new one to stderr."""
        row = self.constants | values
        self.rows.append(row)
        write(self.path, self.rows)
        print(f"{len(self.rows)}: {line(row, self.columns)}", file=sys.stderr, flush=True)
        return row

    def finish(self) -> list[Row]:
        """Print the table, and where the rows are."""
        print(f"{table(self.rows, self.columns)}\n\n{len(self.rows)} rows in {self.path}")
        return self.rows

    def normal(self, *size: int) -> Tensor:
        """Standard normal values in the dtype and on the device of the session."""
        return torch.randn(size, generator=self.generator, device=self.device, dtype=self.dtype)


def pick_device(name: str) -> torch.device:
    """A CPU or a CUDA device; one with a number becomes the current one."""
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise SystemExit(f"--device {name}: use cpu, cuda or cuda:<number>")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype called `name`, or the device's default."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def end_cleanly() -> None:
    """Let SIGTERM end this process as ^C does: what it has started ends with it."""

    def end(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
