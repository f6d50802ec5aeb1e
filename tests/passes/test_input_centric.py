"""`input_centric`: golden graphs, refusals, and equality with the weight-centric form."""

from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from tests.helpers.graph_of import after, assert_equals_eager, explained, prepared
from tests.helpers.models import MLP, OddZoo, SwiGLU


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class One(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.proj = nn.Linear(12, 20, bias=bias)

    def forward(self, x):
        return self.proj(x)


class ReadsWeight(nn.Module):
    """Uses the weight itself, as `F.multi_head_attention_forward` does."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(12, 12)

    def forward(self, x):
        return x @ self.proj.weight.t()


class TestGolden(expecttest.TestCase):
    def test_one_linear(self):
        model = prepared(One(bias=False))
        self.assertExpectedInline(
            after(model, torch.randn(3, 12)),
            """\
proj.original: f32[20, 12]
proj.skew_in: f32[1, 28]
proj.skew_out: f32[2, 28]
proj.perm_in: i64[2, 12]
proj.perm_out: i64[2, 20]
x: f32[3, 12]
%1: f32[3, 28] = cat([proj.skew_in, proj.skew_out]) [recompute]
%2: f32[3, 8, 8] = poetx.cayley_neumann(%1, 8, 3) [recompute]
%3: (f32[1, 8, 8], f32[2, 8, 8]) = split(%2, [1, 2]) [recompute]
%4: f32[1, 8, 8] = getitem(%3, 0) [recompute]
%5: f32[2, 8, 8] = getitem(%3, 1) [recompute]
%6: f32[3, 12] = poetx.rotate_blocks(x, %4, proj.perm_in, None, False)
%7: f32[3, 20] = linear(%6, proj.original, None)
%8: f32[3, 20] = poetx.rotate_blocks(%7, %5, None, proj.perm_out, False)
return (%8)
""",
        )

    def test_linear_with_bias(self):
        model = prepared(One(bias=True))
        self.assertExpectedInline(
            after(model, torch.randn(3, 12)),
            """\
proj.original: f32[20, 12]
proj.skew_in: f32[1, 28]
proj.skew_out: f32[2, 28]
proj.perm_in: i64[2, 12]
proj.perm_out: i64[2, 20]
proj.bias: f32[20]
x: f32[3, 12]
%1: f32[3, 28] = cat([proj.skew_in, proj.skew_out]) [recompute]
%2: f32[3, 8, 8] = poetx.cayley_neumann(%1, 8, 3) [recompute]
%3: (f32[1, 8, 8], f32[2, 8, 8]) = split(%2, [1, 2]) [recompute]
%4: f32[1, 8, 8] = getitem(%3, 0) [recompute]
%5: f32[2, 8, 8] = getitem(%3, 1) [recompute]
%6: f32[3, 12] = poetx.rotate_blocks(x, %4, proj.perm_in, None, False)
%7: f32[3, 20] = linear(%6, proj.original, None)
%8: f32[3, 20] = poetx.rotate_blocks(%7, %5, None, proj.perm_out, False)
%9: f32[20] = .type_as(proj.bias, %8)
%10: f32[3, 20] = add(%8, %9)
return (%10)
""",
        )

    def test_checkpointed_block(self):
        model = prepared(Checkpointed(MLP()))
        self.assertExpectedInline(
            after(model, torch.randn(3, 12)),
            """\
x: f32[3, 12]
inner.up.original: f32[22, 12]
inner.up.skew_in: f32[1, 28]
inner.up.skew_out: f32[2, 28]
inner.up.perm_in: i64[2, 12]
inner.up.perm_out: i64[2, 22]
inner.up.bias: f32[22]
inner.down.original: f32[12, 22]
inner.down.skew_in: f32[2, 28]
inner.down.skew_out: f32[1, 28]
inner.down.perm_in: i64[2, 22]
inner.down.perm_out: i64[2, 12]
inner.down.bias: f32[12]
%1: (f32[3, 12]) = tag_activation_checkpoint(wrap_body_0, inner.up.original, inner.up.skew_in, inner.up.skew_out, inner.up.perm_in, inner.up.perm_out, x, inner.up.bias, inner.down.original, inner.down.skew_in, inner.down.skew_out, inner.down.perm_in, inner.down.perm_out, inner.down.bias, use_reentrant=False)
    inner.up.original: f32[22, 12]
    inner.up.skew_in: f32[1, 28]
    inner.up.skew_out: f32[2, 28]
    inner.up.perm_in: i64[2, 12]
    inner.up.perm_out: i64[2, 22]
    x: f32[3, 12]
    inner.up.bias: f32[22]
    inner.down.original: f32[12, 22]
    inner.down.skew_in: f32[2, 28]
    inner.down.skew_out: f32[1, 28]
    inner.down.perm_in: i64[2, 22]
    inner.down.perm_out: i64[2, 12]
    inner.down.bias: f32[12]
    %1: f32[6, 28] = cat([inner.up.skew_in, inner.up.skew_out, inner.down.skew_in, inner.down.skew_out])
    %2: f32[6, 8, 8] = poetx.cayley_neumann(%1, 8, 3)
    %3: (f32[1, 8, 8], f32[2, 8, 8], f32[2, 8, 8], f32[1, 8, 8]) = split(%2, [1, 2, 2, 1])
    %4: f32[1, 8, 8] = getitem(%3, 0)
    %5: f32[2, 8, 8] = getitem(%3, 1)
    %6: f32[2, 8, 8] = getitem(%3, 2)
    %7: f32[1, 8, 8] = getitem(%3, 3)
    %8: f32[3, 12] = poetx.rotate_blocks(x, %4, inner.up.perm_in, None, False)
    %9: f32[3, 22] = linear(%8, inner.up.original, None)
    %10: f32[3, 22] = poetx.rotate_blocks(%9, %5, None, inner.up.perm_out, False)
    %11: f32[22] = .type_as(inner.up.bias, %10)
    %12: f32[3, 22] = add(%10, %11)
    %13: f32[3, 22] = gelu(%12)
    %14: f32[3, 22] = poetx.rotate_blocks(%13, %6, inner.down.perm_in, None, False)
    %15: f32[3, 12] = linear(%14, inner.down.original, None)
    %16: f32[3, 12] = poetx.rotate_blocks(%15, %7, None, inner.down.perm_out, False)
    %17: f32[12] = .type_as(inner.down.bias, %16)
    %18: f32[3, 12] = add(%16, %17)
    return (%18)
%2: f32[3, 12] = getitem(%1, 0)
return (%2)
""",
        )

    def test_dynamic_batch(self):
        model = prepared(One(bias=True))
        x = torch.randn(3, 5, 12)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        self.assertExpectedInline(
            after(model, x),
            """\
proj.original: f32[20, 12]
proj.skew_in: f32[1, 28]
proj.skew_out: f32[2, 28]
proj.perm_in: i64[2, 12]
proj.perm_out: i64[2, 20]
proj.bias: f32[20]
x: f32[s0, s1, 12]
%1: f32[3, 28] = cat([proj.skew_in, proj.skew_out]) [recompute]
%2: f32[3, 8, 8] = poetx.cayley_neumann(%1, 8, 3) [recompute]
%3: (f32[1, 8, 8], f32[2, 8, 8]) = split(%2, [1, 2]) [recompute]
%4: f32[1, 8, 8] = getitem(%3, 0) [recompute]
%5: f32[2, 8, 8] = getitem(%3, 1) [recompute]
%6: f32[s0, s1, 12] = poetx.rotate_blocks(x, %4, proj.perm_in, None, False)
%7: f32[s0, s1, 20] = linear(%6, proj.original, None)
%8: f32[s0, s1, 20] = poetx.rotate_blocks(%7, %5, None, proj.perm_out, False)
%9: f32[20] = .type_as(proj.bias, %8)
%10: f32[s0, s1, 20] = add(%8, %9)
return (%10)
""",
        )

    def test_refused_layer(self):
        model = prepared(ReadsWeight())
        explanation = explained(model, torch.randn(3, 12))
        self.assertExpectedInline(
            f"{explanation.rows[0].status}: {explanation.rows[0].reason}\n{explanation.after}\n",
            """\
refused: weight-centric: the weight is read by t, not by F.linear
proj.original: f32[12, 12]
proj.skew_in: f32[1, 28]
proj.skew_out: f32[1, 28]
proj.perm_in: i64[2, 12]
proj.perm_out: i64[2, 12]
x: f32[3, 12]
%1: f32[12, 12] = poetx.orthogonal_equivalence(proj.original, proj.skew_in, proj.skew_out, proj.perm_in, proj.perm_out, 8, 8, 3)
%2: f32[12, 12] = .t(%1)
%3: f32[3, 12] = matmul(x, %2)
return (%3)
""",
        )


@pytest.mark.parametrize("variant", ["fast", "mem"])
@pytest.mark.parametrize("shape", [(12,), (0, 12), (5, 12), (2, 3, 12)])
def test_outputs_and_gradients_equal_the_weight_centric_form(shape, variant):
    model = prepared(MLP().double())
    assert_equals_eager(model, torch.randn(shape, dtype=torch.float64), variant=variant)


@pytest.mark.parametrize("block_size", [2, 3, (4, 16), 64])
def test_odd_sizes_and_sides_of_size_one(block_size):
    model = prepared(OddZoo().double(), block_size)
    assert_equals_eager(model, torch.randn(4, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    "config", [{"cayley": "exact"}, {"neumann_order": 1}, {"neumann_order": 5}]
)
def test_every_cayley_form(config):
    model = prepared(SwiGLU().double(), **config)
    assert_equals_eager(model, torch.randn(4, 16, dtype=torch.float64))


def test_checkpointed_block_equals_eager():
    model = prepared(Checkpointed(SwiGLU().double()))
    assert_equals_eager(model, torch.randn(4, 16, dtype=torch.float64))


def test_one_weight_read_by_two_calls_builds_its_rotations_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(12, 12)

        def forward(self, x):
            return self.shared(torch.tanh(self.shared(x)))

    model = prepared(Twice().double())
    graph = after(model, torch.randn(3, 12).double(), disable_passes=["batch_cayley"])
    assert graph.count("poetx.cayley_neumann") == 2
    assert_equals_eager(model, torch.randn(3, 12).double())


def test_multihead_attention_is_right_though_its_weight_is_read_raw():
    model = prepared(nn.MultiheadAttention(16, 4, batch_first=True))

    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    assert_equals_eager(SelfAttention().double(), torch.randn(2, 5, 16).double())


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_gives_the_dtype_of_a_plain_linear(bias):
    model = nn.Linear(12, 20, bias=bias)
    x = torch.randn(3, 12)

    class Under(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = model

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.linear(x)

    plain = Under()(x)
    module = prepared(Under())
    reference = module(x)
    compiled = torch.compile(
        module,
        backend=poetx.poetx_backend,
        fullgraph=True,
        options={"stage": "aot_eager", "verify_passes": True},
    )(x)
    assert plain.dtype == reference.dtype == compiled.dtype == torch.bfloat16
    assert "bf16[3, 20] = poetx.rotate_blocks" in after(module, x)
    error = (compiled.double() - reference.double()).norm() / reference.double().norm()
    assert error < 1.5e-2


def test_autocast_around_the_call_is_seen():
    module = prepared(MLP())
    compiled = torch.compile(
        module, backend=poetx.poetx_backend, fullgraph=True, options={"stage": "aot_eager"}
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(torch.randn(3, 12)).dtype == torch.bfloat16
    assert compiled(torch.randn(3, 12)).dtype == torch.float32


def test_no_grad_and_graph_breaks():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = MLP(), MLP()

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = prepared(Breaks().double())
    x = torch.randn(3, 12).double()
    expected = model(x)
    compiled = torch.compile(model, backend=poetx.poetx_backend, options={"stage": "aot_eager"})
    torch.testing.assert_close(compiled(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    explanation = explained(model, x)
    assert len(explanation.graphs) > 1
    assert [row.status for row in explanation.rows] == ["rewritten"] * 4
    assert explanation.rows[0].name == "first.up"


def test_no_dense_weight_gradient_is_formed():
    """No value of the backward graph has the shape of a weight, but the frozen weight itself."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    from poetx_compile.compile.options import BackendOptions
    from poetx_compile.compile.rewrite import rewrite

    backwards = []

    def backend(gm, inputs):
        rewritten = rewrite(gm, inputs, BackendOptions())

        def keep(module, _):
            backwards.append(module.graph)
            return module.forward

        compiled = aot_autograd(
            fw_compiler=lambda module, _: module.forward,
            bw_compiler=keep,
            partition_fn=min_cut_rematerialization_partition,
        )(rewritten.graph, [*inputs, *rewritten.inputs])
        return rewritten.bind(compiled)

    model = prepared(SwiGLU(width=16, hidden=40))
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(3, 5, 16)).sum().backward()
    shapes = {(16, 40), (40, 16)}
    made = [
        node
        for node in backwards[0].nodes
        if node.op == "call_function"
        and isinstance(node.meta.get("val"), torch.Tensor)
        and tuple(node.meta["val"].shape) in shapes
    ]
    transposes = (
        torch.ops.aten.t.default,
        torch.ops.aten.permute.default,
        torch.ops.aten.detach.default,
    )
    assert len(backwards) == 1
    assert all(node.target in transposes for node in made), made
    targets = [node.target for node in backwards[0].nodes]
    assert torch.ops.poetx.block_product.default in targets


def test_functional_linear_by_keyword_is_matched():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(12, 20)

        def forward(self, x):
            return F.linear(bias=self.inner.bias, weight=self.inner.weight, input=x)

    model = prepared(Keyword().double())
    assert "orthogonal_equivalence" not in after(model, torch.randn(3, 12).double())
    assert_equals_eager(model, torch.randn(3, 12).double())
