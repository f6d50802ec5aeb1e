"""The kernels of the next steps, compiled while forward and backward still are.

A step is the last part of the first one, and its kernels would be compiled one after another when
nothing else is left to do. So the step is rehearsed when the optimiser is attached: its own code
runs once with meta tensors in the place of the model's, and what it launches is compiled in the
background (`ops.kernels.early`). Gradients are of the dtype that they have so far; whoever guesses
wrong compiles in vain, and the step compiles what it needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from poetx_compile.distributed.shards import local
from poetx_compile.layers.prepared import Layer, stored_weight
from poetx_compile.ops.kernels.early import Early, compiled_early
from poetx_compile.ops.turn_weight import turn_weights_
from poetx_compile.optim.turning import Steps, by_rotation, turn_of

StandIns = Mapping[nn.Parameter, nn.Parameter]
"""Of rotations: meta tensors of what this process has of them, with gradients."""

Rehearse = Callable[[StandIns], Steps]
"""Makes the steps of stand-ins as an optimiser does."""


def compile_early(
    layers: Sequence[Layer], rehearse: Rehearse | None = None, period: int = 1
) -> list[Early]:
    """Compile the kernels of the steps of these layers from now on.

    Args:
        layers: on any devices; where no kernels run nothing happens.
        rehearse: of an optimiser with kernels of its own.
        period: 1 where both sides of a layer turn together.

    Returns:
        What can be waited for.
    """
    of_device: dict[torch.device, list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer[1].merged or rehearse is not None:
            of_device[stored_weight(layer[0]).device].append(layer)
    started = [
        compiled_early(device, partial(_step, here, rehearse, period))
        for device, here in of_device.items()
    ]
    return [early for early in started if early is not None]


def _step(layers: Sequence[Layer], rehearse: Rehearse | None, period: int) -> None:
    """A step of stand-ins for the tensors of the layers, of each kind one."""
    kinds: dict[tuple[Any, ...], Layer] = {}
    for module, e in layers:
        of_skews = ((local(s).shape, s.requires_grad, s.grad_dtype) for s in e.skews)
        weight = stored_weight(module)
        kinds.setdefault((turn_of(weight, e, *e.skews, 0).kind, *of_skews), (module, e))
    layers = list(kinds.values())
    stand_ins = {skew: _rotation(skew) for _, e in layers for skew in e.skews}
    if rehearse is not None:
        steps = rehearse(stand_ins)
    else:
        steps = [(one.detach(), 0, [one]) for one in stand_ins.values() if len(one)]
    if not layers[0][1].merged:
        return
    made = by_rotation(steps)
    turns = []
    for number, (module, e) in enumerate(layers):
        step_in, step_out = (made.get(stand_ins[skew]) for skew in e.skews)
        turn = turn_of(stored_weight(module), e, step_in, step_out, number)
        perm_in, perm_out = _like(turn.perm_in), _like(turn.perm_out)
        turns.append(turn._replace(weight=_like(turn.weight), perm_in=perm_in, perm_out=perm_out))
    apply = torch.empty((), dtype=torch.int32, device="meta")
    if period == 1:
        turn_weights_(turns, 0, 0, apply)
    else:
        turn_weights_([turn._replace(skew_out=None) for turn in turns], 0, 0, apply)
        turn_weights_([turn._replace(skew_in=None) for turn in turns], 0, 0, apply)


def _rotation(skew: nn.Parameter) -> nn.Parameter:
    """A stand-in of a rotation."""
    made = nn.Parameter(_like(local(skew)), skew.requires_grad)
    if skew.requires_grad:
        made.grad_dtype = skew.grad_dtype
        made.grad = torch.empty_like(made, dtype=made.grad_dtype)
    return made


def _like(tensor: Tensor) -> Tensor:
    size, stride = tensor.size(), tensor.stride()
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta")
