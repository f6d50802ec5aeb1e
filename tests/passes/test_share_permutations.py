"""`share_permutations`: golden graphs of SwiGLU and attention, refusal, equality."""

from __future__ import annotations

import expecttest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.passes import Formulation, SharePermutations
from tests.helpers.graph_of import assert_equals_eager, explained, prepared, run_passes
from tests.helpers.models import Attention, SwiGLU

PASSES = [Formulation(), SharePermutations()]


class TestGolden(expecttest.TestCase):
    def test_swiglu_mlp(self):
        model = prepared(SwiGLU(), permutation="random")
        graph, _ = run_passes(PASSES, model, torch.randn(3, 16))
        self.assertExpectedInline(
            graph,
            """\
gate_proj.original: f32[40, 16]
gate_proj.skew_in: f32[2, 28]
gate_proj.skew_out: f32[5, 28]
gate_proj.perm_in: i64[2, 16]
gate_proj.perm_out: i64[2, 40]
x: f32[3, 16]
up_proj.original: f32[40, 16]
up_proj.skew_in: f32[2, 28]
up_proj.skew_out: f32[5, 28]
up_proj.perm_out: i64[2, 40]
down_proj.original: f32[16, 40]
down_proj.skew_in: f32[5, 28]
down_proj.skew_out: f32[2, 28]
down_proj.perm_in: i64[2, 40]
down_proj.perm_out: i64[2, 16]
%1: f32[2, 8, 8] = poetx.cayley_neumann(gate_proj.skew_in, 8, 3)
%2: f32[5, 8, 8] = poetx.cayley_neumann(gate_proj.skew_out, 8, 3)
%3: f32[3, 16] = poetx.permute_columns(x, gate_proj.perm_in)
%4: f32[3, 16] = poetx.rotate_blocks(%3, %1, None, None, False)
%5: f32[3, 40] = linear(%4, gate_proj.original, None)
%6: f32[3, 40] = poetx.rotate_blocks(%5, %2, None, gate_proj.perm_out, False)
%7: f32[3, 40] = silu(%6)
%8: f32[2, 8, 8] = poetx.cayley_neumann(up_proj.skew_in, 8, 3)
%9: f32[5, 8, 8] = poetx.cayley_neumann(up_proj.skew_out, 8, 3)
%10: f32[3, 16] = poetx.rotate_blocks(%3, %8, None, None, False)
%11: f32[3, 40] = linear(%10, up_proj.original, None)
%12: f32[3, 40] = poetx.rotate_blocks(%11, %9, None, up_proj.perm_out, False)
%13: f32[3, 40] = mul(%7, %12)
%14: f32[5, 8, 8] = poetx.cayley_neumann(down_proj.skew_in, 8, 3)
%15: f32[2, 8, 8] = poetx.cayley_neumann(down_proj.skew_out, 8, 3)
%16: f32[3, 40] = poetx.rotate_blocks(%13, %14, down_proj.perm_in, None, False)
%17: f32[3, 16] = linear(%16, down_proj.original, None)
%18: f32[3, 16] = poetx.rotate_blocks(%17, %15, None, down_proj.perm_out, False)
return (%18)
""",
        )

    def test_attention_with_q_k_v(self):
        model = prepared(Attention(), permutation="random")
        graph, _ = run_passes(PASSES, model, torch.randn(2, 5, 16))
        self.assertExpectedInline(
            graph,
            """\
q_proj.original: f32[16, 16]
q_proj.skew_in: f32[2, 28]
q_proj.skew_out: f32[2, 28]
q_proj.perm_in: i64[2, 16]
q_proj.perm_out: i64[2, 16]
x: f32[2, 5, 16]
k_proj.original: f32[8, 16]
k_proj.skew_in: f32[2, 28]
k_proj.skew_out: f32[1, 28]
k_proj.perm_out: i64[2, 8]
v_proj.original: f32[8, 16]
v_proj.skew_in: f32[2, 28]
v_proj.skew_out: f32[1, 28]
v_proj.perm_out: i64[2, 8]
o_proj.original: f32[16, 16]
o_proj.skew_in: f32[2, 28]
o_proj.skew_out: f32[2, 28]
o_proj.perm_out: i64[2, 16]
%1: f32[2, 8, 8] = poetx.cayley_neumann(q_proj.skew_in, 8, 3)
%2: f32[2, 8, 8] = poetx.cayley_neumann(q_proj.skew_out, 8, 3)
%3: f32[2, 5, 16] = poetx.permute_columns(x, q_proj.perm_in)
%4: f32[2, 5, 16] = poetx.rotate_blocks(%3, %1, None, None, False)
%5: f32[2, 5, 16] = linear(%4, q_proj.original, None)
%6: f32[2, 5, 16] = poetx.rotate_blocks(%5, %2, None, q_proj.perm_out, False)
%7: f32[2, 5, 4, 4] = .unflatten(%6, -1, (4, 4))
%8: f32[2, 4, 5, 4] = .transpose(%7, -2, -3)
%9: f32[2, 4, 5, 4] = .repeat_interleave(%8, 1, dim=-3)
%10: f32[2, 8, 8] = poetx.cayley_neumann(k_proj.skew_in, 8, 3)
%11: f32[1, 8, 8] = poetx.cayley_neumann(k_proj.skew_out, 8, 3)
%12: f32[2, 5, 16] = poetx.rotate_blocks(%3, %10, None, None, False)
%13: f32[2, 5, 8] = linear(%12, k_proj.original, None)
%14: f32[2, 5, 8] = poetx.rotate_blocks(%13, %11, None, k_proj.perm_out, False)
%15: f32[2, 5, 2, 4] = .unflatten(%14, -1, (2, 4))
%16: f32[2, 2, 5, 4] = .transpose(%15, -2, -3)
%17: f32[2, 4, 5, 4] = .repeat_interleave(%16, 2, dim=-3)
%18: f32[2, 8, 8] = poetx.cayley_neumann(v_proj.skew_in, 8, 3)
%19: f32[1, 8, 8] = poetx.cayley_neumann(v_proj.skew_out, 8, 3)
%20: f32[2, 5, 16] = poetx.rotate_blocks(%3, %18, None, None, False)
%21: f32[2, 5, 8] = linear(%20, v_proj.original, None)
%22: f32[2, 5, 8] = poetx.rotate_blocks(%21, %19, None, v_proj.perm_out, False)
%23: f32[2, 5, 2, 4] = .unflatten(%22, -1, (2, 4))
%24: f32[2, 2, 5, 4] = .transpose(%23, -2, -3)
%25: f32[2, 4, 5, 4] = .repeat_interleave(%24, 2, dim=-3)
%26: f32[2, 4, 5, 4] = scaled_dot_product_attention(%9, %17, %25, is_causal=True)
%27: f32[2, 5, 4, 4] = .transpose(%26, -2, -3)
%28: f32[2, 5, 16] = .flatten(%27, -2)
%29: f32[2, 8, 8] = poetx.cayley_neumann(o_proj.skew_in, 8, 3)
%30: f32[2, 8, 8] = poetx.cayley_neumann(o_proj.skew_out, 8, 3)
%31: f32[2, 5, 16] = poetx.rotate_blocks(%28, %29, q_proj.perm_in, None, False)
%32: f32[2, 5, 16] = linear(%31, o_proj.original, None)
%33: f32[2, 5, 16] = poetx.rotate_blocks(%32, %30, None, o_proj.perm_out, False)
return (%33)
""",
        )


class TwoParents(nn.Module):
    """Two linears fed by one tensor, in modules of their own: two groups."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(16, 8))
        self.b = nn.Sequential(nn.Linear(16, 8))

    def forward(self, x):
        return self.a(x) + self.b(x)


def test_layers_of_different_groups_are_refused_with_a_reason():
    explanation = explained(prepared(TwoParents()), torch.randn(3, 16))
    (event,) = explanation.graphs[0].record.refused("share_permutations")
    assert "different groups" in event.detail
    assert {layer.name for layer in event.layers} == {"a.0", "b.0"}
    assert "permute_columns" not in explanation.after
    assert "different groups" in explanation.text(verbose=True)


def test_a_lone_layer_does_not_fire():
    explanation = explained(prepared(nn.Linear(16, 8)), torch.randn(3, 16))
    assert not explanation.graphs[0].record.applied("share_permutations")
    assert not explanation.graphs[0].record.refused("share_permutations")


def test_shared_gather_is_bitwise_the_same():
    model = prepared(Attention())
    x = torch.randn(2, 5, 16)
    results = [
        torch.compile(
            model,
            backend=poetx.poetx_backend,
            options={"stage": "eager", "disable_passes": disabled},
        )(x)
        for disabled in ((), ("share_permutations",))
    ]
    assert torch.equal(*results)


def test_gradients_equal_eager():
    assert_equals_eager(prepared(Attention().double()), torch.randn(2, 5, 16).double())


def test_groups_survive_saving_and_moving():
    model = prepared(Attention())
    e = [model.get_submodule(f"{n}_proj").parametrizations.weight[0] for n in "qkv"]
    assert e[0].perm_in is e[1].perm_in is e[2].perm_in
    model.to(torch.float64)
    assert e[0].perm_in.pair is e[2].perm_in.pair
    saved = [x.layout[3].item() for x in e]
    assert len(set(saved)) == 1, "the group id is saved"


def test_chunks_are_left_to_the_products_which_gather_them() -> None:
    model = prepared(SwiGLU(64, 96), 32, permutation="chunked")
    graph, record = run_passes(PASSES, model, torch.randn(3, 64))
    (event,) = record.refused("share_permutations")
    assert event.detail == "chunks of columns are gathered inside the products"
    assert "permute_columns" not in graph
