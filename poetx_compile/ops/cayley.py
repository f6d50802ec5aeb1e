"""``poetx::cayley_neumann`` and ``poetx::cayley_exact``: packed skew parameters → rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops import kernels
from poetx_compile.ops.packing import pack, packed_size, unpack
from poetx_compile.ops.polynomial import polynomial, polynomial_backward
from poetx_compile.ops.precision import ieee_fp32, without_autocast


def rotations(skew: Tensor, block_size: int, order: int | None, narrow: bool = False) -> Tensor:
    """Rotations of packed skew blocks: Cayley-Neumann of `order`, or exact where it is ``None``.

    `narrow` as for `cayley_neumann`; the exact transform is a solve, which has no narrow form.
    """
    if order is None:
        return torch.ops.poetx.cayley_exact(skew, block_size)
    return torch.ops.poetx.cayley_neumann(skew, block_size, order, narrow)


@ieee_fp32()
def rotations_reference(skew: Tensor, block_size: int, order: int | None) -> Tensor:
    """`rotations` in plain torch ops, which every transform of torch knows."""
    if order is None:
        return cayley_exact_reference(skew, block_size)
    return cayley_neumann_reference(skew, block_size, order)


def check_skew(skew: Tensor, block_size: int, order: int = 1) -> None:
    """Check the arguments that the ops of packed skew blocks share."""
    torch._check(block_size >= 1, lambda: f"poetx: block_size must be ≥ 1, got {block_size}")
    torch._check(order >= 1, lambda: f"poetx: the Neumann order must be ≥ 1, got {order}")
    torch._check(
        skew.dim() == 2 and skew.shape[1] == packed_size(block_size),
        lambda: (
            f"poetx: skew must be [blocks, {packed_size(block_size)}] for block_size {block_size}, "
            f"got {list(skew.shape)}"
        ),
    )
    torch._check(
        skew.dtype in (torch.float32, torch.float64),
        lambda: f"poetx: skew parameters must be float32 or float64, got {skew.dtype}",
    )


def check_grad(grad: Tensor, skew: Tensor, block_size: int) -> None:
    """Check that `grad` has a matrix for each block of `skew`."""
    expected = (skew.shape[0], block_size, block_size)
    torch._check(
        grad.shape == expected,
        lambda: f"poetx: grad must be {list(expected)}, got {list(grad.shape)}",
    )


def cayley_neumann_reference(
    skew: Tensor, block_size: int, order: int, narrow: bool = False
) -> Tensor:
    """The definition of `cayley_neumann` in plain torch ops (also what Inductor compiles).

    As exact with `narrow` as without.
    """
    return polynomial(unpack(skew, block_size), order)


def cayley_neumann_backward_reference(
    grad: Tensor, skew: Tensor, block_size: int, order: int, narrow: bool = False
) -> Tensor:
    """The definition of the gradient of `cayley_neumann` in plain torch ops."""
    return pack(polynomial_backward(grad, unpack(skew, block_size), order))


def cayley_exact_reference(skew: Tensor, block_size: int) -> Tensor:
    """The definition of `cayley_exact` in plain torch ops."""
    q = unpack(skew, block_size)
    eye = torch.eye(block_size, dtype=q.dtype, device=q.device)
    # The factors commute, so the solve may stand on the left.
    return torch.linalg.solve(eye - q, eye + q).contiguous()


def cayley_exact_backward_reference(grad: Tensor, skew: Tensor, block_size: int) -> Tensor:
    """The definition of the gradient of `cayley_exact` in plain torch ops."""
    q = unpack(skew, block_size)
    eye = torch.eye(block_size, dtype=q.dtype, device=q.device)
    inverse = torch.linalg.inv(eye + q)  # Mᵀ, because Qᵀ = −Q
    full = 2 * (inverse @ grad @ inverse)
    return pack(full - full.mT)


@torch.library.custom_op("poetx::cayley_neumann", mutates_args=())
@without_autocast
@ieee_fp32()
def cayley_neumann(skew: Tensor, block_size: int, order: int, narrow: bool = False) -> Tensor:
    """Rotations ``G = (I+Q)(I + Q + … + Q^k)`` of packed skew-symmetric blocks.

    Args:
        skew: [blocks, b(b−1)/2], float32 or float64: the entries of Q above the diagonal.
        block_size: b ≥ 1.
        order: k ≥ 1.
        narrow: the rotations are going to be rounded to bf16 or fp16 anyway: products may take
            bf16 operands, also in the backward; sums stay fp32 (docs/numerics.md). A permission:
            where no such kernel runs, the products are exact.

    Returns:
        [blocks, b, b] of the same dtype; nearly orthogonal, ``G = (I+Q)(I−Q)⁻¹(I−Q^(k+1))``.
    """
    check_skew(skew, block_size, order)
    if kernels.applies("cayley_neumann", skew, block_size, order, narrow):
        return kernels.run("cayley_neumann", skew, block_size, order, narrow)
    return cayley_neumann_reference(skew, block_size, order)


@torch.library.custom_op("poetx::cayley_neumann_backward", mutates_args=())
@without_autocast
@ieee_fp32()
def cayley_neumann_backward(
    grad: Tensor, skew: Tensor, block_size: int, order: int, narrow: bool = False
) -> Tensor:
    """Gradient of `cayley_neumann`: from [blocks, b, b] to the packed [blocks, b(b−1)/2]."""
    check_skew(skew, block_size, order)
    check_grad(grad, skew, block_size)
    if kernels.applies("cayley_neumann_backward", grad, skew, block_size, order, narrow):
        return kernels.run("cayley_neumann_backward", grad, skew, block_size, order, narrow)
    return cayley_neumann_backward_reference(grad, skew, block_size, order)


@torch.library.custom_op("poetx::cayley_exact", mutates_args=())
@without_autocast
@ieee_fp32()
def cayley_exact(skew: Tensor, block_size: int) -> Tensor:
    """Exactly orthogonal ``G = (I+Q)(I−Q)⁻¹`` of packed skew blocks, by a batched solve.

    Shapes and dtypes as for `cayley_neumann`.
    """
    check_skew(skew, block_size)
    return cayley_exact_reference(skew, block_size)


@torch.library.custom_op("poetx::cayley_exact_backward", mutates_args=())
@without_autocast
@ieee_fp32()
def cayley_exact_backward(grad: Tensor, skew: Tensor, block_size: int) -> Tensor:
    """Gradient of `cayley_exact`: ``dQ = 2 Mᵀ dG Mᵀ`` with ``M = (I−Q)⁻¹``, packed."""
    check_skew(skew, block_size)
    check_grad(grad, skew, block_size)
    return cayley_exact_backward_reference(grad, skew, block_size)


def _matrix_like(skew: Tensor, block_size: int, order: int = 1, narrow: bool = False) -> Tensor:
    check_skew(skew, block_size, order)
    return skew.new_empty(skew.shape[0], block_size, block_size)


def _packed_like(
    grad: Tensor, skew: Tensor, block_size: int, order: int = 1, narrow: bool = False
) -> Tensor:
    check_skew(skew, block_size, order)
    check_grad(grad, skew, block_size)
    return torch.empty_like(skew, memory_format=torch.contiguous_format)


cayley_neumann.register_fake(_matrix_like)
cayley_exact.register_fake(_matrix_like)
cayley_neumann_backward.register_fake(_packed_like)
cayley_exact_backward.register_fake(_packed_like)


def _save(ctx, inputs, output) -> None:
    skew, *ctx.arguments = inputs
    ctx.save_for_backward(skew)  # the packed vector and nothing else


def _neumann_grad(ctx, grad):
    (skew,) = ctx.saved_tensors
    return torch.ops.poetx.cayley_neumann_backward(grad, skew, *ctx.arguments), None, None, None


def _exact_grad(ctx, grad):
    (skew,) = ctx.saved_tensors
    return torch.ops.poetx.cayley_exact_backward(grad, skew, *ctx.arguments), None


cayley_neumann.register_autograd(_neumann_grad, setup_context=_save)
cayley_exact.register_autograd(_exact_grad, setup_context=_save)


def _save_backward(ctx, inputs, output) -> None:
    grad, skew, *ctx.arguments = inputs
    ctx.save_for_backward(grad, skew)


def _gradients_of(reference):
    """The gradients of a backward op, by autograd through its reference: nobody needs them fast."""

    @without_autocast
    @ieee_fp32()
    def backward(ctx, grad_packed):
        with torch.enable_grad():
            inputs = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
            packed = reference(*inputs, *ctx.arguments)
        return *torch.autograd.grad(packed, inputs, grad_packed), *(None for _ in ctx.arguments)

    return backward


cayley_neumann_backward.register_autograd(
    _gradients_of(cayley_neumann_backward_reference), setup_context=_save_backward
)
cayley_exact_backward.register_autograd(
    _gradients_of(cayley_exact_backward_reference), setup_context=_save_backward
)
