"""``poetx::orthogonalize_skew``: the direction of a step of `POETXMuon`, from packed to packed."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.cayley import check_skew
from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.kernels.common import static
from poetx_compile.ops.newton_schulz import SMALLEST, newton_schulz
from poetx_compile.ops.packing import pack, unpack
from poetx_compile.ops.precision import without_autocast
from poetx_compile.ops.registry import define


@without_autocast
def orthogonalize(matrix: Tensor) -> Tensor:
    """Roughly the orthogonal polar factor, ``msign``, of each skew block (`newton_schulz`).

    Args:
        matrix: skew [blocks, b, b]; fp32 is computed in bf16 on CUDA.

    Returns:
        The same shape: skew, with singular values in 0.7 … 1.1, but for those that were below about
        0.003 of the Frobenius norm; a zero block stays zero.
    """
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    # Not by a mask: what is not finite has to stay so.
    x = torch.where(norm < SMALLEST, 0, matrix) / norm.clamp_min(SMALLEST)
    if x.is_cuda and x.dtype == torch.float32:
        x = x.bfloat16()
    return newton_schulz(x)


def orthogonalize_skew_reference(skew: Tensor, block_size: int) -> Tensor:
    """`orthogonalize` of packed skew blocks. Takes no gradient.

    Args:
        skew: [blocks, b(b−1)/2], float32 or float64: the entries above the diagonal.
        block_size: b ≥ 1.

    Returns:
        The same shape and dtype; on CUDA fp32 is computed with bf16 operands.
    """
    return pack(orthogonalize(unpack(skew, block_size))).to(skew.dtype)


def _kernel_takes(skew: Tensor, block_size: int) -> bool:
    return skew.dtype == torch.float32 and static(block_size) and block_size > 1


orthogonalize_skew = define(
    "orthogonalize_skew",
    orthogonalize_skew_reference,
    check=check_skew,
    fake=lambda skew, _: skew.new_empty(skew.shape),
    kernel=Kernel("orthogonalize.orthogonalize_skew", _kernel_takes),
    expands=lambda *_: False,  # an optimiser's
)
