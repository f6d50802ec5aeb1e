"""``poetx::permute_columns``: a gather of the last dimension by a permutation pair.

A *permutation pair* of d columns is an int64 tensor [2, d/c]: row 0 a permutation of the d/c chunks
of c neighbouring columns, row 1 its inverse. Any c that divides d will do, and the shapes say which
it is: c = 1 permutes single columns, c = 16 is what the kernels gather without a pass of its own.
Every gather's backward is a gather too, never a scatter-add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.kernels.common import permutable
from poetx_compile.ops.registry import define


def check_pair(pair: Tensor | None, width: int, name: str) -> None:
    """Raise unless `pair` is ``None`` or an int64 permutation pair of `width` columns."""
    if pair is None:
        return
    torch._check(
        pair.dim() == 2 and pair.shape[0] == 2 and pair.dtype == torch.int64,
        lambda: (
            f"poetx: {name} must be an int64 permutation pair [2, d/c], "
            f"got {pair.dtype} {list(pair.shape)}"
        ),
    )
    chunks = pair.shape[1]
    torch._check(
        chunks == width or (chunks > 0 and width % chunks == 0),
        lambda: (
            f"poetx: {name} is over {chunks} columns, the tensor has {width}: "
            f"not equal, and not chunks of columns, for {chunks} does not divide {width}"
        ),
    )


def pair_index(pair: Tensor, row: int, width: int) -> Tensor:
    """Row `row` of a permutation pair as an index of single columns: int64 [width].

    Args:
        pair: int64 [2, d/c], already checked against the width.
        row: 0 for the permutation, 1 for its inverse.
        width: d.
    """
    chunks = pair.shape[1]
    if chunks == width:
        return pair.select(0, row)
    chunk = width // chunks
    return (
        pair.select(0, row).unsqueeze(1) * chunk + torch.arange(chunk, device=pair.device)
    ).flatten()


def permute_columns_reference(x: Tensor, pair: Tensor, inverse: bool = False) -> Tensor:
    """``x[..., pair[0]]``, or ``x[..., pair[1]]`` with `inverse`, by columns or chunks of them.

    Args:
        x: [..., d], any dtype.
        pair: the permutation pair, int64 [2, d/c] with any c that divides d.

    Returns:
        [..., d], contiguous, of x's dtype.
    """
    return x.index_select(-1, pair_index(pair, 1 if inverse else 0, x.shape[-1]))


def _kernel_takes(x: Tensor, pair: Tensor, inverse: bool) -> bool:
    return x.element_size() in (2, 4) and permutable(x, pair)


permute_columns = define(
    "permute_columns",
    permute_columns_reference,
    check=lambda x, pair, inverse: check_pair(pair, x.shape[-1], "pair"),
    fake=lambda x, pair, inverse: x.new_empty(x.shape),
    kernel=Kernel("permute.permute_columns", _kernel_takes),
    drawn="activation",
)


def _setup(ctx, inputs, output) -> None:
    _, pair, ctx.inverse = inputs
    ctx.save_for_backward(pair)


def _backward(ctx, grad):
    (pair,) = ctx.saved_tensors
    return torch.ops.poetx.permute_columns(grad, pair, not ctx.inverse), None, None


permute_columns.register_autograd(_backward, setup_context=_setup)
