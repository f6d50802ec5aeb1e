"""``poetx::stacked_block_products``: the gradients of both rotations of a layer in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.block_product import (
    block_product_gradients,
    block_product_reference,
    check_operands,
    kernel_takes,
)
from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.precision import rotation_dtype, without_autocast
from poetx_compile.ops.registry import define


def _check(x1, y1, x2, y2, blocks1, blocks2, block_size, gather1, gather2) -> None:
    check_operands(x1, y1, blocks1, block_size, gather1, gather1, ("gather1", "gather1"))
    check_operands(x2, y2, blocks2, block_size, gather2, gather2, ("gather2", "gather2"))
    torch._check(
        x1.shape[:-1] == x2.shape[:-1],
        lambda: (
            "poetx: both products must be over the same tokens, "
            f"got {list(x1.shape)} and {list(x2.shape)}"
        ),
    )
    torch._check(
        x1.dtype == y1.dtype == x2.dtype == y2.dtype,
        lambda: (
            "poetx: the operands must have one dtype, "
            f"got {x1.dtype}, {y1.dtype}, {x2.dtype} and {y2.dtype}"
        ),
    )


def stacked_block_products_reference(
    x1: Tensor,
    y1: Tensor,
    x2: Tensor,
    y2: Tensor,
    blocks1: int,
    blocks2: int,
    block_size: int,
    gather1: Tensor | None = None,
    gather2: Tensor | None = None,
) -> Tensor:
    """``block_product`` of x1 and y1, then that of x2 and y2, as one stack of blocks.

    A kernel splits the tokens to fill the device and adds the partial sums afterwards; two products
    together need fewer splits, and one launch each for the products and the sums.

    Args:
        x1, y1: [..., d1], floating point.
        x2, y2: [..., d2] of the same leading shape and dtype.
        blocks1, blocks2: how many blocks of either product.
        block_size: b, of both.
        gather1, gather2: permutation pairs, int64 [2, d/c], of the columns of both operands of a
            product (see `permute_columns`), or ``None``.

    Returns:
        [blocks1 + blocks2, b, b] in float32 (float64 for float64 inputs), accumulated in that
        dtype.
    """
    first = block_product_reference(x1, y1, blocks1, block_size, gather1, gather1)
    second = block_product_reference(x2, y2, blocks2, block_size, gather2, gather2)
    return torch.cat([first, second])


def _fake(x1, y1, x2, y2, blocks1, blocks2, block_size, gather1, gather2):
    return x1.new_empty(blocks1 + blocks2, block_size, block_size, dtype=rotation_dtype(x1.dtype))


def _kernel_takes(x1, y1, x2, y2, blocks1, blocks2, block_size, gather1, gather2) -> bool:
    first = kernel_takes(x1, y1, blocks1, block_size, gather1, gather1)
    return first and kernel_takes(x2, y2, blocks2, block_size, gather2, gather2)


stacked_block_products = define(
    "stacked_block_products",
    stacked_block_products_reference,
    check=_check,
    fake=_fake,
    kernel=Kernel("block_product.stacked_block_products", _kernel_takes),
)


def _setup(ctx, inputs, output) -> None:
    x1, y1, x2, y2, ctx.blocks1, _, _, gather1, gather2 = inputs
    ctx.save_for_backward(x1, y1, x2, y2, gather1, gather2)


@without_autocast
def _backward(ctx, grad):
    x1, y1, x2, y2, gather1, gather2 = ctx.saved_tensors
    first, second = grad[: ctx.blocks1], grad[ctx.blocks1 :]
    needs = ctx.needs_input_grad
    return (
        *block_product_gradients(first, x1, y1, gather1, gather1, *needs[:2]),
        *block_product_gradients(second, x2, y2, gather2, gather2, *needs[2:4]),
        *[None] * 5,
    )


stacked_block_products.register_autograd(_backward, setup_context=_setup)
