"""Exact figures on the rotations of a model, for metrics and tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poetx_compile.eligibility import unwrap_compiled
from poetx_compile.ops import rotations
from poetx_compile.ops.packing import unpack
from poetx_compile.ops.precision import ieee_fp32
from poetx_compile.optim.blocks import by_kind, chunks, gather, sides
from poetx_compile.parametrization import prepared_linears


@torch.no_grad()
def diagnostics(model: nn.Module) -> dict[str, float]:
    """How far the rotations of a prepared model have turned, and how orthogonal they are.

    Exact, by eigenvalue decompositions of every block: for logging, not for every step (the angle
    guard's estimate, ``optimizer.schedule.angle``, costs nothing).

    Args:
        model: a prepared model, compiled or not.

    Returns:
        Floats, 0 where nothing is prepared:

        - ``angle_max``: largest spectral norm θ of a block's Q, in radians of half a turn: its
          plane turns by 2·atan θ;
        - ``angle_mean``: mean over the blocks of each block's θ;
        - ``orthogonality_error``: largest ``‖GᵀG − I‖₂`` of a block, about 2θ⁴ for order 3.
    """
    angles, errors = [], []
    layers = list(prepared_linears(unwrap_compiled(model)))
    for order in dict.fromkeys(e.order for _, _, e in layers):
        pairs = [pair for _, _, e in layers if e.order == order for pair in sides(e)]
        with ieee_fp32():
            for kind, tensors in by_kind(pairs).items():
                for batch in chunks(tensors, kind.size):
                    skew = gather(tensors, batch)
                    q, g = unpack(skew, kind.size), rotations(skew, kind.size, order)
                    eye = torch.eye(kind.size, dtype=g.dtype, device=g.device)
                    angles.append(_symmetric_norm(q.mT @ q).sqrt().double().cpu())
                    errors.append(_symmetric_norm(g.mT @ g - eye).double().cpu())
    if not angles:
        return {"angle_max": 0.0, "angle_mean": 0.0, "orthogonality_error": 0.0}
    angle = torch.cat(angles)
    return {
        "angle_max": angle.max().item(),
        "angle_mean": angle.mean().item(),
        "orthogonality_error": torch.cat(errors).max().item(),
    }


@torch.no_grad()
def spectrum(weight: Tensor) -> Tensor:
    """Singular values of a weight [n, m], descending, float64 on the CPU: [min(n, m)].

    Of a prepared linear, ``spectrum(linear.weight)``: training through rotations keeps them.
    """
    return torch.linalg.svdvals(weight.detach().double().cpu())


def spectrum_drift(weight: Tensor, reference: Tensor) -> float:
    """Mean change of the singular values against `reference`, relative to their mean.

    Args:
        weight: [n, m].
        reference: an earlier `spectrum` of it.

    Returns:
        ``Σ|σ_i − σ_ref,i| / Σ σ_ref,i``.
    """
    return ((spectrum(weight) - reference).abs().sum() / reference.sum()).item()


def _symmetric_norm(matrices: Tensor) -> Tensor:
    """Spectral norms of symmetric [blocks, b, b]; NaN where a matrix is not finite."""
    finite = matrices.isfinite().all(-1).all(-1)
    norms = torch.linalg.eigvalsh(matrices.where(finite[:, None, None], 0)).abs().amax(-1)
    return norms.where(finite, torch.nan)
