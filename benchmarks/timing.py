"""Time functions side by side: CUDA events, replayed CUDA graphs, or the clock on a CPU."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_WARM_UPS = 3
_MIN_RUNS = 5


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: the median, and the 20th and 80th percentile."""

    ms: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Summary of at least two samples in milliseconds."""
        cuts = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), cuts[0], cuts[-1])


@dataclasses.dataclass(frozen=True)
class Timer:
    """Times functions in turn, several rounds of it, so that drift of the clocks meets all alike.

    Args:
        device: where the functions run. On CUDA `triton.testing.do_bench` takes the samples (the
            L2 cache is emptied before each); elsewhere the clock does.
        warmup_ms, rep_ms: time spent on each function, in each round.
        rounds: how often all functions take their turn.
        cuda_graphs: capture each function once and time its replays, without the host.
    """

    device: torch.device
    warmup_ms: float = 25
    rep_ms: float = 100
    rounds: int = 3
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.cuda_graphs and self.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, not {self.device}")

    def compare(self, functions: Mapping[str, Callable[[], Any]]) -> dict[str, Timing]:
        """The `Timing` of each function, by its key."""
        if self.cuda_graphs:
            functions = {name: _captured(function) for name, function in functions.items()}
        take = _device_samples if self.device.type == "cuda" else _clock_samples
        samples: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(self.rounds):
            for name, function in functions.items():
                samples[name] += take(function, self.warmup_ms, self.rep_ms)
        return {name: Timing.of(values) for name, values in samples.items()}

    def time(self, function: Callable[[], Any]) -> Timing:
        """The `Timing` of one function."""
        return self.compare({"": function})[""]


def training_step(module: Callable[[Tensor], Tensor], owner: nn.Module, x: Tensor, dy: Tensor):
    """A function that runs forward and backward once: dX and the gradients of all parameters.

    Args:
        module: what is called, `owner` or a compiled form of it.
        owner: has the parameters; their gradients are ``None`` before each run.
        x: [tokens, in_features], a leaf that requires its gradient.
        dy: [tokens, out_features], the gradient of the output.
    """
    leaves = [x, *(p for p in owner.parameters() if p.requires_grad)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(x).backward(dy)

    return step


def _device_samples(function: Callable[[], Any], warmup_ms: float, rep_ms: float) -> list[float]:
    from triton.testing import do_bench

    samples = do_bench(function, warmup=warmup_ms, rep=rep_ms, return_mode="all")
    # Very slow functions are sampled once a round: `Timing` needs two.
    return samples if len(samples) > 1 else samples * 2


def _clock_samples(function: Callable[[], Any], warmup_ms: float, rep_ms: float) -> list[float]:
    end = time.perf_counter() + warmup_ms / 1e3
    function()
    while time.perf_counter() < end:
        function()
    samples: list[float] = []
    while len(samples) < _MIN_RUNS or sum(samples) < rep_ms:
        begun = time.perf_counter()
        function()
        samples.append(1e3 * (time.perf_counter() - begun))
    return samples


def _captured(function: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a CUDA graph of `function`, which must not wait for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
