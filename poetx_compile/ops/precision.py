"""The precision rules of rotations (docs/numerics.md): fp32 at least, no autocast, no TF32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def rotation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of rotations beside data of `dtype`: fp32, or fp64 for fp64 data."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(function: F) -> F:
    """Run `function` with autocast off on the device of its first tensor argument.

    Autocast stays active inside the implementation of a custom op and would turn the fp32 products
    of a rotation into bf16 ones.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """fp32 products in IEEE fp32, whatever the user allows elsewhere (TF32, bf16).

    The settings are those of each backend: `torch.get_float32_matmul_precision` raises where the
    user has set one of them.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    previous = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, previous, strict=True):
            backend.fp32_precision = precision
