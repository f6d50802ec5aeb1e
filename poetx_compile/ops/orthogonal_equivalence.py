"""``poetx::orthogonal_equivalence``: the effective weight of a POET layer, weight-centric.

The op is composite: it stays one node in Dynamo's graph, where the passes match it, and decomposes
into the other ops under autograd and AOTAutograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from poetx_compile._torch import peek_interpreter_stack
from poetx_compile.ops.cayley import rotations, rotations_reference
from poetx_compile.ops.dequantize import check_stored, dequantize_reference
from poetx_compile.ops.gains import scaled
from poetx_compile.ops.permute import check_pair
from poetx_compile.ops.precision import without_autocast
from poetx_compile.ops.registry import OPS, Op
from poetx_compile.ops.rotate import rotate_blocks_reference

_library = torch.library.Library("poetx", "FRAGMENT")
_library.define(
    "orthogonal_equivalence(Tensor weight, Tensor skew_in, Tensor skew_out, Tensor perm_in, "
    "Tensor perm_out, int block_in, int block_out, int? order, Tensor? gain_in=None, "
    "Tensor? gain_out=None, Tensor? scale=None) -> Tensor"
)


def orthogonal_equivalence(
    weight: Tensor,
    skew_in: Tensor,
    skew_out: Tensor,
    perm_in: Tensor,
    perm_out: Tensor,
    block_in: int,
    block_out: int,
    order: int | None,
    gain_in: Tensor | None = None,
    gain_out: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """``W_eff`` with ``W_eff[perm_out][:, perm_in] = D_outᵀ S D_inᵀ`` (POET).

    Args:
        weight: S [n, m], the frozen weight stored permuted: ``W₀[perm_out][:, perm_in]``. A
            constant: it gets no gradient, whatever its `requires_grad` says.
        skew_in: [blocks_in, b(b−1)/2] packed skew parameters of the input side, fp32 or fp64.
        skew_out: the same of the output side.
        perm_in, perm_out: permutation pairs int64 [2, m] and [2, n].
        block_in, block_out: block size of each side.
        order: k of the Cayley-Neumann expansion, or ``None`` for the exact transform.
        gain_in, gain_out: [m] and [n], of the skew parameters' dtype, or ``None``: the result is
            ``diag(gain_out) W_eff diag(gain_in)``.
        scale: [n, ⌈m/64⌉], where `weight` is int8: S is `dequantize` of both, in scale's dtype.

    Returns:
        [n, m] of S's dtype, rotated in fp32 (fp64 for an fp64 weight).
    """
    optional = without_defaults(gain_in, gain_out, scale)
    return torch.ops.poetx.orthogonal_equivalence(
        weight, skew_in, skew_out, perm_in, perm_out, block_in, block_out, order, *optional
    )


def without_defaults(*optional: Any) -> tuple[Any, ...]:
    """Optional arguments without the trailing ones that are ``None``, as a graph has them."""
    given = [i for i, argument in enumerate(optional) if argument is not None]
    return optional[: given[-1] + 1] if given else ()


@without_autocast
def _compose(
    weight,
    skew_in,
    skew_out,
    perm_in,
    perm_out,
    block_in,
    block_out,
    order,
    gain_in=None,
    gain_out=None,
    scale=None,
):
    """The op over the other ops, for autograd and AOTAutograd."""
    check_stored(weight, scale)
    check_pair(perm_in, weight.shape[1], "perm_in")
    check_pair(perm_out, weight.shape[0], "perm_out")
    build: Any = rotations_reference if (plain := transformed()) else rotations
    rotate: Any = rotate_blocks_reference if plain else torch.ops.poetx.rotate_blocks
    if scale is None:
        dtype = weight.dtype
        # S is a constant whatever its flag says: a user's `requires_grad_(True)` does not train it.
        stored = weight.detach() if weight.requires_grad else weight
        wide = stored.to(torch.promote_types(dtype, skew_in.dtype))
    else:
        dtype = scale.dtype
        build_stored: Any = dequantize_reference if plain else torch.ops.poetx.dequantize
        wide = build_stored(weight, scale, torch.promote_types(dtype, skew_in.dtype))
    # The input side comes last: the weight is contiguous, as that of a plain linear, and BLAS gives
    # the same bits for it.
    rows = rotate(wide.mT, build(skew_out, block_out, order), None, perm_out, False)
    columns = rotate(rows.mT, build(skew_in, block_in, order), None, perm_in, True)
    return scaled(columns, gain_in, gain_out).to(dtype)


def transformed() -> bool:
    """Whether forward-mode AD or a transform of `torch.func` is at work.

    Custom ops cannot take part in these: torch raises for `grad`, and `jvp` takes their results
    for constants, without a word. The references in plain torch ops can.
    """
    inside = peek_interpreter_stack() is not None
    return inside or forward_ad._current_level >= 0


_library.impl("orthogonal_equivalence", _compose, "CompositeImplicitAutograd")
OPS["orthogonal_equivalence"] = Op(_compose, drawn="weight")
