"""DDP and FSDP2 against one process, on the GPUs of one machine::

    torchrun --nproc-per-node 2 -m benchmarks.distributed

A small Llama is trained some steps, with merges on the way, by each recipe; every process also
trains it alone on the whole batch. No time is shown of a run whose losses are not those of one
process, whose processes disagree on a weight after its merges, or (under DDP) whose merge
communicated. A few minutes with cold caches; needs two CUDA devices, or runs on CPUs over gloo.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import poetx_compile as poetx
from benchmarks import gate
from benchmarks.rows import Row, environment, table
from poetx_compile.distributed.shards import whole
from poetx_compile.optim.merge import merge

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
COLUMNS = ("run", "step_ms", "tokens_per_s", "peak_mib", "merge_ms", "loss_error")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is spread, the dtype of its weights, and whether autocast is on."""

    name: str
    wrap: Callable[[Any], nn.Module]
    dtype: torch.dtype = torch.float32
    autocast: bool = True


def sharded(groups: bool, **options: Any) -> Callable[[Any], nn.Module]:
    def wrap(model: Any) -> nn.Module:
        for block in model.layers:
            if groups:
                poetx.fully_shard_rotations(block)
            fully_shard(block, **options)
        return fully_shard(model, **options)

    return wrap


RECIPES = (
    Recipe("DDP", DistributedDataParallel),
    Recipe("DDP, bf16", DistributedDataParallel, torch.bfloat16, autocast=False),
    Recipe("FSDP2", sharded(groups=False)),
    Recipe("FSDP2, bf16, rotations apart", sharded(groups=True), torch.bfloat16, autocast=False),
    Recipe("FSDP2, bf16 policy, rotations apart", sharded(True, mp_policy=POLICY), autocast=False),
)


@dataclasses.dataclass
class Run:
    """A model being trained."""

    model: nn.Module
    forward: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    autocast: bool
    device: torch.device

    def step(self, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach().float()


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run every recipe; returns the rows, those of the first process being printed."""
    parser = argparse.ArgumentParser("benchmarks.distributed", description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="sequences, of all processes")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--stage", default="inductor")
    args = parser.parse_args(arguments)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        return compare(args)
    finally:
        dist.destroy_process_group()


def compare(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    expected: dict[Any, list[float]] = {}
    for recipe in RECIPES:
        if recipe.dtype not in expected:  # a policy is compared with autocast
            fp32 = recipe.dtype is torch.float32
            alone = start(args, Recipe("alone", lambda model: model, recipe.dtype, fp32))
            expected[recipe.dtype] = losses(args, alone, parts=1)[0]
            del alone
        rows.append(measure(args, recipe, expected[recipe.dtype]))
        torch._dynamo.reset()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} x {rows[0]['gpu']}, torch {torch.__version__}")
        print(table(rows, COLUMNS), flush=True)
    return rows


def start(args: argparse.Namespace, recipe: Recipe) -> Run:
    """The model of `recipe`, the same in every process: blocks of 128, a merge every four steps."""
    sys.path.insert(0, str(EXAMPLES))
    from llama import Llama, LlamaConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = max(1, args.hidden // 64)
    torch.manual_seed(0)
    with device:
        model = Llama(LlamaConfig(args.hidden, 3 * args.hidden, args.layers, heads))
    model.to(recipe.dtype)
    config = poetx.POETXConfig(block_size=min(128, args.hidden // 2), merge_interval=4)
    poetx.prepare(model, config)
    wrapped = recipe.wrap(model)
    forward = torch.compile(wrapped, backend=poetx.poetx_backend, options={"stage": args.stage})
    optimizer = poetx.POETXMuon(wrapped, lr=1e-3)
    return Run(model, forward, optimizer, recipe.autocast, device)


def losses(args: argparse.Namespace, run: Run, parts: int) -> tuple[list[float], float]:
    """The mean loss of all processes at each step, and the seconds of a step."""
    rank = dist.get_rank() if parts > 1 else 0
    size = args.batch // parts
    values, seconds = [], []
    for step in range(args.steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(256, (args.batch, args.length + 1), generator=generator)
        mine = tokens[rank * size : (rank + 1) * size].to(run.device)
        synchronize(run.device)
        begun = time.perf_counter()
        value = run.step(mine)
        synchronize(run.device)
        seconds.append(time.perf_counter() - begun)
        if parts > 1:
            dist.all_reduce(value)
        values.append(float(value) / parts)
    return values, sorted(seconds)[len(seconds) // 2]


def measure(args: argparse.Namespace, recipe: Recipe, expected: list[float]) -> Row:
    """The row of a recipe. Raises `gate.GateError` where it does not train as one process does."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run = start(args, recipe)
    found, seconds = losses(args, run, dist.get_world_size())
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    error = gate.check(
        torch.tensor(found), torch.tensor(expected), torch.bfloat16, f"losses of {recipe.name}"
    )
    merge(run.model, redraw=True)
    counting = CommDebugMode()
    with counting if "DDP" in recipe.name else contextlib.nullcontext():
        merge(run.model, redraw=True)
    if counting.get_total_counts():
        raise gate.GateError(f"{recipe.name}: a merge communicated")
    synchronize(run.device)
    begun = time.perf_counter()
    merge(run.model, redraw=True)
    synchronize(run.device)
    merge_ms = 1e3 * (time.perf_counter() - begun)
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest(run.model))
    if len(set(digests)) != 1:
        raise gate.GateError(f"{recipe.name}: the processes have different models")
    return {
        **environment(run.device, recipe.dtype),
        "run": recipe.name,
        "step_ms": 1e3 * seconds,
        "tokens_per_s": args.batch * args.length / seconds,
        "peak_mib": peak,
        "merge_ms": merge_ms,
        "loss_error": error,
    }


def digest(model: nn.Module) -> str:
    result = hashlib.sha256()
    for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
        result.update(whole(tensor).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
