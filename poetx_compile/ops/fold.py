"""``poetx::fold_weight``: rotations folded into the weight, for the folded formulation."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops import kernels
from poetx_compile.ops.permute import check_pair
from poetx_compile.ops.precision import without_autocast
from poetx_compile.ops.rotate import rotate_blocks_reference


def _check(weight, rotation_in, rotation_out, perm_in, perm_out) -> None:
    torch._check(
        weight.dim() == 2 and weight.is_floating_point(),
        lambda: (
            "poetx: weight must be a floating point matrix, "
            f"got {weight.dtype} {list(weight.shape)}"
        ),
    )
    sides = (
        ("in", rotation_in, perm_in, weight.shape[1]),
        ("out", rotation_out, perm_out, weight.shape[0]),
    )
    for side, rotation, pair, width in sides:
        torch._check(
            rotation is not None or pair is None,
            lambda side=side: f"poetx: perm_{side} without rotation_{side}",
        )
        if rotation is None:
            continue
        torch._check(
            rotation.dim() == 3 and rotation.shape[1] == rotation.shape[2],
            lambda side=side, r=rotation: (
                f"poetx: rotation_{side} must be [blocks, b, b], got {list(r.shape)}"
            ),
        )
        torch._check(
            rotation.dtype in (torch.float32, torch.float64),
            lambda side=side, r=rotation: (
                f"poetx: rotation_{side} must be float32 or float64, got {r.dtype}"
            ),
        )
        torch._check(
            rotation.shape[0] * rotation.shape[1] <= width,
            lambda side=side, r=rotation, width=width: (
                f"poetx: rotation_{side}: {r.shape[0]} blocks of {r.shape[1]} do not fit into "
                f"{width}"
            ),
        )
        check_pair(pair, width, f"perm_{side}")


def fold_weight_reference(
    weight: Tensor,
    rotation_in: Tensor | None,
    rotation_out: Tensor | None,
    perm_in: Tensor | None,
    perm_out: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The definition of `fold_weight` in plain torch ops (also what Inductor compiles)."""
    wide = torch.promote_types(dtype, torch.float32)
    folded = weight.to(wide)
    if rotation_out is not None:
        folded = rotate_blocks_reference(folded.mT, rotation_out, None, perm_out, True).mT
    if rotation_in is not None:
        folded = rotate_blocks_reference(folded, rotation_in, None, perm_in, True)
    return folded.to(dtype)


@torch.library.custom_op("poetx::fold_weight", mutates_args=())
@without_autocast
def fold_weight(
    weight: Tensor,
    rotation_in: Tensor | None,
    rotation_out: Tensor | None,
    perm_in: Tensor | None,
    perm_out: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``W[perm_out][:, perm_in] = L S D_inᵀ`` with ``L = D_outᵀ``: what plain products use.

    A side without a permutation stays in its permuted coordinates. Takes no gradient: that of the
    rotations comes from `folded_linear` and `rotation_tangent`.

    Args:
        weight: S [n, m], the frozen weight as it is stored.
        rotation_in: [blocks, b, b] with blocks·b ≤ m, float32 or float64, or ``None``.
        rotation_out: the same for the n rows, the blocks of L: those of −Q, ``G(−Q) = G(Q)ᵀ``.
        perm_in, perm_out: permutation pairs (int64, see `permute_columns`) of rotated sides, or
            ``None``.
        dtype: of the result, rounded to once where one launch folds both sides (and by the
            reference), else after each side.

    Returns:
        [n, m] of `dtype`, contiguous, a new tensor.
    """
    _check(weight, rotation_in, rotation_out, perm_in, perm_out)
    args = (weight, rotation_in, rotation_out, perm_in, perm_out, dtype)
    if kernels.applies("fold_weight", *args):
        return kernels.run("fold_weight", *args)
    out = fold_weight_reference(*args).contiguous()
    return out.clone() if out.data_ptr() == weight.data_ptr() else out


@fold_weight.register_fake
def _(weight, rotation_in, rotation_out, perm_in, perm_out, dtype):
    _check(weight, rotation_in, rotation_out, perm_in, perm_out)
    return weight.new_empty(weight.shape, dtype=dtype)
