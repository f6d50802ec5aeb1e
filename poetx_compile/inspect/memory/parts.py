"""Bytes of weights and of the optimiser's state, and of what its step needs for a while."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from poetx_compile.layers.prepared import (
    prepared_linears,
    stored_weight,
    trained_parameters,
    weight_dtype,
)
from poetx_compile.optim.blocks import CHUNK_BYTES, ROTATIONS_BYTES
from poetx_compile.optim.momentum import bytes_of

OPTIMIZERS = ("adamw", "muon")

_COUNTER = 4
"""AdamW counts its steps in an fp32 scalar for each parameter."""


def weights(model: nn.Module) -> int:
    """Parameters, trained or frozen, and buffers, permutations included; shared ones once."""
    return _bytes((*model.parameters(), *model.buffers()))


def optimizer_state(
    model: nn.Module, optimizer: str, momentum_dtype: torch.dtype = torch.float32
) -> int:
    """AdamW: two moments in the dtype of the parameter; Muon: one for the skew parameters.

    Their own bytes count, not those of the parameters: in the merged form these share one zero.
    """
    muon = _skews(model) if optimizer == "muon" else []
    rest = set(trained_parameters(model)) - set(muon)
    moments = 2 * sum(p.nbytes for p in rest) + sum(bytes_of(p, momentum_dtype) for p in muon)
    return moments + _COUNTER * len(rest)


def step(model: nn.Module, optimizer: str, narrow: bool = False) -> int:
    """The most that a step of the optimiser allocates and frees again: its merge, or its update.

    AdamW is fused and updates in place. A merge holds one layer twice in fp32 and twice as it is
    stored; orthogonalised momentum holds the direction of each skew parameter, or of a batch where
    momenta or gradients are `narrow`, and some batches of blocks. In the merged form the steps of a
    batch of layers are alive, and a layer in fp32.
    """
    unpacked = 4 * sum(s.elements for _, _, e in prepared_linears(model) for s in e.sides)
    blocks = 4 * min(CHUNK_BYTES, unpacked) if optimizer == "muon" else 0
    if (merged := _turn(model)) is not None:
        return merged + blocks
    layers = [stored_weight(module) for _, module, _ in prepared_linears(model)]
    # Of int8 as much as of bf16: its product copies an operand.
    merge = max((2 * (4 + max(2, w.element_size())) * w.numel() for w in layers), default=0)
    directions = 0 if narrow else _bytes(_skews(model))
    return max(merge, directions + blocks if blocks else 0)


def _turn(model: nn.Module) -> int | None:
    """What a step of the merged form holds of its batch of layers; ``None`` in the other form."""
    layers = [(module, e) for _, module, e in prepared_linears(model)]
    if not layers or not layers[0][1].merged:
        return None
    packed = [sum(skew.nbytes for skew in e.skews) for _, e in layers]
    batch = min(sum(packed), max(ROTATIONS_BYTES // 2, *packed))
    return 2 * batch + max(
        4 * (stored_weight(module).numel() + sum(side.elements for side in e.sides))
        for module, e in layers
    )


def rounded_off(model: nn.Module, gradient: torch.dtype) -> int:
    """What gradients of the rotations in `gradient` take less than in the parameters' dtype."""
    return sum(skew.nbytes - skew.numel() * gradient.itemsize for skew in _skews(model))


def rotations(model: nn.Module) -> int:
    """What a step builds of all skew parameters, in the dtype of the weights."""
    return sum(
        weight_dtype(module).itemsize * side.elements
        for _, module, e in prepared_linears(model)
        for side in e.sides
    )


def share_of_rotations(layer: nn.Module, model: nn.Module) -> float:
    """A layer's part of the rotations of all that are batched with it: of its block sizes."""
    sizes = {side.block for _, _, e in prepared_linears(layer) for side in e.sides}

    def elements(module: nn.Module) -> int:
        sides = [side for _, _, e in prepared_linears(module) for side in e.sides]
        return sum(side.elements for side in sides if side.block in sizes)

    return elements(layer) / max(elements(model), 1)


def _skews(model: nn.Module) -> list[nn.Parameter]:
    return [skew for _, _, e in prepared_linears(model) for skew in e.skews]


def _bytes(tensors: Iterable[Tensor]) -> int:
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return int(sum(found.values()))
