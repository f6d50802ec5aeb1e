"""What happens later to a model that the compiler adopted."""

from __future__ import annotations

import copy

import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers.tolerances import assert_close


def test_a_layer_with_one_output_resumes_with_the_groups_of_its_checkpoint() -> None:
    """The rotation of a side of size 1 is empty, and in no group, whoever made it."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 1))
        return model, torch.optim.Adam(model.parameters(), lr=1e-2)

    def step(run: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        run(torch.linspace(-1, 1, 48).reshape(4, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = build()
    run = torch.compile(model, backend="poetx", options={"stage": "eager", "block_size": 4})
    step(run, optimizer)
    resumed, _ = build()
    poetx.prepare(resumed, poetx.POETXConfig(block_size=4))
    other = torch.optim.Adam(resumed.parameters(), lr=1e-2)
    poetx.adopt(other, resumed)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(resumed, other)
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_unloaded_model_trains_densely_by_the_same_compiled_call() -> None:
    """The code that adopted its weights meets them again, as plain ones."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7)), torch.randn(5, 12)
    run = torch.compile(model, backend="poetx", options={"stage": "eager", "block_size": 4})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        run(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = run(x)
    poetx.merge_and_unload(model)
    assert_close(run(x), expected)
    run(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not list(prepared_linears(model))
