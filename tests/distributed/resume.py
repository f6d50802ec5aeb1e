"""Goes on with every run that `save` left, in as many processes as there are."""

from __future__ import annotations

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from poetx_compile.layers.prepared import prepared_linears
from tests.distributed.save import OPTIMISERS, OPTIONS, STOP, ways
from tests.distributed.training import alone, assert_alike, build, train

STEPS = 7
FROM = {"one": ("ddp", "fsdp", "groups"), "ddp": ("fsdp",), "fsdp": ("one",), "groups": ("ddp",)}


def check_runs_go_on_as_if_nothing_had_happened() -> None:
    for name, make in OPTIMISERS.items():
        expected = alone(make, STEPS)[STOP:]
        for way, wrap in ways().items():
            for saved in FROM[way]:
                model = wrap(build())
                optimizer = make(model)
                options = OPTIONS[name]
                weights, state = get_state_dict(model, optimizer, options=options)
                loaded = {"model": weights, "optimizer": state}
                dcp.load(loaded, checkpoint_id=f"{saved}-{name}")
                set_state_dict(
                    model,
                    optimizer,
                    model_state_dict=loaded["model"],
                    optim_state_dict=loaded["optimizer"],
                    options=options,
                )
                schedule = optimizer.schedule
                assert (schedule.step, schedule.last_merge) == (STOP, 2), (saved, way)
                assert {e.draw for _, _, e in prepared_linears(model)} == {2}, (saved, way)
                losses = train(model, optimizer, range(STOP, STEPS))
                assert_alike(losses, expected)
                assert {e.draw for _, _, e in prepared_linears(model)} == {4}, (saved, way)
