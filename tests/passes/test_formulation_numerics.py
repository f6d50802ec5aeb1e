"""`formulation`: outputs and gradients of rotated and folded layers are those of eager code."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.optim.merge import merge
from tests.helpers.graph_of import after, assert_equals_eager, explained, prepared
from tests.helpers.models import MLP, Block, OddZoo, SwiGLU
from tests.helpers.tolerances import assert_close

FORMS = pytest.mark.parametrize("formulation", ["folded", "input_centric"])


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


@FORMS
@pytest.mark.parametrize(
    ("make", "width", "variant"),
    [  # stage eager keeps what it keeps, whatever a variant marks
        (MLP, 12, "fast"),
        (MLP, 12, "mem"),
        (SwiGLU, 16, "fast"),
        (Block, 16, "mem"),
        (OddZoo, 7, "fast"),
    ],
)
def test_outputs_and_gradients_equal_the_weight_centric_form(make, width, variant, formulation):
    model = prepared(make().double(), formulation=formulation, variant=variant)
    stage = "aot_eager" if make is MLP else "eager"
    assert_equals_eager(model, torch.randn(2, 5, width).double(), stage=stage)


@FORMS
@pytest.mark.parametrize("shape", [(12,), (0, 12), (5, 12)])
def test_any_leading_shape(shape, formulation):
    model = prepared(MLP().double(), formulation=formulation)
    assert_equals_eager(model, torch.randn(shape).double())


@FORMS
@pytest.mark.parametrize("block_size", [2, 3, (4, 16), 64])
def test_odd_sizes_and_sides_of_size_one(block_size, formulation):
    model = prepared(OddZoo().double(), block_size, formulation=formulation)
    assert_equals_eager(model, torch.randn(4, 7).double(), stage="eager")


@FORMS
@pytest.mark.parametrize("order", [1, 2, 5, None])
def test_every_expansion(formulation, order):
    config = {"cayley": "exact"} if order is None else {"neumann_order": order}
    model = prepared(nn.Linear(16, 24).double(), formulation=formulation, **config)
    assert_equals_eager(model, torch.randn(6, 16).double(), stage="eager")


@FORMS
def test_dynamic_shapes(formulation):
    model = prepared(SwiGLU(), formulation=formulation)
    assert_equals_eager(model, torch.randn(3, 16), dynamic=True)


def test_checkpointed_block_equals_eager():
    model = prepared(Checkpointed(SwiGLU().double()))
    assert_equals_eager(model, torch.randn(4, 16, dtype=torch.float64))


@FORMS
def test_a_module_called_twice(formulation):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(12, 12)

        def forward(self, x):
            return self.shared(torch.tanh(self.shared(x)))

    model = prepared(Twice().double(), formulation=formulation)
    assert_equals_eager(model, torch.randn(3, 12).double(), stage="eager")


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


def test_merges_leave_the_compiled_graph_right() -> None:
    model = prepared(SwiGLU(), formulation="folded", merge_rotation="plain")
    compiled = torch.compile(model, backend=poetx.poetx_backend, options={"stage": "aot_eager"})
    x = torch.randn(4, 16)
    before = compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        merge(model, redraw=True)
        assert_close(compiled(x), before, torch.bfloat16)
        assert_close(compiled(x), model(x))
