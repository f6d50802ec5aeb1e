"""The ceilings of this machine: a large copy and a large product, measured once in a run."""

from __future__ import annotations

import torch

from benchmarks.floors import Ceilings
from benchmarks.timing import Timer

_COPY_BYTES = {"cuda": 2**30, "cpu": 2**24}
_PRODUCT_SIZE = {"cuda": 8192, "cpu": 512}
_TF32_PRODUCTS = 3
"""Products in TF32 that make one with the precision of fp32 (`tf32x3`)."""


def measure(timer: Timer, dtype: torch.dtype) -> Ceilings:
    """Bandwidth, and FLOP rates in `dtype` and at the precision of fp32, on the timer's device."""
    bandwidth, rate = _bytes_per_s(timer), _flops_per_s(timer, dtype)
    if timer.device.type != "cuda":
        return Ceilings(bandwidth, rate, _flops_per_s(timer, torch.float32))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        fp32_rate = _flops_per_s(timer, torch.float32) / _TF32_PRODUCTS
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return Ceilings(bandwidth, rate, fp32_rate)


def _bytes_per_s(timer: Timer) -> float:
    size = _COPY_BYTES[timer.device.type]
    source = torch.ones(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    timing = timer.time(lambda: target.copy_(source))
    return 2 * size / (timing.ms / 1e3)


def _flops_per_s(timer: Timer, dtype: torch.dtype) -> float:
    size = _PRODUCT_SIZE[timer.device.type]
    a, b = (torch.randn(size, size, device=timer.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = timer.time(lambda: torch.mm(a, b, out=out))
    return 2 * size**3 / (timing.ms / 1e3)
