"""Names of layers, and metadata that stay symbolic."""

from __future__ import annotations

import functools

import torch
from torch import nn

import poetx_compile as poetx
from tests.helpers.graph_of import assert_equals_eager, prepared
from tests.helpers.models import MLP


def decorated(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    """The compiled frame is the decorator's: it knows the module as ``args[0]``."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([MLP()])

    @decorated
    def forward(self, x):
        return self.blocks[0](x)


def test_a_decorated_forward_leaves_the_names_of_layers_as_they_are():
    options = {"block_size": 8, "target_modules": r"blocks\.0\.up"}
    explanation = poetx.explain(Decorated(), torch.randn(3, 12), options=options)
    (graph,) = explanation.graphs
    events = [e for e in graph.record.events if e.pass_name == "adopt_linear"]
    assert [(e.layers[0].name, e.applied) for e in events] == [
        ("blocks.0.up", True),
        ("blocks.0.down", False),
    ]


class Positions(nn.Module):
    """Makes a tensor of a symbolic size out of no other tensor."""

    def __init__(self):
        super().__init__()
        self.mlp = MLP()

    def forward(self, x):
        return self.mlp(x) + torch.arange(x.shape[0], device=x.device)[:, None]


def test_verification_adds_no_guard_on_a_size():
    model = prepared(Positions())
    assert_equals_eager(model, torch.randn(5, 12), dynamic=True)
    torch._dynamo.utils.counters.clear()
    options = {"stage": "aot_eager", "verify_passes": True}
    compiled = torch.compile(model, backend=poetx.poetx_backend, dynamic=True, options=options)
    for rows in (5, 6, 7):
        compiled(torch.randn(rows, 12))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
