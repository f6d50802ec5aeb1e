"""Triton kernels of the ops, and the one predicate that says when they run.

Importing this package imports no Triton: `applies` looks, and only `run` loads a kernel's module.
Wherever `applies` is false the reference runs; nothing is tried and caught.

=========================  ====================================  ===============================
op                         kernel                                arguments it takes
=========================  ====================================  ===============================
`cayley_neumann`           `cayley.cayley_neumann`               fp32, every order
`cayley_neumann_backward`  `cayley.cayley_neumann_backward`      fp32, order 3
`rotation_delta`           `cayley_narrow.rotation_delta`        fp32 to bf16/fp16, order 3, b ≤ 256
`rotation_tangent_…`       `tangent.rotation_tangent_backward`   fp32, order 3, narrow, b ≤ 256
`fold_weight`              `fold.fold_weight`                    to bf16/fp16
`rotate_blocks`            `rotate.rotate_blocks`                x fp32/bf16/fp16, rotation fp32
`block_product`            `block_product.block_product`         fp32/bf16/fp16, also mixed
`stacked_block_products`   `block_product.stacked_…`             fp32/bf16/fp16
`permute_columns`          `permute.permute_columns`             2- and 4-byte elements; rows up to
                                                                 `MAX_PERMUTE_WIDTH`, of any width
                                                                 in chunks
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

from poetx_compile.ops.kernels.common import FUSED_RUN, run_length
from poetx_compile.ops.kernels.narrow import narrow_applies

# ROCm devices have this type too; `input_precision` knows the difference.
_DEVICE_TYPE = "cuda"
_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALVES)

MAX_PERMUTE_WIDTH = 32768
"""Columns of a row that `permute_columns` holds in shared memory at once (4 bytes each), where the
chunks of the permutation are too short to be moved one by one."""


@functools.cache
def _triton_runs_on(index: int) -> bool:
    """Whether Triton is installed and compiles bf16 products for device `index`."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


def _cayley_neumann(skew: Tensor, block_size: int, order: int, narrow: bool = False) -> bool:
    return skew.dtype == torch.float32 and block_size >= 2


def _cayley_neumann_backward(
    grad: Tensor, skew: Tensor, block_size: int, order: int, narrow: bool = False
) -> bool:
    fp32 = skew.dtype == grad.dtype == torch.float32
    return fp32 and block_size >= 2 and order == 3


def _rotation_delta(
    skew: Tensor, block_size: int, order: int | None, dtype: torch.dtype, flipped: int = 0
) -> bool:
    narrow = skew.dtype == torch.float32 and dtype in _HALVES
    return narrow and narrow_applies(block_size, order)


def _rotation_tangent_backward(
    grad: Tensor,
    skew: Tensor,
    block_size: int,
    order: int | None,
    narrow: bool = False,
    flipped: int = 0,
) -> bool:
    fp32 = skew.dtype == grad.dtype == torch.float32
    return fp32 and narrow and narrow_applies(block_size, order)


def _fold_weight(
    weight: Tensor,
    delta_in: Tensor | None,
    delta_out: Tensor | None,
    perm_in: Tensor | None,
    perm_out: Tensor | None,
    dtype: torch.dtype,
) -> bool:
    if dtype not in _HALVES or weight.dtype not in _FLOATS or delta_in is delta_out is None:
        return False
    return all(map(_static, weight.shape)) and _permutable(weight, perm_in)


def _rotate_blocks(
    x: Tensor, rotation: Tensor, gather: Tensor | None, scatter: Tensor | None, _: bool
) -> bool:
    floats = x.dtype in _FLOATS and rotation.dtype == torch.float32
    return floats and _static(rotation.shape[1]) and _permutable(x, gather, scatter)


def _block_product(
    x: Tensor,
    y: Tensor,
    blocks: int,
    block_size: int,
    gather_x: Tensor | None,
    gather_y: Tensor | None,
) -> bool:
    floats = x.dtype in _FLOATS and y.dtype in _FLOATS
    static = _static(blocks) and _static(block_size) and blocks > 0
    return floats and static and _permutable(x, gather_x, gather_y)


def _stacked_block_products(
    x1: Tensor,
    y1: Tensor,
    x2: Tensor,
    y2: Tensor,
    blocks1: int,
    blocks2: int,
    block_size: int,
    gather1: Tensor | None,
    gather2: Tensor | None,
) -> bool:
    first = _block_product(x1, y1, blocks1, block_size, gather1, gather1)
    return first and _block_product(x2, y2, blocks2, block_size, gather2, gather2)


def _permute_columns(x: Tensor, pair: Tensor, inverse: bool) -> bool:
    return x.element_size() in (2, 4) and _permutable(x, pair)


def _permutable(x: Tensor, *pairs: Tensor | None) -> bool:
    """Whether the kernels take rows of this width and permute them by these pairs."""
    width = x.shape[-1]
    return _static(width) and all(
        pair is None or width <= MAX_PERMUTE_WIDTH or run_length(width, 0, pair) >= FUSED_RUN
        for pair in pairs
    )


def _static(size: Any) -> bool:
    """A plain int: block sizes and row widths are constants of a kernel."""
    return isinstance(size, int)


_MODULES = {
    "cayley_neumann": "cayley",
    "cayley_neumann_backward": "cayley",
    "rotation_delta": "cayley_narrow",
    "rotation_tangent_backward": "tangent",
    "fold_weight": "fold",
    "rotate_blocks": "rotate",
    "block_product": "block_product",
    "stacked_block_products": "block_product",
    "permute_columns": "permute",
}

OPS = tuple(_MODULES)
"""The ops that have a kernel."""

_ARGUMENTS: dict[str, Callable[..., bool]] = {
    "cayley_neumann": _cayley_neumann,
    "cayley_neumann_backward": _cayley_neumann_backward,
    "rotation_delta": _rotation_delta,
    "rotation_tangent_backward": _rotation_tangent_backward,
    "fold_weight": _fold_weight,
    "rotate_blocks": _rotate_blocks,
    "block_product": _block_product,
    "stacked_block_products": _stacked_block_products,
    "permute_columns": _permute_columns,
}


def applies(op: str, *args: Any) -> bool:
    """Whether the kernel of `op` runs for these arguments (real or fake tensors).

    A symbolic number of tokens counts as not empty: the op looks again when it runs. An op that
    has no kernel is false.
    """
    takes = _ARGUMENTS.get(op)
    if takes is None:
        return False
    tensors = [a for a in args if isinstance(a, Tensor)]
    device = tensors[0].device
    if device.type != _DEVICE_TYPE or any(t.device != device for t in tensors):
        return False
    if any(isinstance(size, int) and size == 0 for t in tensors for size in t.shape):
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _triton_runs_on(index) and takes(*args)


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
