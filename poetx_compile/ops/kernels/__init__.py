"""Triton kernels of the ops, and the one predicate that says when they run.

Importing this package imports no Triton: `applies` looks, and only `run` loads a kernel's module.
Wherever `applies` is false the reference runs; nothing is tried and caught.

=========================  ====================================  ===============================
op                         kernel                                arguments it takes
=========================  ====================================  ===============================
`cayley_neumann`           `cayley.cayley_neumann`               fp32, every order
`cayley_neumann_backward`  `cayley.cayley_neumann_backward`      fp32, order 3
`rotate_blocks`            `rotate.rotate_blocks`                x fp32/bf16/fp16, rotation fp32
`block_product`            `block_product.block_product`         fp32/bf16/fp16, also mixed
`permute_columns`          `permute.permute_columns`             2- and 4-byte elements
=========================  ====================================  ===============================
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# ROCm devices have this type too; `input_precision` knows the difference.
_DEVICE_TYPE = "cuda"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

MAX_PERMUTE_WIDTH = 32768
"""Columns of a row that `permute_columns` holds in shared memory at once (4 bytes each)."""


@functools.cache
def _triton_runs_on(index: int) -> bool:
    """Whether Triton is installed and compiles bf16 products for device `index`."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


def _cayley_neumann(skew: Tensor, block_size: int, order: int) -> bool:
    return skew.dtype == torch.float32 and block_size >= 2


def _cayley_neumann_backward(grad: Tensor, skew: Tensor, block_size: int, order: int) -> bool:
    fp32 = skew.dtype == grad.dtype == torch.float32
    return fp32 and block_size >= 2 and order == 3


def _rotate_blocks(x: Tensor, rotation: Tensor, *_: Any) -> bool:
    return x.dtype in _FLOATS and rotation.dtype == torch.float32 and _static(rotation.shape[1])


def _block_product(x: Tensor, y: Tensor, blocks: int, block_size: int, *_: Any) -> bool:
    static = _static(blocks) and _static(block_size)
    return x.dtype in _FLOATS and y.dtype in _FLOATS and static and blocks > 0


def _permute_columns(x: Tensor, pair: Tensor, inverse: bool) -> bool:
    width = x.shape[-1]
    return x.element_size() in (2, 4) and _static(width) and width <= MAX_PERMUTE_WIDTH


def _static(size: Any) -> bool:
    """A plain int: block sizes and row widths are constants of a kernel."""
    return isinstance(size, int)


_MODULES = {
    "cayley_neumann": "cayley",
    "cayley_neumann_backward": "cayley",
    "rotate_blocks": "rotate",
    "block_product": "block_product",
    "permute_columns": "permute",
}

_ARGUMENTS: dict[str, Callable[..., bool]] = {
    "cayley_neumann": _cayley_neumann,
    "cayley_neumann_backward": _cayley_neumann_backward,
    "rotate_blocks": _rotate_blocks,
    "block_product": _block_product,
    "permute_columns": _permute_columns,
}


def applies(op: str, *args: Any) -> bool:
    """Whether the kernel of `op` runs for these arguments (real or fake tensors).

    A symbolic number of tokens counts as not empty: the op looks again when it runs.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    device = tensors[0].device
    if device.type != _DEVICE_TYPE or any(t.device != device for t in tensors):
        return False
    if any(isinstance(size, int) and size == 0 for t in tensors for size in t.shape):
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _triton_runs_on(index) and _ARGUMENTS[op](*args)


def run(op: str, *args: Any) -> Tensor:
    """Launch the kernel of `op`; only where `applies` is true.

    Returns:
        What the op returns, a contiguous tensor of its own.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    with torch.cuda.device(tensors[0].device):  # Triton launches on the current device
        return implementation(op)(*args)


def implementation(op: str) -> Any:
    """The host function of the kernel of `op`; loads Triton."""
    module = importlib.import_module(f"poetx_compile.ops.kernels.{_MODULES[op]}")
    return getattr(module, op)
