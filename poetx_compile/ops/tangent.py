"""``poetx::rotation_tangent``: what carries the gradient of a rotation that was folded away.

Where a rotation G(Q) is part of a precomputed weight, nothing differentiable leads from the outputs
back to Q. What is known there is the gradient with respect to an infinitesimal rotation E,

    ``G(Q') = (I + E) G(Q)``,  ``∂L/∂E = ∂L/∂G · Gᵀ``.

E as a function of Q' is zero at Q' = Q; its derivative there is that of ``G(Q') G(Q)⁻¹``. The
rotation of a block that multiplies from the other side is transposed: ``G(−Q) = G(Q)ᵀ``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.cayley import check_grad, matrices_like, packed_like
from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.kernels.low_precision import low_precision_applies
from poetx_compile.ops.packing import pack, unpack
from poetx_compile.ops.polynomial import polynomial, polynomial_backward
from poetx_compile.ops.registry import define
from poetx_compile.ops.rotation_delta import check_blocks, transpose_last


def rotation_tangent_reference(
    skew: Tensor, block_size: int, order: int | None, narrow: bool = False, flipped: int = 0
) -> Tensor:
    """Zeros whose gradient is that of an infinitesimal rotation (see the module).

    Args:
        skew: [blocks, b(b−1)/2], float32 or float64: the entries of Q above the diagonal.
        block_size: b ≥ 1.
        order: k ≥ 1 of the Cayley-Neumann expansion, or ``None`` for the exact Cayley transform.
        narrow: as for `cayley_neumann`; concerns the backward.
        flipped: how many blocks, the last ones, are transposed, those of −Q.

    Returns:
        [blocks, b, b] of the same dtype, zero. It is meant for one level of differentiation: its
        derivative is right at every Q, its value only at the Q that was folded.
    """
    return skew.new_zeros(skew.shape[0], block_size, block_size)


def rotation_tangent_backward_reference(
    grad: Tensor,
    skew: Tensor,
    block_size: int,
    order: int | None,
    narrow: bool = False,
    flipped: int = 0,
) -> Tensor:
    """Gradient of `rotation_tangent`: from [blocks, b, b] to the packed [blocks, b(b−1)/2]."""
    q = unpack(transpose_last(skew, flipped), block_size)
    return transpose_last(pack(_gradient(grad, q, order)), flipped)


def _gradient(grad: Tensor, q: Tensor, order: int | None) -> Tensor:
    """The skew gradient of Q from ``grad = ∂L/∂E``, ``G(Q') = (I + E) G(Q)``."""
    if order is None:
        # ∂L/∂G = grad G, and that of the Cayley transform, 2 (I+Q)⁻¹ ∂L/∂G (I+Q)⁻¹, combine.
        inverse = torch.linalg.inv(torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) + q)
        return 2 * (inverse @ (grad - grad.mT) @ inverse.mT)
    outer = torch.linalg.solve(polynomial(q, order), grad.mT).mT  # ∂L/∂G = grad G⁻ᵀ
    return polynomial_backward(outer, q, order)


def _check_backward(grad: Tensor, skew: Tensor, block_size: int, *rest) -> None:
    check_blocks(skew, block_size, *rest)
    check_grad(grad, skew, block_size)


def _backward_kernel_takes(
    grad: Tensor, skew: Tensor, block_size: int, order: int | None, narrow: bool, flipped: int
) -> bool:
    fp32 = skew.dtype == grad.dtype == torch.float32
    return fp32 and narrow and low_precision_applies(block_size, order)


rotation_tangent = define(
    "rotation_tangent",
    rotation_tangent_reference,
    check=check_blocks,
    fake=matrices_like,
    drawn="rotation",
)
rotation_tangent_backward = define(
    "rotation_tangent_backward",
    rotation_tangent_backward_reference,
    check=_check_backward,
    fake=packed_like,
    kernel=Kernel("tangent.rotation_tangent_backward", _backward_kernel_takes),
    ieee=True,
)


def _save(ctx, inputs, output) -> None:
    skew, *ctx.arguments = inputs
    ctx.save_for_backward(skew)  # the packed vector and nothing else


def _backward(ctx, grad):
    (skew,) = ctx.saved_tensors
    backward = torch.ops.poetx.rotation_tangent_backward
    return backward(grad, skew, *ctx.arguments), None, None, None, None


rotation_tangent.register_autograd(_backward, setup_context=_save)
