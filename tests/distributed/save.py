"""Saves runs in the middle, from one process or from two, for `resume` to go on with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import fsdp, precision
from tests.distributed.training import adamw, build, muon8, train, world

STOP = 3
"""Steps before the checkpoint: one merge at 2, the next at 4."""

OPTIMISERS = {"muon": muon8, "adamw": adamw}
OPTIONS = {
    "muon": StateDictOptions(),
    "adamw": StateDictOptions(flatten_optimizer_state_dict=True),
}


def ways() -> dict[str, Callable[[nn.Module], Any]]:
    """How a model is wrapped, in as many processes as there are."""
    if world() == 1:
        return {"one": lambda model: model}
    return {"ddp": DistributedDataParallel, "fsdp": fsdp.shard, "groups": precision.shard}


def check_save() -> None:
    for way, wrap in ways().items():
        for name, make in OPTIMISERS.items():
            model = wrap(build())
            optimizer = make(model)
            train(model, optimizer, range(STOP))
            weights, state = get_state_dict(model, optimizer, options=OPTIONS[name])
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{way}-{name}")
