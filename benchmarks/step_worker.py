"""One whole model trained for some steps, in a process of its own (`benchmarks.step` starts it).

A process of its own has cold caches where it is given empty folders, and a peak of memory that
nothing else has touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from benchmarks import gate, peer
from benchmarks.options import pick_device
from benchmarks.rows import Row, environment
from benchmarks.saved import MIB
from poetx_compile.optim.merge import merge

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

OPTIMIZERS: dict[str, Any] = {
    "adamw": poetx.POETXAdamW,
    "muon": poetx.POETXMuon,
}

DENSE, POETX, PEER = "dense", "poetx", "peer"


@dataclasses.dataclass(frozen=True)
class StepCase:
    """What is trained, and how.

    Args:
        method: ``"dense"`` (fused AdamW), ``"poetx"``, or ``"peer"``.
        optimizer: of POET-X, a key of `OPTIMIZERS`.
        preset: shapes of `examples/llama.py`.
        layers: how many decoder layers; ``None`` for as many as the preset has.
        by_layer: compile each decoder layer by itself: equal ones share what is compiled.
        accumulation: batches whose gradients are added before a step of the optimiser.
        keep_folded: the backend's option, of POET-X.
        memory_budget: the field of `POETXConfig`.
        gains, base: the fields of `POETXConfig`.
        cuda_graphs: replay forward and backward as CUDA graphs.
        steps, rounds, warmup: `rounds` times `steps` steps are timed, after `warmup` steps.
        turn_every: of `POETXMuon`.
        peer: folder of the peer.
        room: a folder, where several workers wait for each other to compile.
    """

    method: str
    variant: str = "fast"
    formulation: str = "auto"
    permutation: str = "chunked"
    block_size: int = 256
    optimizer: str = "adamw"
    preset: str = "1b"
    layers: int | None = None
    by_layer: bool = False
    vocabulary: int = 32000
    batch: int = 8
    length: int = 1024
    accumulation: int = 1
    keep_folded: str = "call"
    memory_budget: float | None = None
    gains: str = "none"
    turn_every: int = 1
    base: str = "dense"
    lr: float = 1e-4
    device: str = "cuda"
    dtype: str = "bfloat16"
    stage: str = "inductor"
    cuda_graphs: bool = False
    warmup: int = 5
    steps: int = 10
    rounds: int = 3
    merge_interval: int = 200
    seed: int = 0
    peer: str | None = None
    room: str | None = None


@dataclasses.dataclass
class Trained:
    """A model made ready to train.

    Attributes:
        owner: the module that has the parameters.
        forward: what is called, `owner` compiled.
        optimizer: trains what the method trains.
        merge: does one merge; ``None`` where nothing merges.
        merges: how often the optimiser has merged by itself.
    """

    owner: nn.Module
    forward: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    merge: Callable[[], Any] | None = None
    merges: Callable[[], int] = lambda: 0


def run(case: StepCase) -> Row:
    """Train, measure, and check; the row of `case`. Raises `GateError`."""
    device, dtype = pick_device(case.device), getattr(torch, case.dtype)
    torch.manual_seed(case.seed)
    trained = build(case, device, dtype)
    tokens = torch.randint(case.vocabulary, (case.batch, case.length + 1), device=device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> Tensor:
        for _ in range(case.accumulation):
            if case.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            loss = trained.forward(*batch) / case.accumulation
            loss.backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)
        return loss.detach() * case.accumulation

    first_loss, first_s = _seconds(step, device)
    for _ in range(case.warmup):
        step()
    if case.room and device.type == "cuda":
        torch.cuda.empty_cache()
    with turn_of(case.room):
        return _measured(case, trained, step, batch, first_loss, None if case.room else first_s)


def _measured(
    case: StepCase,
    trained: Trained,
    step: Callable[[], Tensor],
    batch: tuple[Tensor, Tensor],
    first_loss: Tensor,
    first_s: float | None,
) -> Row:
    """The row of a model whose steps are compiled."""
    device, dtype = pick_device(case.device), getattr(torch, case.dtype)
    if device.type == "cuda" and not case.cuda_graphs:  # a replay allocates nothing
        torch.cuda.reset_peak_memory_stats(device)

    def window() -> Tensor:
        return [step() for _ in range(case.steps)][-1]

    timed = [_seconds(window, device) for _ in range(case.rounds)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    step_ms = 1e3 * statistics.median(seconds for _, seconds in timed) / case.steps
    # The angle guard may merge while steps are timed: then the times hold those merges.
    early_merges = trained.merges()
    memory = _memory(trained, batch, device, peak)
    errors = _check(trained, batch, dtype, first_loss.item(), timed[-1][0].item())
    merge_ms = _merge_ms(trained, device)
    amortised_ms = step_ms + merge_ms / case.merge_interval
    tokens_a_step = case.batch * case.length * case.accumulation
    return (
        environment(device, dtype)
        | dataclasses.asdict(case)
        | {
            "peer": peer.PACKAGE if case.method == PEER else None,  # not where it is
            "room": None if case.room is None else "together",
            "tokens": tokens_a_step,
            "ms": amortised_ms,
            "step_ms": step_ms,
            "merge_ms": merge_ms,
            "merge_share": (amortised_ms - step_ms) / amortised_ms,
            "tokens_per_s": tokens_a_step / (amortised_ms / 1e3),
            "first_step_s": first_s,
            "early_merges": early_merges,
        }
        | memory
        | errors
    )


def build(case: StepCase, device: torch.device, dtype: torch.dtype) -> Trained:
    """The Llama model of the examples, prepared, with its optimiser, compiled."""
    with device:
        model = untrained(case)
    model.to(dtype)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    # `torch.compile` imports Inductor when it is called, if that is the backend: so it is for all.
    importlib.import_module("torch._inductor.compile_fx")
    compile_kwargs: dict[str, Any] = {"dynamic": False}
    if case.cuda_graphs:
        # As mode="reduce-overhead" does, which torch.compile refuses beside options.
        compile_kwargs["options"] = {"triton.cudagraphs": True}
    if case.method == DENSE:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), lr=case.lr, betas=(0.9, 0.95), fused=True
        )
        forward = _compiled(model, case, backend=case.stage, **compile_kwargs)
        return Trained(model, forward, optimizer)
    if case.method == PEER:
        assert case.peer is not None
        other = peer.load(Path(case.peer))
        wrapped, optimizer = other.model(model, case.block_size, case.variant, case.lr)
        forward = torch.compile(wrapped, backend=case.stage, **compile_kwargs)
        return Trained(wrapped, forward, optimizer, lambda: other.merge(wrapped))
    config = poetx.POETXConfig(
        block_size=case.block_size,
        variant=case.variant,
        formulation=case.formulation,
        permutation=case.permutation,
        memory_budget=case.memory_budget,
        gains=case.gains,
        base=case.base,
        # Merges are timed by themselves, but where each step is one.
        merge_interval=1 if case.merge_interval == 1 else 10**9,
    )
    poetx.prepare(model, config)
    turns = {"turn_every": case.turn_every} if case.optimizer == "muon" else {}
    ours: Any = OPTIMIZERS[case.optimizer](model, lr=case.lr, **turns)
    compile_kwargs.setdefault("options", {}).update(stage=case.stage, keep_folded=case.keep_folded)
    forward = _compiled(model, case, backend=poetx.poetx_backend, **compile_kwargs)
    merging = None if config.merged else lambda: merge(model, redraw=True)
    return Trained(model, forward, ours, merging, lambda: ours.schedule.merges)


@contextlib.contextmanager
def turn_of(room: str | None) -> Iterator[None]:
    """Wait until the workers of a room may be timed, then for the others' turns to end."""
    if room is None:
        yield
        return
    folder = Path(room)
    workers, after = json.loads((folder / "waits").read_text(encoding="utf-8"))
    Path(folder, f"ready-{os.getpid()}").touch()
    while not Path(after).exists() if after else len(list(folder.glob("ready-*"))) < workers:
        time.sleep(0.2)
    with Path(folder, "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compiled(model: nn.Module, case: StepCase, **how: Any) -> Callable[..., Tensor]:
    """`model` compiled as a whole, or its layers in place and nothing around them."""
    if not case.by_layer:
        return torch.compile(model, **how)
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(**how)  # type: ignore[operator]
    return model


def untrained(case: StepCase) -> nn.Module:
    """The plain model of `case`, on the current default device."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from llama import PRESETS, Llama, LlamaConfig
    finally:
        sys.path.remove(str(EXAMPLES))
    shapes: dict[str, Any] = PRESETS[case.preset] | {
        "vocab_size": case.vocabulary,
        "max_seq_len": case.length,
    }
    if case.layers is not None:
        shapes["num_layers"] = case.layers
    return Llama(LlamaConfig(**shapes))


def _seconds(function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """What `function` returns, and the wall time until the device has done it."""
    _wait(device)
    begun = time.perf_counter()
    result = function()
    _wait(device)
    return result, time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(
    trained: Trained, batch: tuple[Tensor, Tensor], device: torch.device, peak: int | None
) -> Row:
    """MiB by part; what needs the allocator's counters is ``None`` on a CPU.

    ``activations_mib`` is what is held between forward and backward; ``peak_mib`` is that of the
    timed steps, everything included; of CUDA graphs that of their capture.
    """
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    loss = trained.forward(*batch)
    activations = None
    if before is not None:
        activations = (torch.cuda.memory_allocated(device) - before) / MIB
    loss.backward()
    owned = [*trained.owner.parameters(), *trained.owner.buffers()]
    gradients = [p.grad for p in trained.owner.parameters() if p.grad is not None]
    states = [
        value
        for state in trained.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    row = {
        "weights_mib": _mib(owned),
        "gradients_mib": _mib(gradients),
        "optimizer_mib": _mib(states),
        "activations_mib": activations,
        "peak_mib": None if peak is None else peak / MIB,
    }
    trained.optimizer.zero_grad(set_to_none=True)
    return row


def _mib(tensors: list[Tensor]) -> float:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / MIB


def _check(
    trained: Trained,
    batch: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    first_loss: float,
    last_loss: float,
) -> Row:
    """The gate: the compiled loss is eager's, and training has lowered it on its one batch.

    The gradients of every formulation are checked by `benchmarks.layers`. This comes last, so that
    eager's kernels do not warm the caches for the first step; without it there is no row.
    """
    if not last_loss < first_loss:
        raise gate.GateError(f"the loss went from {first_loss:.4g} to {last_loss:.4g}")
    with gate.turned(trained.owner):
        compiled_loss = trained.forward(*batch).detach().clone()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            eager_loss = trained.owner(*batch)
    error = gate.check(compiled_loss, eager_loss, dtype, "loss of the compiled model")
    return {"first_loss": first_loss, "last_loss": last_loss, "loss_error": error}


def _merge_ms(trained: Trained, device: torch.device) -> float:
    """The time of one merge, after another one that loads its kernels; 0 where nothing merges."""
    if trained.merge is None:
        return 0.0
    seconds = 0.0
    for _ in range(2):
        _wait(device)
        begun = time.perf_counter()
        trained.merge()
        _wait(device)
        seconds = time.perf_counter() - begun
    return 1e3 * seconds


def main(case: str, output: str) -> None:
    """Run the case given as JSON, and write its row as JSON into `output`."""
    asked = StepCase(**json.loads(case))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            row = run(asked)
    finally:  # the others need not wait for one that fails
        if asked.room is not None:
            Path(asked.room, f"ready-{os.getpid()}").touch()
    Path(output).write_text(json.dumps(row, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
