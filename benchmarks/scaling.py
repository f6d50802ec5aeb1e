"""From one GPU to several at equal tokens a GPU, and what is sent on the way::

    torchrun --nproc-per-node 2 -m benchmarks.scaling --preset 8b

POET-X is trained for a few steps in each process by itself, with the others beside it, then on the
same batches under DDP. The efficiency is the tokens/s of all processes under DDP over those of as
many that do not communicate; `of_slowest`, if all were as the slowest, for which DDP waits. POET-X
and AdamW under FSDP2 stand beside it. Blocks are compiled one by one, all with the same code. No
time is shown of a run whose first loss is not that of the processes by themselves, whose loss does
not fall on its one batch, whose processes disagree afterwards, or that reduced other bytes than the
formula says.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import poetx_compile as poetx
from benchmarks import gate
from benchmarks.distributed import EXAMPLES, synchronize
from benchmarks.options import list_of, positive
from benchmarks.rows import RESULTS, Row, environment, line, result_path, table, write
from benchmarks.sent import Sent, by_formula, counted_allreduce, counted_in_bf16, counting
from poetx_compile.distributed.shards import local
from poetx_compile.optim.merge import merge

GIB, MIB = 2**30, 2**20
ALONE, DDP, FSDP2 = "alone", "DDP", "FSDP2"
COLUMNS = (
    "method", "parallel", "step_ms", "tokens_per_s", "efficiency", "of_slowest", "over_adamw",
    "peak_gib", "merge_ms", "reduced_mib", "reduced_formula_mib", "gathered_mib",
    "gathered_formula_mib",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: ``"interval"`` and ``"merged"`` are the forms of POET-X."""

    method: str
    parallel: str

    @property
    def key(self) -> str:
        return f"{self.method}-{self.parallel}".lower()


CASES = (
    Case("interval", ALONE),
    Case("interval", DDP),
    Case("merged", ALONE),
    Case("merged", DDP),
    Case("interval", FSDP2),
    Case("adamw", FSDP2),
)
"""A sharded weight would be gathered in each step of the merged form, which refuses it."""


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the cases; returns the rows, those of the first process being printed and written."""
    args = _parser().parse_args(arguments)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        return compare(args)
    finally:
        dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", type=list_of(str), default=tuple(case.key for case in CASES))
    add("--preset", default="8b", help="shapes of examples/llama.py")
    add("--vocabulary", type=positive, default=32000)
    add("--batch", type=positive, default=4, help="sequences of each process")
    add("--length", type=positive, default=1024)
    add("--block-size", type=positive, default=256)
    add("--momentum-dtype", default="float32")
    add("--bucket-mib", type=positive, default=25, help="of DDP")
    add(
        "--reduced-in", default="own", choices=("own", "bfloat16"),
        help="under DDP: the dtype of each gradient, or bf16, by torch's bf16_compress_hook",
    )  # fmt: skip
    add(
        "--rotations-of", default="block", choices=("block", "model"),
        help="under FSDP2, what the rotations are a group of: fewer collectives, or less memory",
    )  # fmt: skip
    add("--warmup", type=positive, default=3, help="steps that are not timed")
    add("--steps", type=positive, default=5)
    add("--lr", type=float, default=1e-4)
    add("--stage", default="inductor", choices=("inductor", "aot_eager", "eager"))
    add("--name", default="scaling")
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser


def compare(args: argparse.Namespace) -> list[Row]:
    known = {case.key: case for case in CASES}
    if unknown := sorted(set(args.cases) - set(known)):
        raise SystemExit(f"--cases {','.join(unknown)}: use some of {','.join(known)}")
    if dist.get_world_size() == 1:
        raise SystemExit("one process has nobody to send to: start two with torchrun")
    rows: list[Row] = []
    for case in (known[key] for key in args.cases):
        row = measure(args, case)
        rows.append(_compared(row, rows))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            path = result_path(args.output, args.name, row["gpu"])
            write(path, rows)
            print(f"{len(rows)}: {line(rows[-1], COLUMNS)}", file=sys.stderr, flush=True)
    rows = [_compared(row, rows) for row in rows]  # AdamW is the last
    if dist.get_rank() == 0:
        write(path, rows)
        print(f"{dist.get_world_size()} x {rows[0]['gpu']}, torch {torch.__version__}")
        print(f"{table(rows, COLUMNS)}\n\n{len(rows)} rows in {path}", flush=True)
    return rows


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    """A row with its speed over that of its method alone, and over AdamW's under FSDP2.

    Raises `gate.GateError` where its first loss is not the one of its method alone.
    """
    found = {(other["method"], other["parallel"]): other for other in rows}
    alone, dense = found.get((row["method"], ALONE)), found.get(("adamw", FSDP2))
    if alone is not None:
        first, expected = (torch.tensor(r["first_loss"]) for r in (row, alone))
        gate.check(first, expected, torch.bfloat16, f"first loss of {row['method']}")
    speed = row["tokens_per_s"]
    return row | {
        "efficiency": None if alone is None else speed / alone["tokens_per_s"],
        "of_slowest": None if alone is None else alone["slowest_ms"] / row["slowest_ms"],
        "over_adamw": None if dense is None else speed / dense["tokens_per_s"],
    }


def measure(args: argparse.Namespace, case: Case) -> Row:
    """The row of a case, the same in every process. Raises `gate.GateError`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = dist.get_world_size()
    model, step = start(args, case, device)
    seconds: list[float] = []
    losses: list[Tensor] = []
    for _ in range(args.warmup):
        losses.append(step())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.steps):
        synchronize(device)
        begun = time.perf_counter()
        losses.append(step())
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    own_ms = 1e3 * statistics.median(seconds)
    first, last, step_ms = _over_processes([losses[0], losses[-1], own_ms])
    (slowest_ms,) = _over_processes([own_ms], dist.ReduceOp.MAX)
    if not last < first:
        raise gate.GateError(f"{case}: the loss went from {first:.4g} to {last:.4g}")
    narrow = case.parallel == DDP and args.reduced_in == "bfloat16"
    sent = sent_in(step, case, counted_in_bf16 if narrow else counted_allreduce)
    formula = by_formula(
        model,
        args.block_size,
        sharded=case.parallel == FSDP2,
        reduced_size=2 if narrow else None,
    )
    _check_sent(case, sent, formula)
    if case.parallel == DDP:
        _check_alike(case, model)
    row = {
        **environment(device, next(model.parameters()).dtype),
        **{name: value for name, value in vars(args).items() if name not in ("cases", "output")},
        "processes": world,
        "method": case.method,
        "parallel": case.parallel,
        "step_ms": step_ms,
        "slowest_ms": slowest_ms,
        "tokens_per_s": world * args.batch * args.length / (step_ms / 1e3),
        "peak_gib": peak,
        "merge_ms": _merge_ms(model, device) if case.method == "interval" else None,
        "first_loss": first,
        "last_loss": last,
    }
    if case.parallel != ALONE:
        row |= {
            "reduced_mib": sent.reduced / MIB,
            "reduced_formula_mib": formula.reduced / MIB,
            "gathered_mib": sent.gathered / MIB,
            "gathered_formula_mib": formula.gathered / MIB,
        }
    return row


@dataclasses.dataclass
class Step:
    """One step on the batch of this process.

    Attributes:
        forward: the model, or what wraps it.
    """

    forward: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[Tensor, Tensor]

    def __call__(self) -> Tensor:
        loss = self.forward(*self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def start(args: argparse.Namespace, case: Case, device: torch.device) -> tuple[nn.Module, Step]:
    """The model of a case, and its step."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from llama import PRESETS, Llama, LlamaConfig
    finally:
        sys.path.remove(str(EXAMPLES))
    shapes: dict[str, Any] = PRESETS[args.preset] | {
        "vocab_size": args.vocabulary,
        "max_seq_len": args.length,
    }
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # never a copy in fp32
    try:
        with device:
            model = Llama(LlamaConfig(**shapes))
    finally:
        torch.set_default_dtype(default)
    if case.method != "adamw":
        interval = 1 if case.method == "merged" else 10**9  # a merge is timed by itself
        config = poetx.POETXConfig(block_size=args.block_size, merge_interval=interval)
        poetx.prepare(model, config)
    forward = _spread(model, case, args)
    for block in model.layers:
        backend: Any = args.stage if case.method == "adamw" else poetx.poetx_backend
        options = None if case.method == "adamw" else {"stage": args.stage}
        block.compile(backend=backend, fullgraph=True, dynamic=False, options=options)
    if case.method == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=True
        )
    else:
        optimizer = poetx.POETXMuon(forward, lr=args.lr, momentum_dtype=args.momentum_dtype)
    generator = torch.Generator().manual_seed(dist.get_rank())
    size = (args.batch, args.length + 1)
    tokens = torch.randint(args.vocabulary, size, generator=generator).to(device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return model, Step(forward, optimizer, batch)


def _spread(model: Any, case: Case, args: argparse.Namespace) -> nn.Module:
    if case.parallel == DDP:  # the processes have the same weights already
        ddp = DistributedDataParallel(
            model,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            init_sync=False,
            bucket_cap_mb=args.bucket_mib,
        )
        if args.reduced_in == "bfloat16":
            ddp.register_comm_hook(None, bf16_compress_hook)
        return ddp
    if case.parallel == FSDP2:
        apart = case.method != "adamw"
        if apart and args.rotations_of == "model":
            poetx.fully_shard_rotations(model)
        for block in model.layers:
            if apart and args.rotations_of == "block":
                poetx.fully_shard_rotations(block)
            fully_shard(block)
        fully_shard(model)
    return model


def sent_in(step: Step, case: Case, hook: Any = counted_allreduce) -> Sent:
    """What one more step sends; under DDP one with a hook, which the timed ones are without."""
    sent = Sent()
    if case.parallel == FSDP2:
        with counting(sent):
            step()
    elif isinstance(step.forward, DistributedDataParallel):
        model = step.forward.module
        step.forward = model  # the hooks of DDP go with it
        gc.collect()
        step.forward = DistributedDataParallel(model, init_sync=False)
        step.forward.register_comm_hook(sent, hook)
        step()
    return sent


def _check_sent(case: Case, sent: Sent, formula: Sent) -> None:
    """DDP reduces the bytes of the formula; FSDP2 pads what does not divide, one per cent at most.

    The optimiser's own numbers (angles, norms) are not counted.
    """
    if case.parallel == ALONE:
        return
    slack = 0.0 if case.parallel == DDP else 0.01
    for field in ("reduced", "gathered"):
        found, expected = getattr(sent, field), getattr(formula, field)
        if abs(found - expected) > slack * expected:
            raise gate.GateError(f"{case}: {field} {found} bytes in a step, not {expected}")


def _check_alike(case: Case, model: nn.Module) -> None:
    """Raise where two processes hold other bits; sums of them, taken on the device."""
    sums = [
        local(tensor).detach().flatten().view(torch.uint8).sum(dtype=torch.int64)
        for tensor in (*model.parameters(), *model.buffers())
    ]
    own = torch.stack(sums)
    least, most = own.clone(), own.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise gate.GateError(f"{case}: the processes have different models")


def _over_processes(
    values: Sequence[Tensor | float], op: dist.ReduceOp.RedOpType | None = None
) -> list[float]:
    """Some numbers over the processes: their means, or another reduction."""
    own = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(own, op=op or dist.ReduceOp.SUM)
    return (own if op else own / dist.get_world_size()).tolist()


def _merge_ms(model: nn.Module, device: torch.device) -> float:
    """The time of a merge with new permutations, after another one that loads its kernels."""
    seconds = 0.0
    for _ in range(2):
        synchronize(device)
        begun = time.perf_counter()
        merge(model, redraw=True)
        synchronize(device)
        seconds = time.perf_counter() - begun
    return 1e3 * seconds


if __name__ == "__main__":
    main()
