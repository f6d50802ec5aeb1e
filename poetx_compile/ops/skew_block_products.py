"""``poetx::skew_block_products``: the gradients of rotations at the identity, packed."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.block_product import (
    block_product_reference,
    check_operands,
    kernel_takes,
)
from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.packing import pack, packed_size
from poetx_compile.ops.precision import rotation_dtype
from poetx_compile.ops.registry import define


def skew_block_products_reference(
    x: Tensor,
    y: Tensor,
    blocks: int,
    block_size: int,
    gather: Tensor | None = None,
    x2: Tensor | None = None,
    y2: Tensor | None = None,
    blocks2: int = 0,
    gather2: Tensor | None = None,
) -> Tensor:
    """``2 (X_kᵀ Y_k − Y_kᵀ X_k)`` above the diagonal, for blocks k of gathered columns, packed.

    The gradient of the skew parameters of a side whose rotations are the identity,
    ``∂G/∂Q = 2``: x the activations of that side, y their gradient. A second pair of operands, the
    other side of a layer, is one more stack of blocks behind the first: one launch for both.

    Args:
        x, y: [..., d] of one shape and dtype, floating point.
        blocks, block_size: how many blocks of x and y, and b, of all.
        gather: permutation pair of the columns of x and y, int64 [2, d/c] with any c that divides d
            (see `permute_columns`), or ``None``.
        x2, y2, blocks2, gather2: the same of a second product over the same tokens, [..., d2] of
            x's dtype.

    Returns:
        [blocks + blocks2, b(b−1)/2] in float32 (float64 for float64), accumulated in that dtype.
    """
    made = _skew(x, y, blocks, block_size, gather)
    if x2 is None or y2 is None:
        return made
    return torch.cat([made, _skew(x2, y2, blocks2, block_size, gather2)])


def _skew(x: Tensor, y: Tensor, blocks: int, block_size: int, gather: Tensor | None) -> Tensor:
    product = block_product_reference(x, y, blocks, block_size, gather, gather)
    return pack(2 * (product - product.mT))


def _check(x, y, blocks, block_size, gather, x2, y2, blocks2, gather2) -> None:
    check_operands(x, y, blocks, block_size, gather, gather, ("gather", "gather"))
    torch._check(
        (x2 is None) == (y2 is None) and (x2 is not None or (blocks2 == 0 and gather2 is None)),
        lambda: "poetx: a second product needs both x2 and y2",
    )
    if x2 is not None:
        check_operands(x2, y2, blocks2, block_size, gather2, gather2, ("gather2", "gather2"))
        torch._check(
            x.shape[:-1] == x2.shape[:-1],
            lambda: (
                "poetx: both products must be over the same tokens, "
                f"got {list(x.shape)} and {list(x2.shape)}"
            ),
        )
    dtypes = {t.dtype for t in (x, y, x2, y2) if t is not None}
    torch._check(
        len(dtypes) == 1,
        lambda: f"poetx: the operands must have one dtype, got {sorted(map(str, dtypes))}",
    )


def _fake(x, y, blocks, block_size, gather, x2, y2, blocks2, gather2):
    size = packed_size(block_size)
    return x.new_empty(blocks + blocks2, size, dtype=rotation_dtype(x.dtype))


def _kernel_takes(x, y, blocks, block_size, gather, x2, y2, blocks2, gather2) -> bool:
    if block_size == 1 or not kernel_takes(x, y, blocks, block_size, gather, gather):
        return False
    return x2 is None or kernel_takes(x2, y2, blocks2, block_size, gather2, gather2)


skew_block_products = define(
    "skew_block_products",
    skew_block_products_reference,
    check=_check,
    fake=_fake,
    kernel=Kernel("block_product.skew_block_products", _kernel_takes),
)
