"""Naive definitions that the ops are compared with: loops and dense matrices, nothing shared."""

from __future__ import annotations

import torch
from torch import Tensor


def random_pair(size: int, seed: int = 0) -> Tensor:
    """A permutation pair int64 [2, size]."""
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.randperm(size, generator=generator)
    return torch.stack([permutation, permutation.argsort()])


def expand(pair: Tensor, width: int) -> Tensor:
    """A permutation pair of chunks of columns as a pair of single ones: int64 [2, width]."""
    chunk = width // max(1, pair.shape[1])
    columns = [[i * chunk + j for i in row for j in range(chunk)] for row in pair.tolist()]
    return torch.tensor(columns, dtype=torch.int64)


def random_skew(
    blocks: int, b: int, *, angle: float = 0.3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """Packed skew blocks [blocks, b(b−1)/2]; the largest spectral norm is about `angle`."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(blocks, b * (b - 1) // 2, generator=generator, dtype=torch.float64)
    return (angle / (2 * b**0.5) * packed).to(dtype)


def unpack(packed: Tensor, b: int) -> Tensor:
    """Skew matrices [blocks, b, b] of the packed upper triangles, entry by entry."""
    full = packed.new_zeros(packed.shape[0], b, b)
    for i in range(b):
        for j in range(i + 1, b):
            value = packed[:, i * (2 * b - i - 1) // 2 + (j - i - 1)]
            full[:, i, j], full[:, j, i] = value, -value
    return full


def cayley(packed: Tensor, b: int, order: int | None) -> Tensor:
    """``(I+Q) Σ_(j≤k) Q^j``, or ``(I+Q)(I−Q)⁻¹`` for order ``None``."""
    q = unpack(packed, b)
    eye = torch.eye(b, dtype=q.dtype)
    if order is None:
        return (eye + q) @ torch.linalg.inv(eye - q)
    return (eye + q) @ sum(torch.linalg.matrix_power(q, j) for j in range(order + 1))


def block_diagonal(rotation: Tensor, width: int) -> Tensor:
    """The dense [width, width] matrix: the blocks, then ones for the coordinates left over."""
    rest = width - rotation.shape[0] * rotation.shape[1]
    return torch.block_diag(*rotation, torch.eye(rest, dtype=rotation.dtype))


def rotate(
    x: Tensor,
    rotation: Tensor,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    transpose: bool = False,
) -> Tensor:
    """``y[..., σ] = x[..., γ] D`` with the dense block-diagonal D."""
    dense = block_diagonal(rotation, x.shape[-1])
    width = x.shape[-1]
    y = x if gather is None else x[..., expand(gather, width)[0]]
    y = y @ (dense.T if transpose else dense)
    if scatter is None:
        return y
    out = torch.empty_like(y)
    out[..., expand(scatter, width)[0]] = y
    return out


def effective_weight(
    stored: Tensor, g_in: Tensor, g_out: Tensor, perm_in: Tensor, perm_out: Tensor
) -> Tensor:
    """``W`` with ``W[perm_out][:, perm_in] = D_outᵀ S D_inᵀ``."""
    n, m = stored.shape
    permuted = block_diagonal(g_out, n).T @ stored @ block_diagonal(g_in, m).T
    weight = torch.empty_like(permuted)
    rows, columns = expand(perm_out, n)[0], expand(perm_in, m)[0]
    weight[rows[:, None], columns[None, :]] = permuted
    return weight
