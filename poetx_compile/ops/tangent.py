"""``poetx::rotation_tangent``: what carries the gradient of a rotation that was folded away.

Where a rotation G(Q) is part of a precomputed weight, nothing differentiable leads from the outputs
back to Q. What is known there is the gradient with respect to an infinitesimal rotation E,

    ``G(Q') = (I + E) G(Q)``,  ``∂L/∂E = ∂L/∂G · Gᵀ``.

E as a function of Q' is zero at Q' = Q; its derivative there is that of ``G(Q') G(Q)⁻¹``. The
rotation of a block that multiplies from the other side is flipped, that of −Q: ``G(−Q) = G(Q)ᵀ``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops import kernels
from poetx_compile.ops.cayley import check_grad, check_skew
from poetx_compile.ops.packing import pack, unpack
from poetx_compile.ops.polynomial import polynomial, polynomial_backward
from poetx_compile.ops.precision import ieee_fp32, without_autocast
from poetx_compile.ops.rotation_delta import check_flipped, flip


def rotation_tangent_reference(
    skew: Tensor, block_size: int, order: int | None, narrow: bool = False, flipped: int = 0
) -> Tensor:
    """The value of `rotation_tangent`: zeros [blocks, b, b]."""
    return skew.new_zeros(skew.shape[0], block_size, block_size)


def rotation_tangent_backward_reference(
    grad: Tensor,
    skew: Tensor,
    block_size: int,
    order: int | None,
    narrow: bool = False,
    flipped: int = 0,
) -> Tensor:
    """The definition of the gradient of `rotation_tangent` in plain torch ops.

    As exact with `narrow` as without.
    """
    return flip(pack(_gradient(grad, unpack(flip(skew, flipped), block_size), order)), flipped)


def _gradient(grad: Tensor, q: Tensor, order: int | None) -> Tensor:
    """The skew gradient of Q from ``grad = ∂L/∂E``, ``G(Q') = (I + E) G(Q)``."""
    if order is None:
        # ∂L/∂G = grad G, and that of the Cayley transform, 2 (I+Q)⁻¹ ∂L/∂G (I+Q)⁻¹, combine.
        inverse = torch.linalg.inv(torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) + q)
        return 2 * (inverse @ (grad - grad.mT) @ inverse.mT)
    outer = torch.linalg.solve(polynomial(q, order), grad.mT).mT  # ∂L/∂G = grad G⁻ᵀ
    return polynomial_backward(outer, q, order)


def _check(skew: Tensor, block_size: int, order: int | None, flipped: int) -> None:
    check_skew(skew, block_size, 1 if order is None else order)
    check_flipped(skew, flipped)


@torch.library.custom_op("poetx::rotation_tangent", mutates_args=())
def rotation_tangent(
    skew: Tensor, block_size: int, order: int | None, narrow: bool = False, flipped: int = 0
) -> Tensor:
    """Zeros whose gradient is that of an infinitesimal rotation (see the module).

    Args:
        skew: [blocks, b(b−1)/2], float32 or float64: the entries of Q above the diagonal.
        block_size: b ≥ 1.
        order: k ≥ 1 of the Cayley-Neumann expansion, or ``None`` for the exact Cayley transform.
        narrow: as for `cayley_neumann`; concerns the backward.
        flipped: how many blocks, the last ones, are those of −Q.

    Returns:
        [blocks, b, b] of the same dtype, zero. It is meant for one level of differentiation: its
        derivative is right at every Q, its value only at the Q that was folded.
    """
    _check(skew, block_size, order, flipped)
    return rotation_tangent_reference(skew, block_size, order)


@torch.library.custom_op("poetx::rotation_tangent_backward", mutates_args=())
@without_autocast
@ieee_fp32()
def rotation_tangent_backward(
    grad: Tensor,
    skew: Tensor,
    block_size: int,
    order: int | None,
    narrow: bool = False,
    flipped: int = 0,
) -> Tensor:
    """Gradient of `rotation_tangent`: from [blocks, b, b] to the packed [blocks, b(b−1)/2]."""
    _check(skew, block_size, order, flipped)
    check_grad(grad, skew, block_size)
    args = (grad, skew, block_size, order, narrow, flipped)
    if kernels.applies("rotation_tangent_backward", *args):
        return kernels.run("rotation_tangent_backward", *args)
    return rotation_tangent_backward_reference(*args)


@rotation_tangent.register_fake
def _(
    skew: Tensor, block_size: int, order: int | None, narrow: bool = False, flipped: int = 0
) -> Tensor:
    _check(skew, block_size, order, flipped)
    return skew.new_empty(skew.shape[0], block_size, block_size)


@rotation_tangent_backward.register_fake
def _(
    grad: Tensor,
    skew: Tensor,
    block_size: int,
    order: int | None,
    narrow: bool = False,
    flipped: int = 0,
) -> Tensor:
    _check(skew, block_size, order, flipped)
    check_grad(grad, skew, block_size)
    return torch.empty_like(skew, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    skew, *ctx.arguments = inputs
    ctx.save_for_backward(skew)  # the packed vector and nothing else


def _backward(ctx, grad):
    (skew,) = ctx.saved_tensors
    backward = torch.ops.poetx.rotation_tangent_backward
    return backward(grad, skew, *ctx.arguments), None, None, None, None


rotation_tangent.register_autograd(_backward, setup_context=_save)
