"""``poetx::turn_weight_``: a step of the rotations of a weight in its natural order, in place.

With a merge at every step this is all that a step does to a weight: the packed steps of both sides
become rotations R, and ``W ← R_outᵀ W R_inᵀ`` in the coordinates of the permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poetx_compile.ops.cayley import rotations
from poetx_compile.ops.identity_equivalence import check_sides
from poetx_compile.ops.kernels import Kernel, current
from poetx_compile.ops.kernels.common import permutable
from poetx_compile.ops.packing import packed_size
from poetx_compile.ops.permute import pair_index
from poetx_compile.ops.precision import rotation_dtype, without_autocast
from poetx_compile.ops.random import matrix_bits, round_stochastically
from poetx_compile.ops.registry import OPS, define_in_place
from poetx_compile.ops.rotation_delta import minus_identity


def turn_weight_reference(
    weight: Tensor,
    skew_in: Tensor,
    skew_out: Tensor,
    perm_in: Tensor,
    perm_out: Tensor,
    block_in: int,
    block_out: int,
    order: int | None,
    seed: int,
    step: int,
    layer: int,
    apply: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """``W[perm_out][:, perm_in] ← R_outᵀ W[perm_out][:, perm_in] R_inᵀ`` in place.

    Computed in fp32 (fp64 for an fp64 weight) and rounded once. To bf16 and fp16 it is rounded
    stochastically, unbiased, since a step is smaller than half of what these resolve; the bits
    are those of `matrix_bits` for the element at (row, column) of the *permuted* matrix, so they
    are the same on every device, in every process and in a run that resumes.

    Args:
        weight: W [n, m] in its natural order, floating point; written.
        skew_in: [blocks_in, b(b−1)/2], fp32 or fp64: the packed step Q of the input side.
        skew_out: the same of the output side.
        perm_in, perm_out: permutation pairs int64 [2, m/c] and [2, n/c].
        block_in, block_out: block size of each side.
        order: k of the Cayley-Neumann expansion of R, or ``None`` for the exact transform.
        seed: 64 bits, the key of the random bits.
        step, layer: 32 bits each, their counters.
        apply: a scalar on the device, or ``None``: where it is zero, nothing is written.
        scale: a scalar on the device, or ``None``: what R_in is multiplied by, R_out where no
            column turns. It puts the norm right that rounding has moved.
    """
    n, m = weight.shape
    rows, columns = pair_index(perm_out, 0, n), pair_index(perm_in, 0, m)
    permuted = weight.index_select(0, rows).index_select(1, columns)
    deltas = [_delta(skew_in, block_in, order), _delta(skew_out, block_out, order)]
    if scale is not None:
        scale_rotation_(deltas[0] if len(skew_in) else deltas[1], scale)
    turned = rotate_weight(permuted, *deltas)
    if weight.dtype in (torch.bfloat16, torch.float16):
        bits = matrix_bits(n, m, seed, step, layer, weight.device)
        turned = round_stochastically(turned.float(), weight.dtype, bits)
    turned = turned.to(weight.dtype)
    if apply is not None:
        turned = torch.where(apply != 0, turned, permuted)
    back = pair_index(perm_out, 1, n), pair_index(perm_in, 1, m)
    weight.copy_(turned.index_select(0, back[0]).index_select(1, back[1]))


def _delta(skew: Tensor, block_size: int, order: int | None) -> Tensor:
    if skew.shape[0] == 0:
        return skew.new_zeros(0, block_size, block_size)
    return minus_identity(rotations(skew, block_size, order))


def scale_rotation_(delta: Tensor, scale: Tensor) -> None:
    """``R − I`` [blocks, b, b] becomes ``scale R − I``, in place."""
    delta.mul_(scale)
    delta.diagonal(dim1=1, dim2=2).add_(scale - 1)


@without_autocast
def rotate_weight(weight: Tensor, delta_in: Tensor, delta_out: Tensor) -> Tensor:
    """``D_outᵀ S D_inᵀ`` in the rotations' dtype.

    Args:
        weight: S [n, m], any floating dtype.
        delta_in: ``R − I`` [blocks, b, b] with blocks·b ≤ m, fp32 or fp64; the columns behind the
            blocks stay.
        delta_out: the same for the n rows.

    Returns:
        [n, m], a new tensor.
    """
    return rotate_in_place(weight.to(delta_in.dtype, copy=True), delta_in, delta_out)


@without_autocast
def rotate_in_place(wide: Tensor, delta_in: Tensor, delta_out: Tensor) -> Tensor:
    """`rotate_weight` of a weight in the rotations' dtype, which is written and returned."""
    n, m = wide.shape
    # x + x (R − I): a small rotation keeps its relative precision, none changes no bit.
    blocks, b, _ = delta_in.shape
    if blocks:
        columns = wide[:, : blocks * b].view(n, blocks, b).transpose(0, 1)
        columns += torch.bmm(columns, delta_in.mT)
    blocks, b, _ = delta_out.shape
    if blocks:
        rows = wide[: blocks * b].view(blocks, b, m)
        rows += torch.bmm(delta_out.mT, rows)
    return wide


def _check(weight, skew_in, skew_out, perm_in, perm_out, block_in, block_out, order, *rest) -> None:
    check_sides(weight, skew_in, skew_out, perm_in, perm_out, block_in, block_out)
    *_, apply, scale = rest
    torch._check(
        order is None or order >= 1, lambda: f"poetx: the Neumann order must be ≥ 1, got {order}"
    )
    for name, value in (("apply", apply), ("scale", scale)):
        torch._check(
            value is None or value.dim() == 0,
            lambda name=name, value=value: (
                f"poetx: {name} must be a scalar tensor, got {list(value.shape)}"
            ),
        )
    wide = rotation_dtype(weight.dtype)
    torch._check(
        skew_in.dtype == skew_out.dtype
        and torch.promote_types(wide, skew_in.dtype) == skew_in.dtype,
        lambda: f"poetx: steps of a weight of {weight.dtype} must be {wide}, got {skew_in.dtype}",
    )


def _kernel_takes(
    weight, skew_in, skew_out, perm_in, perm_out, b_in, b_out, order, seed, step, layer, apply,
    scale,
) -> bool:  # fmt: skip
    floats = weight.dtype in (torch.bfloat16, torch.float32) and skew_in.dtype == torch.float32
    return floats and order == 3 and weight.is_contiguous() and permutable(weight, perm_in)


turn_weight_ = define_in_place(
    "turn_weight_",
    turn_weight_reference,
    check=_check,
    written="weight",
    kernel=Kernel("turn_layers.turn_weight_", _kernel_takes),
    ieee=True,
)


class Turn(NamedTuple):
    """Arguments of `turn_weight_` for one of several weights; without a step a side stays."""

    weight: Tensor
    skew_in: Tensor | None
    skew_out: Tensor | None
    perm_in: Tensor
    perm_out: Tensor
    block_in: int
    block_out: int
    order: int | None
    layer: int
    scale: Tensor | None = None

    @property
    def steps(self) -> tuple[tuple[Tensor | None, int], tuple[Tensor | None, int]]:
        """(packed step, b) of the input and of the output side; ``None`` of no block."""
        skew_in, skew_out = self.skew_in, self.skew_out
        if skew_in is not None and not skew_in.shape[0]:
            skew_in = None
        if skew_out is not None and not skew_out.shape[0]:
            skew_out = None
        return (skew_in, self.block_in), (skew_out, self.block_out)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What weights must share to be turned by the same launch."""
        weight, ((skew_in, b_in), (skew_out, b_out)) = self.weight, self.steps
        of_weight = weight.shape, weight.stride(), weight.dtype, self.order
        of_in = skew_in is not None and (skew_in.shape[0], skew_in.dtype)
        of_out = skew_out is not None and (skew_out.shape[0], skew_out.dtype)
        of_pairs = self.perm_in.shape[1], self.perm_out.shape[1]
        return *of_weight, of_in, of_out, b_in, b_out, *of_pairs

    def fits(self, kernel: Kernel, seed: int, step: int, apply: Tensor | None) -> bool:
        """Whether the kernels of layers take it: unlike the op's, they do with a side that stays.

        Of a size of one none do.
        """
        steps = [skew for skew, _ in self.steps if skew is not None]
        if not steps or min(self.weight.shape) < 2:
            return False
        given = *self._replace(skew_in=steps[0], skew_out=steps[-1])[:8], seed, step
        return kernel.applies(*given, self.layer, apply, self.scale)


def turn_weights_(turns: Sequence[Turn], seed: int, step: int, apply: Tensor | None = None) -> None:
    """`turn_weight_` of several weights of one device; on a GPU in few launches.

    Not an op: optimisers call it between steps, and no graph does.

    Args:
        turns: the weights and their steps; a side without blocks stays.
        seed, step, apply: those of `turn_weight_`.
    """
    kernel = OPS["turn_weight_"].kernel
    assert kernel is not None
    together: list[tuple[Turn, int]] = []
    numbers: dict[Any, int] = {}  # of the kinds that the kernels of layers take; −1: they do not
    for turn in turns:
        kind = turn.kind
        number = numbers.get(kind)
        if number is None:
            number = len(numbers) if turn.fits(kernel, seed, step, apply) else -1
            numbers[kind] = number
        if number >= 0:
            together.append((turn, number))
        elif steps := [skew for skew, _ in turn.steps if skew is not None]:
            weight = turn.weight
            whole = [
                weight.new_empty(0, packed_size(b), dtype=steps[0].dtype) if skew is None else skew
                for skew, b in turn.steps
            ]
            counters = seed, step, turn.layer
            turn_weight_(weight, *whole, *turn[3:8], *counters, apply, turn.scale)
    if together:
        from poetx_compile.ops.kernels.turn_layers import turn_layers  # loads Triton

        weights = [turn.weight for turn, _ in together]
        with current(weights[0].device):
            turn_layers(together, seed, step, apply)
        torch.autograd.graph.increment_version(weights)
