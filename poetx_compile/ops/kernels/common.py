"""What the kernels share: how they are launched, the precision of products, block sizes."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch

_tracing = contextvars.ContextVar("poetx_tracing_launches", default=False)


@contextlib.contextmanager
def traced_launches() -> Iterator[None]:
    """Inside, `launch` records a node that Inductor can compile instead of launching."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


def launch(kernel: Any, programs: Any, *args: Any, **constants: Any) -> None:
    """Launch a Triton kernel on a one-dimensional grid of `programs`.

    Args:
        kernel: a ``triton.jit`` function.
        programs: the number of programs.
        args: tensors and integers.
        constants: the kernel's ``tl.constexpr`` arguments, ``num_warps`` and ``num_stages``.
    """
    if _tracing.get():
        torch.library.wrap_triton(kernel)[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)


def input_precision() -> str:
    """How ``tl.dot`` multiplies fp32.

    ``"tf32x3"`` splits each operand into two TF32 numbers and adds three tensor core products: as
    exact as fp32 within a few ulp, at about a third of the TF32 rate. ``"ieee"`` would run on the
    scalar cores, several times slower; plain ``"tf32"`` has 10 bits, so that rotations drift
    (docs/numerics.md). ROCm has no split products: IEEE there.
    """
    return "ieee" if torch.version.hip is not None else "tf32x3"


def shared_memory() -> int:
    """Bytes of shared memory that one program may use on the current device.

    227 KiB (compute capability 9.0) where there is no device: a kernel is compiled for another one.
    """
    if not torch.cuda.is_available():
        return 227 * 1024
    if torch.version.hip is not None:
        return 64 * 1024  # not among the properties of ROCm devices
    device = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def ceil_div(a: Any, b: int) -> Any:
    """⌈a/b⌉, also of symbolic integers."""
    return (a + b - 1) // b


def power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two ≥ `size`, within [low, high]."""
    return max(low, min(high, 1 << (size - 1).bit_length()))


def known(size: Any, otherwise: int) -> int:
    """A size for a heuristic: the size itself, or `otherwise` where it is symbolic.

    Asking a symbolic size for its hint would tie a cached kernel to the first batch seen.
    """
    return size if isinstance(size, int) else otherwise
