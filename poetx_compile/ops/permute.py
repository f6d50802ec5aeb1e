"""``poetx::permute_columns``: a gather of the last dimension by a permutation pair.

A *permutation pair* is an int64 tensor [2, d]: row 0 a permutation of 0 … d−1, row 1 its inverse.
Every gather's backward is then a gather too, never a scatter-add.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poetx_compile.ops import kernels


def check_pair(pair: Tensor | None, width: int, name: str) -> None:
    """Raise unless `pair` is ``None`` or an int64 permutation pair [2, width]."""
    if pair is None:
        return
    torch._check(
        pair.dim() == 2 and pair.shape[0] == 2 and pair.dtype == torch.int64,
        lambda: (
            f"poetx: {name} must be an int64 permutation pair [2, d], "
            f"got {pair.dtype} {list(pair.shape)}"
        ),
    )
    torch._check(
        pair.shape[1] == width,
        lambda: f"poetx: {name} is over {pair.shape[1]} columns, the tensor has {width}",
    )


def permute_columns_reference(x: Tensor, pair: Tensor, inverse: bool) -> Tensor:
    """The definition of `permute_columns` in plain torch ops."""
    return x.index_select(-1, pair[1 if inverse else 0])


@torch.library.custom_op("poetx::permute_columns", mutates_args=())
def permute_columns(x: Tensor, pair: Tensor, inverse: bool = False) -> Tensor:
    """``x[..., pair[0]]``, or ``x[..., pair[1]]`` with `inverse`.

    Args:
        x: [..., d], any dtype.
        pair: the permutation pair, int64 [2, d].

    Returns:
        [..., d], contiguous, of x's dtype.
    """
    check_pair(pair, x.shape[-1], "pair")
    if kernels.applies("permute_columns", x, pair, inverse):
        return kernels.run("permute_columns", x, pair, inverse)
    return permute_columns_reference(x, pair, inverse)


@permute_columns.register_fake
def _(x: Tensor, pair: Tensor, inverse: bool = False) -> Tensor:
    check_pair(pair, x.shape[-1], "pair")
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    _, pair, ctx.inverse = inputs
    ctx.save_for_backward(pair)


def _backward(ctx, grad):
    (pair,) = ctx.saved_tensors
    return torch.ops.poetx.permute_columns(grad, pair, not ctx.inverse), None, None


permute_columns.register_autograd(_backward, setup_context=_setup)
