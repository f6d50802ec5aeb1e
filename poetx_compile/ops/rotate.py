"""``poetx::rotate_blocks``: the block-diagonal product, with its columns gathered and scattered."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.kernels.common import FLOATS, permutable, static
from poetx_compile.ops.precision import without_autocast
from poetx_compile.ops.registry import define
from poetx_compile.ops.rotate_by_delta import check_product, rotate_by_delta_reference


def _check(x: Tensor, rotation: Tensor, gather, scatter, transpose: bool) -> None:
    check_product(x, rotation, "rotation", gather, scatter)
    torch._check(
        rotation.dtype in (torch.float32, torch.float64),
        lambda: f"poetx: rotation must be float32 or float64, got {rotation.dtype}",
    )


def rotate_blocks_reference(
    x: Tensor,
    rotation: Tensor,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    transpose: bool = False,
) -> Tensor:
    """``y[..., σ] = x[..., γ] · blockdiag(G₁, …)``; coordinates past the last block pass through.

    The product is evaluated as ``x + x (G − I)``: exact at G = I in any dtype and under TF32, and a
    small rotation keeps its relative precision when it is rounded to bf16 (an entry 1 − θ²/2 of G
    would lose it).

    Args:
        x: [..., d], floating point. Under autocast it is cast to the autocast dtype, as the input
            of a linear is; the rotation stays fp32 and is rounded as G − I.
        rotation: [blocks, b, b] with blocks·b ≤ d, float32 or float64.
        gather: permutation pair γ of the input columns, int64 [2, d/c] with any c that divides d
            (see `permute_columns`), or ``None``.
        scatter: permutation pair σ of the output columns, with a c of its own, or ``None``.
        transpose: multiply by the transposed blocks.

    Returns:
        [..., d], contiguous, of x's dtype.
    """
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    delta = ((rotation.mT if transpose else rotation) - eye).to(x.dtype)
    return rotate_by_delta_reference(x, delta, gather, scatter)


def _kernel_takes(x: Tensor, rotation: Tensor, gather, scatter, transpose: bool) -> bool:
    floats = x.dtype in FLOATS and rotation.dtype == torch.float32
    return floats and static(rotation.shape[1]) and permutable(x, gather, scatter)


rotate_blocks = define(
    "rotate_blocks",
    rotate_blocks_reference,
    check=_check,
    fake=lambda x, *_: x.new_empty(x.shape),
    kernel=Kernel("rotate.rotate_blocks", _kernel_takes),
    casts_first=True,
    drawn="activation",
)


def _setup(ctx, inputs, output) -> None:
    x, rotation, gather, scatter, ctx.transpose = inputs
    needs_x, needs_rotation = ctx.needs_input_grad[:2]
    # x is needed for the gradient of the rotation only, the rotation for that of x only.
    ctx.blocks, ctx.block_size = rotation.shape[:2]
    ctx.save_for_backward(
        x if needs_rotation else None, rotation if needs_x else None, gather, scatter
    )


@without_autocast
def _backward(ctx, grad):
    x, rotation, gather, scatter = ctx.saved_tensors
    grad_x = grad_rotation = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.poetx.rotate_blocks(grad, rotation, scatter, gather, not ctx.transpose)
    if ctx.needs_input_grad[1]:
        left, right = (
            ((grad, scatter), (x, gather)) if ctx.transpose else ((x, gather), (grad, scatter))
        )
        grad_rotation = torch.ops.poetx.block_product(
            left[0], right[0], ctx.blocks, ctx.block_size, left[1], right[1]
        )
    return grad_x, grad_rotation, None, None, None


rotate_blocks.register_autograd(_backward, setup_context=_setup)
