"""What the kernels share: launches, the precision of products, sizes, chunks of permutations."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

MULTIPROCESSORS = 132
"""Of a large GPU (H100, H200). A constant: splits of a sum must not depend on the device."""

FUSED_RUN = 8
"""Neighbouring columns a gather needs to be part of a product: 16 bytes of 2-byte elements, one
load of a thread. Shorter ones cost 3 to 20 times the plain product, a permutation of its own one
pass over the data."""

MAX_PERMUTE_WIDTH = 32768
"""Columns of a row that `permute_columns` holds in shared memory at once (4 bytes each), where the
chunks of the permutation are too short to be moved one by one; fewer where it is too small."""

LOW_PRECISION = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *LOW_PRECISION)


class Launch(NamedTuple):
    """The arguments of `launch`."""

    kernel: Any
    programs: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]


_tracing = contextvars.ContextVar("poetx_tracing_launches", default=False)
_rehearsed: contextvars.ContextVar[list[Launch] | None]
_rehearsed = contextvars.ContextVar("poetx_rehearsed_launches", default=None)


@contextlib.contextmanager
def traced_launches() -> Iterator[None]:
    """Inside, `launch` records a node that Inductor can compile instead of launching."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


@contextlib.contextmanager
def rehearsal() -> Iterator[list[Launch]]:
    """Inside, meta tensors stand for those of the current device, and launches are only noted.

    Yields:
        The launches so far.
    """
    launches: list[Launch] = []
    token = _rehearsed.set(launches)
    try:
        yield launches
    finally:
        _rehearsed.reset(token)


def rehearsing() -> bool:
    """Whether this is in a `rehearsal`."""
    return _rehearsed.get() is not None


def launch(kernel: Any, programs: Any, *args: Any, **constants: Any) -> None:
    """Launch a Triton kernel on a one-dimensional grid of `programs`.

    Args:
        kernel: a ``triton.jit`` function.
        programs: the number of programs.
        args: tensors and integers. Triton compiles anew for an integer of 1 or one divisible by 16:
            what differs between steps, or layers of a shape, is in `do_not_specialize`.
        constants: the kernel's ``tl.constexpr`` arguments, ``num_warps`` and ``num_stages``.
    """
    rehearsed = _rehearsed.get()
    if rehearsed is not None:
        rehearsed.append(Launch(kernel, programs, args, constants))
    elif _tracing.get():
        meta = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        configured = _configured(kernel, **meta)
        torch.library.wrap_triton(configured)[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)


@functools.cache
def _configured(kernel: Any, num_warps: int, num_stages: int) -> Any:
    """`kernel` with its launch parameters, the same object for the same ones.

    `wrap_triton` would wrap a kernel anew for each launch, and torch tells kernels by identity:
    none would be known again (`lowerings.analysis`).
    """
    import triton

    config = triton.Config({}, num_warps=num_warps, num_stages=num_stages)
    return triton.autotune(configs=[config], key=[])(kernel)


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


def compute_capability() -> int:
    """10 · major + minor of the current device; 90 where there is none, and for ROCm."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return 90
    return _capability_of(torch.cuda.current_device())


@functools.cache
def _capability_of(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def operands_in_registers() -> bool:
    """Whether tensor cores take both operands of a product from registers, as those up to 8.9 do.

    They need registers for operands beside those for sums: twice the warps, or half the rows, for a
    tile that fills the registers. Those of 9 to 11 read shared memory; those of 12 do not.
    """
    return not 90 <= compute_capability() < 120


def sums_in_tensor_memory() -> bool:
    """Whether tensor cores add in a memory of their own, as those of 10 and 11 do.

    What is there goes through shared memory on its way out.
    """
    return 100 <= compute_capability() < 120


def ceil_div(a: Any, b: int) -> Any:
    """⌈a/b⌉, also of symbolic integers."""
    return (a + b - 1) // b


def power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two ≥ `size`, within [low, high]."""
    return max(low, min(high, 1 << (size - 1).bit_length()))


def chunk_length(pair: Tensor | None, width: Any) -> int:
    """c of a permutation pair of `width` columns; 0 without a pair."""
    return 0 if pair is None else width // pair.shape[1]


def run_length(width: Any, block_size: int, *pairs: Tensor | None) -> int:
    """Columns, at most 16, whose aligned groups stay together under every pair, in every block.

    Such a group is one contiguous run of memory that begins at a multiple of its length.
    `block_size` is 0 where there are no blocks.
    """
    return math.gcd(16, block_size, *(chunk_length(pair, width) for pair in pairs))


def is_fused(pair: Tensor | None, width: Any, block_size: int) -> bool:
    """Whether a product of blocks gathers (scatters) by this pair itself."""
    return pair is not None and run_length(width, block_size, pair) >= FUSED_RUN


def permutable(x: Tensor, *pairs: Tensor | None) -> bool:
    """Whether the kernels take rows of this width and permute them by these pairs."""
    width = x.shape[-1]
    return static(width) and all(
        pair is None or run_length(width, 0, pair) >= FUSED_RUN or _row_fits(width)
        for pair in pairs
    )


def _row_fits(width: int) -> bool:
    """Whether `permute_columns` holds a row of single columns in shared memory."""
    padded = power_of_two(width, 32, 1 << 30)
    return padded <= MAX_PERMUTE_WIDTH and 4 * padded <= shared_memory()


def static(*sizes: Any) -> bool:
    """Whether these are plain ints: block sizes and row widths are constants of a kernel."""
    return all(isinstance(size, int) for size in sizes)


def row_or(pair: Tensor | None, row: int, otherwise: Tensor) -> Tensor:
    """A row of a pair; `otherwise`, for a kernel that will not read it, without a pair."""
    return otherwise if pair is None else pair.select(0, row)


def known(size: Any, otherwise: int) -> int:
    """A size for a heuristic: the size itself, or `otherwise` where it is symbolic.

    Asking a symbolic size for its hint would tie a cached kernel to the first batch seen.
    """
    return size if isinstance(size, int) else otherwise
