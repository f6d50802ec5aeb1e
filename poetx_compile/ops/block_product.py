"""``poetx::block_product``: the diagonal blocks of ``Xᵀ Y``, the gradient of a rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.kernels.common import FLOATS, permutable, static
from poetx_compile.ops.permute import check_pair, pair_index
from poetx_compile.ops.precision import rotation_dtype, without_autocast
from poetx_compile.ops.registry import define


def check_operands(
    x, y, blocks: int, block_size: int, gather_x, gather_y, names=("gather_x", "gather_y")
) -> None:
    """Raise unless these are arguments of `block_product`; `names` are those of the gathers."""
    torch._check(
        x.shape == y.shape and x.dim() >= 1,
        lambda: f"poetx: x and y must have one shape, got {list(x.shape)} and {list(y.shape)}",
    )
    torch._check(
        blocks >= 0 and block_size >= 1 and blocks * block_size <= x.shape[-1],
        lambda: f"poetx: {blocks} blocks of {block_size} do not fit into {x.shape[-1]} columns",
    )
    check_pair(gather_x, x.shape[-1], names[0])
    check_pair(gather_y, y.shape[-1], names[1])


def _columns(x: Tensor, gather: Tensor | None, blocks: int, b: int, dtype: torch.dtype) -> Tensor:
    """The rotated columns of x in block layout: [..., d] → [blocks, tokens, b]."""
    if gather is not None:
        x = x.index_select(-1, pair_index(gather, 0, x.shape[-1])[: blocks * b])
    elif blocks * b < x.shape[-1]:
        x = x[..., : blocks * b]
    return x.reshape(-1, blocks, b).transpose(0, 1).to(dtype)


def block_product_reference(
    x: Tensor,
    y: Tensor,
    blocks: int,
    block_size: int,
    gather_x: Tensor | None = None,
    gather_y: Tensor | None = None,
) -> Tensor:
    """Blocks ``X_kᵀ Y_k`` over the tokens, for the first blocks·b gathered columns of x and y.

    Args:
        x, y: [..., d] of one shape, floating point.
        blocks, block_size: how many blocks, and b.
        gather_x, gather_y: permutation pairs of the columns, int64 [2, d/c] with any c that divides
            d (see `permute_columns`), or ``None``.

    Returns:
        [blocks, b, b] in float32 (float64 for float64 inputs), accumulated in that dtype.
    """
    dtype = rotation_dtype(torch.promote_types(x.dtype, y.dtype))
    if blocks == 0:
        return x.new_zeros(0, block_size, block_size, dtype=dtype)
    left = _columns(x, gather_x, blocks, block_size, dtype)
    right = _columns(y, gather_y, blocks, block_size, dtype)
    return torch.bmm(left.mT, right)


def _fake(x, y, blocks, block_size, gather_x, gather_y):
    dtype = rotation_dtype(torch.promote_types(x.dtype, y.dtype))
    return x.new_empty(blocks, block_size, block_size, dtype=dtype)


def kernel_takes(x, y, blocks, block_size, gather_x, gather_y) -> bool:
    """fp32, bf16 or fp16, also mixed."""
    floats = x.dtype in FLOATS and y.dtype in FLOATS
    return (
        floats and static(blocks, block_size) and blocks > 0 and permutable(x, gather_x, gather_y)
    )


block_product = define(
    "block_product",
    block_product_reference,
    check=check_operands,
    fake=_fake,
    kernel=Kernel("block_product.block_product", kernel_takes),
)


def block_product_gradients(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    gather_x: Tensor | None,
    gather_y: Tensor | None,
    needs_x: bool = True,
    needs_y: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """``dX_k = Y_k dPᵀ`` and ``dY_k = X_k dP``; columns outside the blocks get zero.

    Args:
        grad: dP, [blocks, b, b], the gradient of `block_product`.
        x, y, gather_x, gather_y: as given to it.
        needs_x, needs_y: which gradients to compute; the others are ``None``.
    """
    blocks, b = grad.shape[:2]

    def multiply(other, gather_other, matrix, like, gather_like):
        if blocks == 0:
            return torch.zeros_like(like)
        columns = _columns(other, gather_other, blocks, b, grad.dtype)
        product = torch.bmm(columns, matrix).transpose(0, 1)
        product = product.reshape(*like.shape[:-1], blocks * b)
        product = torch.nn.functional.pad(product, (0, like.shape[-1] - blocks * b)).to(like.dtype)
        if gather_like is None:
            return product
        return product.index_select(-1, pair_index(gather_like, 1, like.shape[-1]))

    return (
        multiply(y, gather_y, grad.mT, x, gather_x) if needs_x else None,
        multiply(x, gather_x, grad, y, gather_y) if needs_y else None,
    )


def _setup(ctx, inputs, output) -> None:
    x, y, _, _, gather_x, gather_y = inputs
    ctx.save_for_backward(x, y, gather_x, gather_y)


@without_autocast
def _backward(ctx, grad):
    gradients = block_product_gradients(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:2])
    return *gradients, None, None, None, None


block_product.register_autograd(_backward, setup_context=_setup)
