"""``poetx::cayley_neumann`` and ``poetx::cayley_exact``: packed skew parameters → rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.packing import pack, packed_size, unpack
from poetx_compile.ops.polynomial import polynomial, polynomial_backward
from poetx_compile.ops.precision import ieee_fp32, without_autocast
from poetx_compile.ops.registry import define


def rotations(skew: Tensor, block_size: int, order: int | None, narrow: bool = False) -> Tensor:
    """Rotations of packed skew blocks: Cayley-Neumann of `order`, or exact where it is ``None``.

    `narrow` as for `cayley_neumann`; the exact transform is a solve, which has no low precision.
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
    """Rotations ``G = (I+Q)(I + Q + … + Q^k)`` of packed skew-symmetric blocks.

    Args:
        skew: [blocks, b(b−1)/2], float32 or float64: the entries of Q above the diagonal.
        block_size: b ≥ 1.
        order: k ≥ 1.
        narrow: the rotations are going to be rounded to bf16 or fp16 anyway: products may be of low
            precision (bf16 operands), also in the backward; sums stay fp32 (docs/numerics.md). A
            permission: where no such kernel runs, the products are exact.

    Returns:
        [blocks, b, b] of the same dtype; nearly orthogonal, ``G = (I+Q)(I−Q)⁻¹(I−Q^(k+1))``.
    """
    return polynomial(unpack(skew, block_size), order)


def cayley_neumann_backward_reference(
    grad: Tensor, skew: Tensor, block_size: int, order: int, narrow: bool = False
) -> Tensor:
    """Gradient of `cayley_neumann`: from [blocks, b, b] to the packed [blocks, b(b−1)/2]."""
    return pack(polynomial_backward(grad, unpack(skew, block_size), order))


def cayley_exact_reference(skew: Tensor, block_size: int) -> Tensor:
    """Exactly orthogonal ``G = (I+Q)(I−Q)⁻¹`` of packed skew blocks, by a batched solve.

    Shapes and dtypes as for `cayley_neumann`.
    """
    q = unpack(skew, block_size)
    eye = torch.eye(block_size, dtype=q.dtype, device=q.device)
    # The factors commute, so the solve may stand on the left.
    return torch.linalg.solve(eye - q, eye + q).contiguous()


def cayley_exact_backward_reference(grad: Tensor, skew: Tensor, block_size: int) -> Tensor:
    """Gradient of `cayley_exact`: ``dQ = 2 Mᵀ dG Mᵀ`` with ``M = (I−Q)⁻¹``, packed."""
    q = unpack(skew, block_size)
    eye = torch.eye(block_size, dtype=q.dtype, device=q.device)
    inverse = torch.linalg.inv(eye + q)  # Mᵀ, because Qᵀ = −Q
    full = 2 * (inverse @ grad @ inverse)
    return pack(full - full.mT)


def _check(skew: Tensor, block_size: int, order: int = 1, narrow: bool = False) -> None:
    check_skew(skew, block_size, order)


def _check_backward(grad: Tensor, skew: Tensor, block_size: int, *rest) -> None:
    _check(skew, block_size, *rest)
    check_grad(grad, skew, block_size)


def matrices_like(skew: Tensor, block_size: int, *_) -> Tensor:
    """The fake of an op from packed skew blocks to a matrix each."""
    return skew.new_empty(skew.shape[0], block_size, block_size)


def packed_like(grad: Tensor, skew: Tensor, *_) -> Tensor:
    """The fake of an op from a matrix for each of the packed skew blocks to its packed gradient."""
    return torch.empty_like(skew, memory_format=torch.contiguous_format)


def _kernel_takes(skew: Tensor, block_size: int, order: int, narrow: bool) -> bool:
    return skew.dtype == torch.float32 and block_size >= 2


def _backward_kernel_takes(
    grad: Tensor, skew: Tensor, block_size: int, order: int, narrow: bool
) -> bool:
    fp32 = skew.dtype == grad.dtype == torch.float32
    return fp32 and block_size >= 2 and order == 3


def _never(*_) -> bool:
    """A solver stays a call: there is nothing to fuse."""
    return False


cayley_neumann = define(
    "cayley_neumann",
    cayley_neumann_reference,
    check=_check,
    fake=matrices_like,
    kernel=Kernel("cayley.cayley_neumann", _kernel_takes),
    ieee=True,
    drawn="rotation",
)
cayley_neumann_backward = define(
    "cayley_neumann_backward",
    cayley_neumann_backward_reference,
    check=_check_backward,
    fake=packed_like,
    kernel=Kernel("cayley.cayley_neumann_backward", _backward_kernel_takes),
    ieee=True,
)
cayley_exact = define(
    "cayley_exact",
    cayley_exact_reference,
    check=_check,
    fake=matrices_like,
    expands=_never,
    ieee=True,
    drawn="rotation",
)
cayley_exact_backward = define(
    "cayley_exact_backward",
    cayley_exact_backward_reference,
    check=_check_backward,
    fake=packed_like,
    expands=_never,
    ieee=True,
)


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
