"""Exact figures on the rotations of a model, for metrics and tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poetx_compile.distributed.shards import groups_of, local, reduce_over, whole
from poetx_compile.distributed.wrappers import reshard
from poetx_compile.layers.eligibility import unwrap_compiled
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.ops import rotations
from poetx_compile.ops.packing import unpack
from poetx_compile.ops.precision import ieee_fp32
from poetx_compile.optim.blocks import by_kind, chunks, gather


@torch.no_grad()
def diagnostics(model: nn.Module) -> dict[str, float]:
    """How far the rotations of a prepared model have turned, and how orthogonal they are.

    Exact, by eigenvalue decompositions of every block: for logging, not for every step (the angle
    guard's estimate, ``optimizer.schedule.angle``, costs nothing).

    Args:
        model: a prepared model, compiled or not. Where it is sharded each process computes the
            figures of its own blocks and all get those of the model: every process has to call it.

    Returns:
        Floats, 0 where nothing is prepared:

        - ``angle_max``: largest spectral norm θ of a block's Q, which turns a plane by 2·atan θ
          radians; `max_angle` limits θ;
        - ``angle_mean``: mean over the blocks of each block's θ;
        - ``orthogonality_error``: largest ``‖GᵀG − I‖₂`` of a block, about 2θ⁴ for order 3.

        In the merged form (``merge_interval=1``) rotations are zero and so are these. What adds up
        there, and at the merges of int8 weights, is the rounding of the weights:

        - ``norm_drift_max``, ``norm_drift_mean``: relative change of the Frobenius norm of a weight
          since `prepare`, or since it was assigned: the largest in size, and the mean. `spectrum`
          and `spectrum_drift` say more of one weight.
    """
    model = unwrap_compiled(model)
    reshard(model)
    layers = list(prepared_linears(model))
    turned = [e for _, _, e in layers if not e.merged]
    pairs = [(e.order, s.skew, s.block) for e in turned for s in e.sides if s.blocks]
    drifting = [(e, stored_weight(m)) for _, m, e in layers if e.drifts]
    zero = torch.zeros(1, dtype=torch.float64)
    angles, errors = [zero[:0]], [zero]
    for order in dict.fromkeys(order for order, _, _ in pairs):
        with ieee_fp32():
            alike = [(local(skew), b) for k, skew, b in pairs if k == order]
            for kind, tensors in by_kind(alike).items():
                for batch in chunks(tensors, kind.size):
                    skew = gather(tensors, batch)
                    q, g = unpack(skew, kind.size), rotations(skew, kind.size, order)
                    eye = torch.eye(kind.size, dtype=g.dtype, device=g.device)
                    angles.append(_symmetric_norm(q.mT @ q).sqrt().double().cpu())
                    errors.append(_symmetric_norm(g.mT @ g - eye).double().cpu())
    angle, error = torch.cat(angles), torch.cat(errors)
    largest = torch.stack([torch.cat([zero, angle]).amax(), error.amax()])
    total = torch.tensor([angle.sum(), len(angle)], dtype=torch.float64)
    if groups := groups_of(skew for _, skew, _ in pairs):
        device = pairs[0][1].device
        largest = reduce_over(groups, largest.to(device), "max").cpu()
        total = reduce_over(groups, total.to(device), "sum").cpu()
    figures = {
        "angle_max": largest[0].item(),
        "angle_mean": (total[0] / total[1].clamp_min(1)).item(),
        "orthogonality_error": largest[1].item(),
    }
    if drifting:
        drifts = torch.tensor([_norm_drift(*layer) for layer in drifting], dtype=torch.float64)
        figures["norm_drift_max"] = drifts.abs().max().item()
        figures["norm_drift_mean"] = drifts.mean().item()
    return figures


def _norm_drift(equivalence: OrthogonalEquivalence, stored: Tensor) -> float:
    """Relative change of the Frobenius norm of a weight since it was given its values."""
    reference = equivalence.reference_norm.double()
    return (equivalence.norm(stored).double() / reference - 1).item()


@torch.no_grad()
def effective_weight(linear: nn.Linear) -> Tensor:
    """The weight [n, m] that a linear computes with, whole and without gradients.

    Of an unsharded layer that is ``linear.weight``. A sharded one is gathered, this layer alone;
    every process has to call it.
    """
    equivalence = equivalence_of(linear)
    if equivalence is None:
        return whole(linear.weight)
    e = equivalence
    tensors = (stored_weight(linear), *e.skews, e.gain_in, e.gain_out)
    return e.effective(*(None if t is None else whole(t) for t in tensors))  # type: ignore[arg-type]


@torch.no_grad()
def spectrum(weight: Tensor) -> Tensor:
    """Singular values of a weight [n, m], descending, float64 on the CPU: [min(n, m)].

    Of a prepared linear, ``spectrum(linear.weight)`` (``spectrum(effective_weight(linear))`` where
    it is sharded): training through rotations keeps them.
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
