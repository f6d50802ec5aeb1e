"""``poetx::fold_weight``: rotations folded into the weight, for the folded formulation."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.kernels.common import FLOATS, LOW_PRECISION, permutable, static
from poetx_compile.ops.permute import check_pair
from poetx_compile.ops.registry import define
from poetx_compile.ops.rotate_by_delta import rotate_by_delta_reference


def _check(weight, delta_in, delta_out, perm_in, perm_out, dtype) -> None:
    torch._check(
        weight.dim() == 2 and weight.is_floating_point(),
        lambda: (
            "poetx: weight must be a floating point matrix, "
            f"got {weight.dtype} {list(weight.shape)}"
        ),
    )
    _check_side("in", delta_in, perm_in, weight.shape[1], dtype)
    _check_side("out", delta_out, perm_out, weight.shape[0], dtype)


def _check_side(side, delta, pair, width, dtype) -> None:
    torch._check(
        delta is not None or pair is None, lambda: f"poetx: perm_{side} without delta_{side}"
    )
    if delta is None:
        return
    torch._check(
        delta.dim() == 3 and delta.shape[1] == delta.shape[2],
        lambda: f"poetx: delta_{side} must be [blocks, b, b], got {list(delta.shape)}",
    )
    torch._check(
        delta.dtype == dtype,
        lambda: (
            f"poetx: delta_{side} must have the dtype of the result, {dtype}, got {delta.dtype}"
        ),
    )
    blocks, b = delta.shape[:2]
    torch._check(
        blocks * b <= width,
        lambda: f"poetx: delta_{side}: {blocks} blocks of {b} do not fit into {width}",
    )
    check_pair(pair, width, f"perm_{side}")


def fold_weight_reference(
    weight: Tensor,
    delta_in: Tensor | None,
    delta_out: Tensor | None,
    perm_in: Tensor | None,
    perm_out: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``W[perm_out][:, perm_in] = L S D_inᵀ`` with ``L = D_outᵀ``: what plain products use.

    A side without a permutation stays in its permuted coordinates. Takes no gradient: that of the
    rotations comes from `folded_linear` and `rotation_tangent`.

    Args:
        weight: S [n, m], the frozen weight as it is stored.
        delta_in: ``G − I`` [blocks, b, b] of `dtype` with blocks·b ≤ m, from `rotation_delta`, or
            ``None``.
        delta_out: the same for the n rows, ``L − I``: transposed, as ``G(−Q) = G(Q)ᵀ``.
        perm_in, perm_out: permutation pairs (int64, see `permute_columns`) of rotated sides, or
            ``None``.
        dtype: of the result, rounded to once where one launch folds both sides (and by the
            reference), else after each side.

    Returns:
        [n, m] of `dtype`, contiguous, a new tensor.
    """
    wide = torch.promote_types(dtype, torch.float32)
    folded = weight.to(wide)
    if delta_out is not None:
        folded = rotate_by_delta_reference(folded.mT, delta_out.mT.to(wide), None, perm_out).mT
    if delta_in is not None:
        folded = rotate_by_delta_reference(folded, delta_in.mT.to(wide), None, perm_in)
    return folded.to(dtype)


def _fake(weight, delta_in, delta_out, perm_in, perm_out, dtype):
    return weight.new_empty(weight.shape, dtype=dtype)


def _kernel_takes(weight: Tensor, delta_in, delta_out, perm_in, perm_out, dtype) -> bool:
    if dtype not in LOW_PRECISION or weight.dtype not in FLOATS or delta_in is delta_out is None:
        return False
    return static(*weight.shape) and permutable(weight, perm_in)


fold_weight = define(
    "fold_weight",
    fold_weight_reference,
    check=_check,
    fake=_fake,
    kernel=Kernel("fold.fold_weight", _kernel_takes),
    drawn="weight",
)
