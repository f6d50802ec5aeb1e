"""Calls of a linear that stay torch's own: what eager refuses, the compiled model refuses too."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.layers.prepared import equivalence_of
from poetx_compile.passes import graphs, sides
from poetx_compile.passes.contexts import Contexts
from tests.helpers.graph_of import explained, prepared
from tests.helpers.models import MLP
from tests.helpers.tolerances import assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMS = pytest.mark.parametrize("formulation", ["folded", "input_centric"])


def _refused(*operands: torch.Tensor, region: bool) -> bool:
    """Whether a traced call is left to torch; `region`: autocast is entered in the graph."""
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("x", "weight", "bias")]
    for node, operand in zip(nodes, operands, strict=False):
        node.meta[graphs.VALUE] = operand
    if region:
        enter = torch.amp.autocast_mode._enter_autocast
        begin = graph.call_function(enter, ("cpu", torch.bfloat16, True, None))
        begin.meta[graphs.VALUE] = None
    linear = graph.call_function(graphs.LINEAR, tuple(nodes[: len(operands)]))
    linear.meta[graphs.VALUE] = operands[0]
    if region:
        end = graph.call_function(torch.amp.autocast_mode._exit_autocast, (begin,))
        end.meta[graphs.VALUE] = None
    graph.output(linear)
    contexts = Contexts(fx.GraphModule(nn.Module(), graph))
    return sides.refusal_of_calls(contexts, nodes[1]) is not None


@pytest.mark.parametrize("autocast", ["off", "around", "inside"])
def test_every_mix_of_dtypes_is_refused_where_eager_refuses_it(autocast):
    for dtypes in itertools.product(DTYPES, DTYPES, (*DTYPES, None)):
        shapes = ((3, 6), (8, 6), (8,))
        operands = [torch.ones(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True) if d]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast != "off"):
            try:
                F.linear(*operands)
                refused = False
            except RuntimeError:
                refused = True
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast == "around"):
            assert _refused(*operands, region=autocast == "inside") == refused, dtypes


def _compiled(model, **options):
    options = {"stage": "eager", **options}
    return torch.compile(model, backend=poetx.poetx_backend, options=options)


@FORMS
@pytest.mark.parametrize("adopted", [False, True])
def test_a_bias_that_eager_refuses_is_refused(formulation, adopted):
    model = MLP() if adopted else prepared(MLP(), formulation=formulation)
    model.down.bias = nn.Parameter(model.down.bias.detach().double())
    x = torch.randn(3, 12)
    for call in (model, _compiled(model, formulation=formulation)):
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            call(x)


@FORMS
def test_an_input_that_eager_refuses_is_refused(formulation):
    model = prepared(nn.Sequential(nn.Linear(12, 12)), formulation=formulation)
    for x in (torch.randn(3, 12).double(), torch.randn(3, 12).bfloat16()):
        for call in (model, _compiled(model)):
            with pytest.raises(RuntimeError, match="same dtype"):
                call(x)


class Cast(nn.Module):
    """Checkpointed layers in an autocast region that the forward itself enters."""

    def __init__(self):
        super().__init__()
        self.inner = MLP()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(self.inner, x, use_reentrant=False)


@FORMS
def test_what_autocast_brings_together_is_rewritten(formulation):
    model = prepared(Cast(), formulation=formulation)
    x = torch.randn(3, 12)
    rows = explained(model, x).rows
    assert [row.status for row in rows] == ["rewritten"] * 2
    assert_close(_compiled(model)(x), model(x))


def _jagged() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(length, 12, generator=generator) for length in (3, 5)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


def _gradients(model, x):
    out = model(x)
    out.values().square().sum().backward()
    return [x.grad.values(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(("formulation", "dynamic"), [("folded", None), ("input_centric", True)])
def test_jagged_inputs_have_eager_s_outputs_and_gradients(formulation, dynamic):
    model = prepared(MLP(), formulation=formulation)
    x, again = _jagged(), _jagged()
    expected = _gradients(model, x)
    model.zero_grad()
    compiled = torch.compile(
        model, backend=poetx.poetx_backend, dynamic=dynamic, options={"stage": "aot_eager"}
    )
    for mine, theirs in zip(_gradients(compiled, again), expected, strict=True):
        assert_close(mine, theirs)


def test_jagged_inputs_are_told():
    rows = explained(prepared(MLP(), formulation="auto"), _jagged()).rows
    assert [row.status for row in rows] == ["refused"] * 2
    assert all("an operand is a NestedTensor" in row.reason for row in rows)


def test_jagged_inputs_of_a_model_nobody_prepared_train_its_rotations():
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    compiled = _compiled(model)
    for _ in range(2):
        compiled(_jagged()).values().square().sum().backward()
        optimizer.step()
    assert all(equivalence_of(m).skew_in.abs().max() > 0 for m in (model.up, model.down))
