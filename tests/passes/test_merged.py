"""`merged`: golden graphs, values and gradients beside eager, what is kept, what is refused."""

from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile import ops
from poetx_compile.compile.lowerings import ExpandOps
from poetx_compile.passes import Formulation, Merged, Recompute, Record, graphs, run
from tests.helpers.graph_of import assert_equals_eager, explained, run_passes
from tests.helpers.held import kept
from tests.helpers.references import random_pair
from tests.helpers.tolerances import assert_close


class Layer(nn.Module):
    """A linear whose rotations are the identity; the packed skew parameters have stride 0."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, b: int = 8):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / 4, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None
        self.block_in, self.block_out = (min(b, size) for size in (inputs, outputs))
        self.skew_in, self.skew_out = (
            nn.Parameter(torch.zeros(1).expand(0 if size == 1 else size // b, b * (b - 1) // 2))
            for size, b in ((inputs, self.block_in), (outputs, self.block_out))
        )
        self.register_buffer("perm_in", random_pair(inputs, 1))
        self.register_buffer("perm_out", random_pair(outputs, 2))

    def effective(self) -> torch.Tensor:
        return ops.identity_equivalence(
            self.weight,
            self.skew_in,
            self.skew_out,
            self.perm_in,
            self.perm_out,
            self.block_in,
            self.block_out,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.effective(), self.bias)


class Chain(nn.Module):
    def __init__(self, checkpointed: bool = False):
        super().__init__()
        self.up, self.down, self.checkpointed = (
            Layer(12, 22),
            Layer(22, 12, bias=False),
            checkpointed,
        )

    def inner(self, x):
        return self.down(F.gelu(self.up(x)))

    def forward(self, x):
        return (
            checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)
        )


class Twice(Layer):
    """Two calls with one reading of the weight, in two dtypes, and one with another."""

    cast = False

    def forward(self, x):
        weight = self.effective()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cast):
            y = F.linear(F.linear(x, weight), weight, self.bias)
        return super().forward(F.linear(y.float(), weight))


class Read(Layer):
    def forward(self, x):
        return x @ self.effective().t()


class TestGolden(expecttest.TestCase):
    def test_a_layer(self):
        graph, record = run_passes([Formulation(), Merged()], Layer(12, 20), torch.randn(3, 12))
        (event,) = record.events
        assert (event.shape, event.blocks, event.detail) == ((20, 12), "1x8 | 2x8", "merged")
        self.assertExpectedInline(
            graph,
            """\
weight: f32[20, 12]
skew_in: f32[1, 28]
skew_out: f32[2, 28]
perm_in: i64[2, 12]
perm_out: i64[2, 20]
bias: f32[20]
x: f32[3, 12]
%1: f32[3, 20] = poetx.merged_linear(x, weight, skew_in, skew_out, perm_in, perm_out, 8, 8)
%2: f32[20] = .type_as(bias, %1)
%3: f32[3, 20] = add(%1, %2)
return (%3)
""",
        )

    def test_a_checkpoint_and_a_layer_without_bias(self):
        graph, _ = run_passes([Merged()], Chain(True), torch.randn(3, 12))
        self.assertExpectedInline(
            graph.replace(" [may recompute]", ""),
            """\
x: f32[3, 12]
up.weight: f32[22, 12]
up.skew_in: f32[1, 28]
up.skew_out: f32[2, 28]
up.perm_in: i64[2, 12]
up.perm_out: i64[2, 22]
up.bias: f32[22]
down.weight: f32[12, 22]
down.skew_in: f32[2, 28]
down.skew_out: f32[1, 28]
down.perm_in: i64[2, 22]
down.perm_out: i64[2, 12]
%1: (f32[3, 12]) = tag_activation_checkpoint(wrap_body_0, up.weight, up.skew_in, up.skew_out, up.perm_in, up.perm_out, x, up.bias, down.weight, down.skew_in, down.skew_out, down.perm_in, down.perm_out, use_reentrant=False)
    up.weight: f32[22, 12]
    up.skew_in: f32[1, 28]
    up.skew_out: f32[2, 28]
    up.perm_in: i64[2, 12]
    up.perm_out: i64[2, 22]
    x: f32[3, 12]
    up.bias: f32[22]
    down.weight: f32[12, 22]
    down.skew_in: f32[2, 28]
    down.skew_out: f32[1, 28]
    down.perm_in: i64[2, 22]
    down.perm_out: i64[2, 12]
    %1: f32[3, 22] = poetx.merged_linear(x, up.weight, up.skew_in, up.skew_out, up.perm_in, up.perm_out, 8, 8)
    %2: f32[22] = .type_as(up.bias, %1)
    %3: f32[3, 22] = add(%1, %2)
    %4: f32[3, 22] = gelu(%3)
    %5: f32[3, 12] = poetx.merged_linear(%4, down.weight, down.skew_in, down.skew_out, down.perm_in, down.perm_out, 8, 8)
    return (%5)
%2: f32[3, 12] = getitem(%1, 0)
return (%2)
""",
        )

    def test_several_calls_and_autocast(self):
        model = Twice(16, 16)
        model.cast = True
        graph, _ = run_passes([Merged()], model, torch.randn(3, 16))
        self.assertExpectedInline(
            graph,
            """\
weight: f32[16, 16]
skew_in: f32[2, 28]
skew_out: f32[2, 28]
perm_in: i64[2, 16]
perm_out: i64[2, 16]
x: f32[3, 16]
bias: f32[16]
%1: bf16[16, 16] = .to(weight, torch.bfloat16)
%2 = _enter_autocast(cpu, torch.bfloat16, True, None)
%3: bf16[3, 16] = poetx.merged_linear(x, %1, skew_in, skew_out, perm_in, perm_out, 8, 8)
%4: bf16[3, 16] = poetx.merged_linear(%3, %1, skew_in, skew_out, perm_in, perm_out, 8, 8)
%5: bf16[16] = .type_as(bias, %4)
%6: bf16[3, 16] = add(%4, %5)
%7 = _exit_autocast(%2)
%8: f32[3, 16] = .float(%6)
%9: f32[3, 16] = poetx.merged_linear(%8, weight, skew_in, skew_out, perm_in, perm_out, 8, 8)
%10: f32[3, 16] = poetx.merged_linear(%9, weight, skew_in, skew_out, perm_in, perm_out, 8, 8)
%11: f32[16] = .type_as(bias, %10)
%12: f32[3, 16] = add(%10, %11)
return (%12)
""",
        )

    def test_dynamic_shapes(self):
        x = torch.randn(3, 5, 12)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        graph, _ = run_passes([Merged()], Layer(12, 20, bias=False), x)
        self.assertExpectedInline(
            graph,
            """\
weight: f32[20, 12]
skew_in: f32[1, 28]
skew_out: f32[2, 28]
perm_in: i64[2, 12]
perm_out: i64[2, 20]
x: f32[s0, s1, 12]
%1: f32[s0, s1, 20] = poetx.merged_linear(x, weight, skew_in, skew_out, perm_in, perm_out, 8, 8)
return (%1)
""",
        )

    def test_the_compiled_forward_is_a_linear_and_nothing_else(self):
        """Partitioned and expanded: the skew parameters and permutations are not read."""
        forward, backward = _compiled(Layer(12, 16, bias=False), torch.randn(3, 12))
        self.assertExpectedInline(
            forward,
            """\
aten.view.default: [3, 12]
aten.permute.default: [12, 16]
aten.mm.default: [3, 16]
aten.view.default: [3, 16]
aten.detach.default: [3, 16]
aten.detach.default: [3, 16]
aten.view.default: [3, 12]
aten.view.default: [3, 16]
""",
        )
        self.assertExpectedInline(
            backward,
            """\
aten.view.default: [3, 16]
aten.mm.default: [3, 12]
poetx.skew_block_products.default: [3, 28]
aten.slice.Tensor: [1, 28]
aten.slice.Tensor: [2, 28]
aten.view.default: [3, 12]
""",
        )


def _compiled(model: nn.Module, *inputs: torch.Tensor) -> tuple[str, str]:
    """The calls of the forward graph as Inductor gets it, and of the backward graph before."""
    texts = []

    def look(gm, _):
        if not texts:
            ExpandOps("look")(gm.graph)
        calls = [n for n in gm.graph.nodes if n.op == "call_function"]
        texts.append("".join(f"{n.target}: {list(n.meta['val'].shape)}\n" for n in calls))
        return make_boxed_func(gm.forward)

    def backend(gm, inputs):
        graph = graphs.clone(gm)
        run([Merged(), Recompute("fast")], graph, Record(), verify=True)
        partition = min_cut_rematerialization_partition
        return aot_autograd(fw_compiler=look, bw_compiler=look, partition_fn=partition)(
            graph, inputs
        )

    x = [t.clone().requires_grad_() for t in inputs]
    torch.compile(model, backend=backend, fullgraph=True)(*x).sum().backward()
    forward, backward = texts
    return forward, backward


MODELS = {
    "bias": lambda: Layer(12, 20),
    "odd, two block sizes": lambda: Layer(11, 5, b=7),
    "a side of size 1": lambda: Layer(12, 1),
    "checkpoint": lambda: Chain(True),
    "several calls": lambda: Twice(16, 16),
    "weight-centric": lambda: Read(12, 20),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", ["fast", "mem"])
def test_equals_eager(name: str, variant: str) -> None:
    model = MODELS[name]()
    width = model.up.weight.shape[1] if isinstance(model, Chain) else model.weight.shape[1]
    assert_equals_eager(model, torch.randn(2, 3, width), variant=variant)


def test_equals_eager_without_the_pass_and_with_dynamic_shapes() -> None:
    assert_equals_eager(Layer(12, 20), torch.randn(4, 12), disable_passes=["merged"])
    assert_equals_eager(Layer(12, 20), torch.randn(4, 12), dynamic=True)


def test_a_weight_that_takes_gradients_and_a_frozen_side() -> None:
    model = Layer(12, 20)
    model.weight.requires_grad_()
    model.skew_out.requires_grad_(False)
    assert_equals_eager(model, torch.randn(4, 12))
    assert model.weight.grad is None


def test_mem_keeps_the_input_alone_where_nothing_else_keeps_the_output() -> None:
    model, x = nn.Sequential(Chain(), nn.Identity()), torch.randn(50, 12)
    fast, mem = (kept(model, x, stage="aot_eager", variant=v) for v in ("fast", "mem"))
    assert fast - mem >= 50 * 12 * 4, "the output of the last layer goes nowhere else"


def test_a_weight_read_by_anything_but_linear_is_refused() -> None:
    explanation = explained(Read(12, 20), torch.randn(3, 12))
    (event,) = [e for g in explanation.graphs for e in g.record.refused("merged")]
    assert event.detail == "weight-centric: the weight is read by t, not by F.linear"
    assert "poetx.identity_equivalence" in explanation.after


def test_a_write_into_the_weight_is_refused() -> None:
    class Writes(Layer):
        def forward(self, x):
            weight = self.effective()
            weight.mul_(2)
            return F.linear(x, weight)

    compiled = torch.compile(Writes(12, 20), backend=poetx.poetx_backend)
    with torch.no_grad(), pytest.raises(Exception, match="writes into the weight"):
        compiled(torch.randn(3, 12))


def test_autocast_computes_in_its_dtype() -> None:
    model, x = Layer(12, 20), torch.randn(64, 12, requires_grad=True)
    leaves = [x, model.bias, model.skew_in, model.skew_out]
    compiled = torch.compile(
        model, backend=poetx.poetx_backend, options={"stage": "aot_eager", "verify_passes": True}
    )
    results = []
    for function in (compiled, model):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x)
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert_close(mine, theirs, torch.bfloat16)
