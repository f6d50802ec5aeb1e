"""Whether the tensors of prepared layers are what this package left in them.

A merge that was cut off leaves a mark. What something else has written shows in the saved layout,
or in the seal of a stored weight (`layers.seal`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from poetx_compile._torch import _len_torch_dispatch_stack
from poetx_compile.distributed.shards import groups_of, local, reduce_over
from poetx_compile.errors import IncompatibleStateError
from poetx_compile.layers.registry import registry

if TYPE_CHECKING:
    from poetx_compile.layers.parametrization import OrthogonalEquivalence

INTERRUPTED = (
    "a merge or a load was cut off by an exception: some layers have it behind them, some not. "
    "Load the last checkpoint into the model (load_state_dict) before going on."
)

OVERWRITTEN = (
    "the saved buffer `layout` of a prepared layer, {saved}, is not that of its permutations, "
    "{here}. Either this process's permutations are not those of rank 0, whose buffers DDP gave "
    "it: prepare the model in every process alike, with one configuration and seed. Or something "
    "wrote into the model's tensors: an average of them (EMA, AveragedModel) means nothing across "
    "a merge, average poetx.plain_state_dict(model) instead; and a checkpoint that was read into "
    "the tensors of model.state_dict() has to be given to model.load_state_dict as well"
)
WRITTEN = (
    "the stored weight of a prepared layer was written by something else than this package, and "
    "its rotations are not zero. An average of parameters (SWA, EMA, a Polyak target) means "
    "nothing across a merge, which gives them other coordinates: average effective weights, "
    "poetx.plain_state_dict(model), in a plain model. A new weight is written to linear.weight, a "
    "checkpoint goes through load_state_dict"
)


def check_layouts(equivalences: Sequence[OrthogonalEquivalence]) -> None:
    """Raise `IncompatibleStateError` where a saved layout is not that of the permutations in force.

    DDP gives every process the buffers of rank 0, these among them: a process that was prepared
    with another seed, or merged when the others did not, finds out without any communication. So
    does a model whose tensors something else has written.
    """
    by_device: dict[torch.device, list[OrthogonalEquivalence]] = defaultdict(list)
    for equivalence in equivalences:
        if not equivalence.layout.is_meta:
            by_device[equivalence.layout.device].append(equivalence)
    for group in by_device.values():
        saved = torch.stack([e.layout for e in group]).tolist()
        for e, values in zip(group, saved, strict=True):
            if values != e.layout_values():
                raise IncompatibleStateError(
                    OVERWRITTEN.format(saved=values, here=e.layout_values())
                )


@torch.no_grad()
def check_stored_weights(layers: Sequence[tuple[OrthogonalEquivalence, Tensor]]) -> None:
    """Raise `IncompatibleStateError` where something else has written a stored weight.

    Without rotations any weight is one: such a layer, and one that was not looked at before, is
    taken as it is. So is one of the merged form, which has neither rotations nor another order.
    """
    layers = [(e, stored) for e, stored in layers if not e.merged]
    by_device: dict[torch.device, list[tuple[OrthogonalEquivalence, Tensor, Tensor]]]
    by_device = defaultdict(list)
    for e, stored in layers:
        broken = e.seal_broken(stored)
        if broken is None:
            e.seal(stored)
            broken = torch.zeros((), dtype=torch.bool, device=stored.device)
        if not stored.is_meta:
            by_device[broken.device].append((e, stored, broken))
    groups = groups_of(stored for _, stored in layers)
    for looked in by_device.values():
        flags = reduce_over(groups, torch.stack([b for _, _, b in looked]).int(), "max").tolist()
        for (e, stored, _), flag in zip(looked, flags, strict=True):  # alike in every process
            if not flag:
                continue
            turned = (local(e.skew_in).any() | local(e.skew_out).any()).int()
            if reduce_over(groups, turned, "max").item():
                raise IncompatibleStateError(WRITTEN)
            e.seal(stored)


def check_stored_of(tensors: Sequence[tuple[Tensor, Tensor]]) -> None:
    """`check_stored_weights` of the layers that (stored weight, `skew_in`) belong to."""
    layers = {id(e.skew_in): e for e in registry.layers()}
    found = [(layers.get(id(skew)), stored) for stored, skew in tensors if readable(stored)]
    check_stored_weights([(e, s) for e, s in found if e is not None and e.holds(s)])


def readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read, by this process alone."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return False
    capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (capturing or _len_torch_dispatch_stack())
