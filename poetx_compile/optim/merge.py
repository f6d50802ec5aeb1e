"""The merge and the redraw: rotations go into the frozen weights, permutations are drawn again.

For each layer, in permuted coordinates and IEEE fp32 (`docs/numerics.md`), a merge does

1. ``S ← R_outᵀ S R_inᵀ``, where R are the polar factors of the rotations (or the rotations as they
   are, ``merge_rotation="plain"``);
2. the packed skew parameters go back to zero.

Every coordinate keeps its place, and moments of the rotations mean what they did. A redraw, which
comes with a merge, changes places: between the two, the old permutations are undone and the next
draw is applied, in one gather. Then the moments belong elsewhere (`optim.transport`).

Everything is written in place: the addresses stay, so a compiled model is not recompiled and CUDA
graphs stay valid. Permutations follow from (seed, draw, group) and the arithmetic is the same in
every process, so under DDP nothing is communicated. Where FSDP2 shards the model, the rotations of
a batch of layers and the weight of one layer at a time are gathered, merged by every process alike,
and each keeps its own part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from poetx_compile.distributed.shards import groups_of, local, reduce_over, whole, write
from poetx_compile.distributed.wrappers import reshard
from poetx_compile.errors import DivergedError, InterruptedMergeError
from poetx_compile.layers.eligibility import unwrap_compiled
from poetx_compile.layers.integrity import INTERRUPTED, check_layouts, check_stored_weights
from poetx_compile.layers.parametrization import OrthogonalEquivalence, mark_interrupted
from poetx_compile.layers.permutation import Moves, redraw_all
from poetx_compile.layers.prepared import (
    Layer,
    check_alone,
    prepared_linears,
    redrawn,
    stored_weight,
)
from poetx_compile.layers.registry import registry
from poetx_compile.ops import rotations
from poetx_compile.ops.precision import ieee_fp32, without_autocast
from poetx_compile.ops.rotation_delta import minus_identity
from poetx_compile.ops.turn_weight import rotate_weight
from poetx_compile.optim.blocks import layer_batches
from poetx_compile.optim.requantise import merge_int8

POLAR_STEPS = 4
"""Newton-Schulz steps of `polar_factor`. Each takes an error δ of a singular value to 1.5 δ²: from
θ = 0.25 (δ = θ⁴ = 0.004) two reach fp32, four do so from θ = 0.6. They cost less than the merge."""

_ORTHOGONAL = 100
"""Roundings that an entry of ``XᵀX − I`` may be off: a converged iteration stays below by a digit.
What is further off would move the singular values of the weight it is merged into."""


@torch.no_grad()
def merge(
    model: nn.Module, *, redraw: bool = False, then: Callable[[Moves], None] | None = None
) -> None:
    """Merge all prepared layers of `model`, in one transaction.

    The outputs of the model move by the rounding of the weights' dtype and, with polar factors, by
    about 2θ⁴ where θ is the largest angle. Besides the model itself at most one layer's weight is
    alive, twice in fp32, and some copies of `ROTATIONS_BYTES`.

    Args:
        model: the whole prepared model (layers share permutations), compiled or not. Where it is
            sharded every process has to call this.
        redraw: draw the next permutations as well, where a side gains by it (`redrawn`).
        then: called with what was redrawn, as the last part of the transaction.

    Raises:
        ConfigError: layers outside of `model` share permutations with it.
        DivergedError: a rotation is NaN or infinite; nothing has been changed.
        IncompatibleStateError: something else has written into the model's tensors, or processes
            prepared it with different seeds.
        InterruptedMergeError: an earlier merge was cut off. If this one is (any exception, an
            interrupt included), every layer is marked: forward, `state_dict` and the optimiser
            refuse until a checkpoint has been loaded.
    """
    with _transaction(model) as layers:
        moves = redraw_all(redrawn(e for _, e in layers)) if redraw else {}
        # In the merged form there is nothing to merge.
        turned = [(m, e) for m, e in layers if not e.merged]
        numbers = {e: number for number, (_, e) in enumerate(layers)}
        for batch in layer_batches(turned):
            deltas_of = _merged_deltas([e for _, e in batch])
            for (module, equivalence), deltas in zip(batch, deltas_of, strict=True):
                stored = stored_weight(module)
                if equivalence.quantised:
                    merge_int8(stored, equivalence, deltas, moves, numbers[equivalence])
                else:
                    _merge_layer(stored, equivalence, deltas, moves)
        for _, equivalence in layers:
            equivalence.write_layout()
        if turned:
            torch._foreach_zero_([local(skew) for _, e in turned for skew in e.skews])
        if then is not None:
            then(moves)


@torch.no_grad()
def redraw(model: nn.Module, *, then: Callable[[Moves], None] | None = None) -> None:
    """Draw the next permutations of a model whose rotations are zero, in one transaction.

    What `merge` with `redraw` does, without rotating anything: no value of a weight changes, but
    for the rounding of int8 weights.

    Args, Raises: as of `merge`.
    """
    with _transaction(model) as layers:
        moves = redraw_all(redrawn(e for _, e in layers))
        for number, (module, equivalence) in enumerate(layers):
            stored = stored_weight(module)
            if equivalence.quantised:
                merge_int8(stored, equivalence, (), moves, number)
            elif not equivalence.merged:
                _write(stored, equivalence, whole(stored), moves)
            equivalence.write_layout()
        if then is not None:
            then(moves)


@contextmanager
def _transaction(model: nn.Module) -> Iterator[list[Layer]]:
    """The layers of `model`, looked at before anything is written, and marked while it is."""
    model = unwrap_compiled(model)
    reshard(model)
    layers = [(m, e) for _, m, e in prepared_linears(model)]
    check_whole(e for _, e in layers)
    check_alone(e for _, e in layers)
    check_layouts([e for _, e in layers])
    check_stored_weights([(e, stored_weight(m)) for m, e in layers])
    _check_finite([skew for _, e in layers for skew in e.skews if not e.merged])
    mark_interrupted((e for _, e in layers), True)
    try:
        yield layers
    except BaseException as error:
        error.add_note(f"poetx: {INTERRUPTED}")
        raise
    mark_interrupted((e for _, e in layers), False)


def check_whole(equivalences: Iterable[OrthogonalEquivalence]) -> None:
    """Raise `InterruptedMergeError` where a layer belongs to a merge that was cut off."""
    if registry.some_interrupted and any(e.interrupted for e in equivalences):
        raise InterruptedMergeError(INTERRUPTED)


def _check_finite(skews: Sequence[Tensor]) -> None:
    """Raise `DivergedError`, in every process alike, where a skew parameter is NaN or infinite."""
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for skew in skews:
        by_device[skew.device].append(local(skew))
    groups = groups_of(skews)
    for parts in by_device.values():
        held = [part for part in parts if part.numel()]  # a shard may be empty
        largest = torch._foreach_norm(held, float("inf")) if held else ()
        flag = (~torch.isfinite(torch.stack([parts[0].new_zeros(()), *largest]))).any().int()
        if reduce_over(groups, flag, "max").item():
            raise DivergedError(
                "the rotations are NaN or infinite, and are not merged: a loss or a gradient was "
                "so since the last merge. Load the last checkpoint; a lower learning rate, "
                "poetx_compile.clip_grad_norm_ and, for float16, a GradScaler keep it from "
                "happening again"
            )


def _merged_deltas(equivalences: Sequence[OrthogonalEquivalence]) -> list[list[Tensor]]:
    """``R − I`` of the input and the output side of each layer, those of one kind at once."""
    sides = [
        ((s.skew.device, s.skew.dtype, s.block, e.order, e.merge_rotation), s.skew)
        for e in equivalences
        for s in e.sides
    ]
    alike: dict[tuple, list[Tensor]] = defaultdict(list)
    for kind, skew in sides:
        alike[kind].append(skew)
    made = {}
    for kind, skews in alike.items():
        *_, b, order, how = kind
        with ieee_fp32():
            together = merged_rotation(torch.cat([whole(s) for s in skews]), b, order, how)
        together = minus_identity(together)
        made[kind] = iter(together.split([len(skew) for skew in skews]))
    deltas_of = [next(made[kind]) for kind, _ in sides]
    return [deltas_of[i : i + 2] for i in range(0, len(deltas_of), 2)]


def _merge_layer(
    stored: Tensor,
    equivalence: OrthogonalEquivalence,
    deltas: Sequence[Tensor],
    moves: Moves,
) -> None:
    with ieee_fp32():
        rotated = rotate_weight(whole(stored), *deltas)
    _write(stored, equivalence, rotated.to(stored.dtype), moves)


def _write(stored: Tensor, e: OrthogonalEquivalence, weight: Tensor, moves: Moves) -> None:
    """Store a whole weight in the old order in the new one: one gather a side, in its dtype."""
    for dim, permutation in enumerate((e.perm_out, e.perm_in)):
        if permutation in moves:
            weight = weight.index_select(dim, moves[permutation])
    write(stored, weight)
    e.seal(stored)


@without_autocast
def merged_rotation(skew: Tensor, block_size: int, order: int | None, how: str) -> Tensor:
    """The rotations a merge applies, [blocks, b, b], from packed skew [blocks, b(b−1)/2].

    Args:
        order: k of the Cayley-Neumann expansion, ``None`` for the exact transform.
        how: ``"polar"`` or ``"plain"`` (`POETXConfig.merge_rotation`).
    """
    rotation = rotations(skew, block_size, order)
    return polar_factor(rotation) if how == "polar" and order is not None else rotation


def polar_factor(matrix: Tensor, steps: int = POLAR_STEPS) -> Tensor:
    """The nearest orthogonal matrices by Newton-Schulz, ``X ← X(3I − XᵀX)/2``.

    The result is checked. Where the singular values were too far from 1 for `steps` (θ above about
    0.6, only without the angle guard) it comes from a singular value decomposition.

    Args:
        matrix: [blocks, b, b], fp32 or fp64.
        steps: see `POLAR_STEPS`.

    Raises:
        torch.linalg.LinAlgError: `matrix` is not finite.
    """
    x = matrix
    for _ in range(steps):
        x = 1.5 * x - 0.5 * torch.bmm(x, torch.bmm(x.mT, x))
    error = minus_identity(torch.bmm(x.mT, x)).abs().flatten(1).amax(1) if x.numel() else x[:, 0, 0]
    converged = error < _ORTHOGONAL * torch.finfo(x.dtype).eps
    if not converged.all():
        u, _, vh = torch.linalg.svd(matrix[~converged])
        x[~converged] = torch.bmm(u, vh)
    return x
