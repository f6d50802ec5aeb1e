"""`memory_budget`: what is kept, what is given up first, and that results stay the same."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import fx, nn

import poetx_compile as poetx
from poetx_compile.compile.options import BackendOptions
from poetx_compile.compile.partition import Partitioner
from poetx_compile.compile.rewrite import rewrite
from poetx_compile.inspect.memory import meta
from poetx_compile.inspect.memory.inputs import TrainingStep
from poetx_compile.inspect.memory.trace import trace
from poetx_compile.passes import graphs, recompute
from tests.helpers.graph_of import assert_equals_eager, explained, prepared
from tests.helpers.held import kept
from tests.helpers.models import Block, SwiGLU


def stack(layers: int, block: type[nn.Module] = Block, **config: object) -> nn.Module:
    """Blocks that save a few KiB each, with odd shapes."""
    torch.manual_seed(0)
    return prepared(nn.Sequential(*(block() for _ in range(layers))), **config)


class FeedForward(nn.Module):
    """A block without attention: less to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(16), SwiGLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def bytes_kept(model: nn.Module, x: torch.Tensor, **options: object) -> int:
    torch._dynamo.reset()
    return kept(model, x, **({"stage": "aot_eager"} | options))


@pytest.mark.parametrize("formulation", ["folded", "input_centric"])
def test_no_more_is_kept_than_allowed_and_not_much_less(formulation: str) -> None:
    model, x = stack(3, FeedForward, formulation=formulation), torch.randn(2, 33, 16)
    fast, mem = (bytes_kept(model, x, variant=variant) for variant in ("fast", "mem"))
    assert mem < 0.7 * fast
    assert bytes_kept(model, x, memory_budget=1.0) == fast
    steps = [0.9, mem / fast + 0.02]
    found = [bytes_kept(model, x, memory_budget=step) / fast for step in steps]
    for step, fraction in zip(steps, found, strict=True):
        # One value of one layer is the step in which it goes down.
        assert step - 0.09 < fraction <= step, (step, found)


def test_below_mem_the_residual_stream_is_left_and_a_warning_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.randn(2, 33, 16)
    with caplog.at_level(logging.WARNING, "poetx_compile"):
        least = [bytes_kept(stack(layers), x, memory_budget=0.01) for layers in (1, 2)]
    # Of the further block two sums; beside them figures of norms and attention, and on a CPU the
    # state of attention's generator, larger than a tensor here.
    assert 2 * x.nbytes <= least[1] - least[0] < 5 * x.nbytes
    assert least[1] < 0.6 * bytes_kept(stack(2), x, variant="mem")
    message = [r.getMessage() for r in caplog.records if "memory_budget" in r.getMessage()][-1]
    fast = bytes_kept(stack(2), x, variant="fast")
    expected = f"the least that the passes know to keep is {least[1] / fast:.2f} of what variant"
    assert expected in message


@pytest.mark.parametrize("choice", [{"variant": "mem"}, {"memory_budget": 0.3}])
def test_a_norm_is_built_again_from_its_mean(choice: dict[str, object]) -> None:
    model = prepared(Block())
    config = poetx.POETXConfig(block_size=8, **choice)
    options = BackendOptions(config=config.to_dict())
    step = TrainingStep(meta.copied(model), lambda y: y.square().mean(), None)
    (graphs_of_step,) = trace(step, (torch.empty(2, 33, 16, device="meta"),), {}, [options])
    calls = [n for part in graphs_of_step for n in part.backward.nodes if n.op == "call_function"]
    names = [str(n.target) for n in calls]
    assert any("rsqrt" in name for name in names)
    assert not any("mean" in name for name in names)


@pytest.mark.parametrize(
    ("formulation", "budget", "dynamic"),
    [  # each two of them meet
        ("folded", 0.3, False),
        ("folded", 0.85, True),
        ("input_centric", 0.3, True),
        ("input_centric", 0.85, False),
    ],
)
def test_outputs_and_gradients_stay_the_same(
    formulation: str, budget: float, dynamic: bool
) -> None:
    model = stack(1, formulation=formulation).double()
    x = torch.randn(2, 5, 16).double()
    assert_equals_eager(model, x, memory_budget=budget, dynamic=dynamic)


def ranked(model: nn.Module, x: torch.Tensor) -> list[str]:
    """What may be given up, in that order: folded weights, outputs, rotated inputs, or cheap."""
    found: dict[int, fx.Node] = {}

    def backend(gm, inputs):
        made = rewrite(gm, inputs, BackendOptions(config={"memory_budget": 0.5}))
        for node in made.graph.graph.nodes:
            if rank := recompute.rank_of(node):
                assert rank not in found
                found[rank] = node
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x)
    assert sorted(found) == list(range(1, len(found) + 1))
    return [_kind(node) for _, node in sorted(found.items())]


def _kind(node: fx.Node) -> str:
    if node.target == torch.ops.poetx.permute_columns.default or graphs.ROLE not in node.meta:
        return "cheap"
    rotated = node.target == torch.ops.poetx.rotate_blocks.default
    return "rotated" if rotated else "product" if graphs.is_linear(node) else node.meta[graphs.ROLE]


def test_what_takes_no_product_goes_first_then_folds_then_products() -> None:
    order = ranked(stack(1, formulation="folded"), torch.randn(2, 33, 16))
    kinds = list(dict.fromkeys(order))
    assert kinds == ["cheap", graphs.FOLDED_WEIGHT, graphs.OUTPUT]
    assert order.count(graphs.FOLDED_WEIGHT) == 7
    # Those of the output and the down projection, which mem gives up as well, and then the others.
    assert order.count(graphs.OUTPUT) == 7


def test_rotated_inputs_go_before_products() -> None:
    order = ranked(stack(1), torch.randn(2, 33, 16))
    assert list(dict.fromkeys(order)) == ["cheap", "rotated", "product"]


def test_the_graph_says_what_may_be_built_again() -> None:
    text = explained(stack(1), torch.randn(2, 5, 16), memory_budget=0.5).after
    assert "[may recompute]" in text
    assert "[recompute]" in text  # rotations, in any case
    assert "[may recompute]" not in explained(stack(1), torch.randn(2, 5, 16)).after


def test_each_budget_has_its_own_place_in_the_caches() -> None:
    assert Partitioner(0.5).uuid() != Partitioner(0.6).uuid()


def test_two_partitioners_contradict_each_other() -> None:
    options = {"memory_budget": 0.5, "custom_partitioner_fn": Partitioner(0.9)}
    model = torch.compile(stack(1), backend=poetx.poetx_backend, options=options)
    with pytest.raises(Exception, match="memory_budget and custom_partitioner_fn contradict"):
        model(torch.randn(2, 5, 16))
