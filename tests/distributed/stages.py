"""Checks of pipeline stages: each process prepares and merges its own part of a model."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import poetx_compile as poetx
from tests.distributed.training import assert_alike, rank, world
from tests.helpers.models import MLP

CONFIG = poetx.POETXConfig(block_size=4, merge_interval=2, redraw_interval=2)


def parts() -> list[nn.Module]:
    torch.manual_seed(0)
    return [MLP() for _ in range(2)]


def check_stages_train_as_the_whole() -> None:
    assert world() == 2
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    target = torch.ones(8, 12)
    mean_square = nn.MSELoss()

    stages = parts()
    optimisers = [poetx.POETXMuon(stage, lr=1e-2, config=CONFIG) for stage in stages]
    expected = []
    for _ in range(5):
        loss = mean_square(nn.Sequential(*stages)(x), target)
        loss.backward()
        for optimizer in optimisers:
            optimizer.step()
            optimizer.zero_grad()
        expected.append(loss.item())

    mine = parts()[rank()]
    optimizer = poetx.POETXMuon(mine, lr=1e-2, config=CONFIG)
    stage = PipelineStage(mine, rank(), world(), torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=mean_square)
    losses: list[float] = []
    for _ in range(5):
        pieces: list[torch.Tensor] = []
        if rank() == 0:
            schedule.step(x)
        else:
            schedule.step(target=target, losses=pieces)
            losses.append(torch.stack(pieces).mean().item())
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.schedule.merges == 2
    if rank() == 1:
        assert_alike(losses, expected)
