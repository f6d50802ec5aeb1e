"""The graph of a module, rewritten by some passes or all, and checks that every pass must pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

import poetx_compile as poetx
from poetx_compile.inspect.explain import Explanation
from poetx_compile.inspect.render import render
from poetx_compile.passes import GraphPass, Record, graphs, run
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close


def prepared(model: nn.Module, block_size: int | tuple[int, int] = 8, **config: Any) -> nn.Module:
    """`model` prepared, with rotations away from the identity."""
    config.setdefault("formulation", "input_centric")
    poetx.prepare(model, poetx.POETXConfig(block_size=block_size, **config))
    return turn(model)


def dynamo_graph(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    """Dynamo's graph of a model that has one."""
    return given_to_a_backend(model, *inputs)[0]


def given_to_a_backend(model: nn.Module, *inputs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """Dynamo's graph of a model that has one, and the inputs of the graph."""
    caught = []

    def catch(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
        caught.append((gm, example_inputs))
        return gm

    torch.compile(model, backend=catch, fullgraph=True)(*inputs)
    return caught[0]


def run_passes(passes: list[GraphPass], model: nn.Module, *inputs: Any) -> tuple[str, Record]:
    """The graph after these passes alone, for a golden comparison, and what they recorded."""
    graph, record = graphs.clone(dynamo_graph(model, *inputs)), Record()
    run(passes, graph, record, verify=True)
    return render(graph) + "\n", record


def explained(model: nn.Module, *inputs: Any, **options: Any) -> Explanation:
    """`explain` with the metadata verified after each pass."""
    return poetx.explain(model, *inputs, options={"verify_passes": True, **options})


def after(model: nn.Module, *inputs: Any, **options: Any) -> str:
    """The graph after the passes, for a golden comparison."""
    return explained(model, *inputs, **options).after + "\n"


def assert_equals_eager(
    model: nn.Module, *inputs: Any, dynamic: bool | None = None, **options: Any
):
    """Compiled (AOT eager) outputs and every gradient equal the weight-centric eager ones."""
    reference = copy.deepcopy(model)
    compiled = torch.compile(
        model,
        backend=poetx.poetx_backend,
        fullgraph=True,
        dynamic=dynamic,
        options={"stage": "aot_eager", "verify_passes": True, **options},
    )
    leaves, expected_leaves = (
        [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs] for _ in range(2)
    )
    actual, expected = compiled(*leaves), reference(*expected_leaves)
    assert_close(actual, expected, what="output")
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (actual.double() * weights).sum().backward()
    (expected.double() * weights).sum().backward()
    for mine, theirs in zip(leaves, expected_leaves, strict=True):
        if theirs.grad is not None:
            assert_close(mine.grad, theirs.grad, what="gradient of the input")
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if mine.numel() == 0:  # a side of size 1 has no rotation
            continue
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            assert_close(mine.grad, theirs.grad, what=f"gradient of {name}")
