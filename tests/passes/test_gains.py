"""`gains`: golden graphs beside the rotations, outputs and gradients beside eager, refusals."""

from __future__ import annotations

import copy

import expecttest
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.layers.prepared import equivalence_of, prepared_linears
from poetx_compile.passes import Formulation, Gains
from tests.helpers.graph_of import assert_equals_eager, explained, run_passes
from tests.helpers.models import MLP, Siblings, SwiGLU
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close


@torch.no_grad()
def gained(model: nn.Module, gains: str = "both", shared=(), **config) -> nn.Module:
    """`model` prepared and turned, with gains away from one."""
    poetx.prepare(model, poetx.POETXConfig(block_size=8, gains=gains, **config), shared=shared)
    if config.get("merge_interval") != 1:
        turn(model)
    for number, (_, _, e) in enumerate(prepared_linears(model)):
        for gain in e.gains.values():
            values = torch.rand(gain.shape, generator=torch.Generator().manual_seed(number))
            gain.copy_(0.5 + values)
    return model


class Checkpointed(nn.Module):
    """One layer, called twice, inside and outside of a checkpoint."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(12, 12)

    def forward(self, x):
        return checkpoint(self.proj, torch.tanh(self.proj(x)), use_reentrant=False)


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.other = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.other(x) @ self.proj.weight.t()


class TestGolden(expecttest.TestCase):
    def test_rows_around_both_sides_rotated(self):
        model = gained(nn.Linear(12, 20).bfloat16(), "rows")
        passes = [Gains(), Formulation("input_centric")]
        graph, _ = run_passes(passes, model, torch.randn(3, 12).bfloat16())
        self.assertExpectedInline(
            graph,
            """\
original: bf16[20, 12]
skew_in: f32[1, 28]
skew_out: f32[2, 28]
gain_out: f32[20]
perm_in: i64[2, 6]
perm_out: i64[2, 10]
bias: bf16[20]
input: bf16[3, 12]
%1: f32[1, 8, 8] = poetx.cayley_neumann(skew_in, 8, 3, True)
%2: f32[2, 8, 8] = poetx.cayley_neumann(skew_out, 8, 3, True)
%3: bf16[3, 12] = poetx.rotate_blocks(input, %1, perm_in, None, False)
%4: bf16[3, 20] = linear(%3, original, None)
%5: bf16[3, 20] = poetx.rotate_blocks(%4, %2, None, perm_out, False)
%6: f32[3, 20] = mul(%5, gain_out)
%7: bf16[3, 20] = .type_as(%6, %5)
%8: bf16[20] = .type_as(bias, %7)
%9: bf16[3, 20] = add(%7, %8)
return (%9)
""",
        )

    def test_both_around_both_sides_folded(self):
        model = gained(nn.Linear(12, 20), "both")
        graph, _ = run_passes([Gains(), Formulation("folded")], model, torch.randn(3, 12))
        self.assertExpectedInline(
            graph,
            """\
original: f32[20, 12]
skew_in: f32[1, 28]
skew_out: f32[2, 28]
gain_in: f32[12]
gain_out: f32[20]
perm_in: i64[2, 6]
perm_out: i64[2, 10]
bias: f32[20]
input: f32[3, 12]
%1: f32[1, 28] = .detach(skew_in)
%2: f32[1, 8, 8] = poetx.rotation_delta(%1, 8, 3, torch.float32, 0)
%3: f32[1, 8, 8] = poetx.rotation_tangent(skew_in, 8, 3, False, 0)
%4: f32[2, 28] = .detach(skew_out)
%5: f32[2, 8, 8] = poetx.rotation_delta(%4, 8, 3, torch.float32, 2)
%6: f32[2, 8, 8] = poetx.rotation_tangent(skew_out, 8, 3, False, 2)
%7: f32[20, 12] = poetx.fold_weight(original, %2, %5, perm_in, perm_out, torch.float32)
%8: f32[3, 12] = mul(input, gain_in)
%9: f32[3, 12] = .type_as(%8, input)
%10: f32[3, 20] = poetx.folded_linear(%9, %7, %3, %6, perm_in, perm_out)
%11: f32[3, 20] = mul(%10, gain_out)
%12: f32[3, 20] = .type_as(%11, %10)
%13: f32[20] = .type_as(bias, %12)
%14: f32[3, 20] = add(%12, %13)
return (%14)
""",
        )


@pytest.mark.parametrize(
    ("model", "width", "config"),
    [
        (Siblings, 48, {"formulation": "folded"}),
        (lambda: nn.Sequential(nn.Linear(7, 1), nn.Linear(1, 5)), 7, {"formulation": "folded"}),
        (Checkpointed, 12, {"formulation": "input_centric"}),
        (MLP, 12, {"merge_interval": 1}),
    ],
)
def test_outputs_and_gradients_are_those_of_eager(model, width, config) -> None:
    model = gained(model().double(), **config)
    assert_equals_eager(model, torch.randn(5, width).double())


def test_permutations_that_meet_cancel_around_gains() -> None:
    shared = [("gate_proj.out", "up_proj.out", "down_proj.in")]
    model = gained(SwiGLU().double(), "rows", shared, formulation="input_centric")
    x = torch.randn(5, 16).double()
    explanation = explained(model, x)
    assert "permute_columns(gate_proj.gain_out, gate_proj.perm_out" in explanation.after
    assert_equals_eager(model, x)


@pytest.mark.parametrize("formulation", ["input_centric", "folded"])
def test_under_autocast_gains_multiply_in_fp32(formulation) -> None:
    model, x = gained(MLP(), "both", formulation=formulation), torch.randn(33, 12)
    options = {"stage": "aot_eager", "verify_passes": True}
    compiled = torch.compile(model, backend=poetx.poetx_backend, fullgraph=True, options=options)
    parameters = dict(model.named_parameters())

    def gradients(run) -> list[torch.Tensor]:
        out = run(x)
        trained = [p for p in parameters.values() if p.requires_grad]
        return [out, *torch.autograd.grad(out.float().square().sum(), trained)]

    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(compiled)
    assert actual[0].dtype == torch.bfloat16
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(mine, theirs, torch.bfloat16)


def test_frozen_gains_get_no_gradient() -> None:
    model = gained(MLP())
    model.up.weight.requires_grad_(False)
    for skew in equivalence_of(model.down).skews:
        skew.requires_grad_(False)
    assert_equals_eager(model, torch.randn(3, 12))


def test_a_weight_that_something_else_reads_keeps_its_gains() -> None:
    model, x = gained(ReadsWeight()), torch.randn(3, 12)
    explanation = explained(model, x)
    reasons = {row.name: row.reason for row in explanation.rows}
    reason = "weight-centric: the weight is read by t, not by F.linear"
    assert reasons == {"proj": reason, "other": ""}
    assert explanation.graphs[0].record.refused("gains")[0].detail == reason
    assert_equals_eager(model, x)


def test_multi_head_attention_is_right() -> None:
    model = gained(nn.MultiheadAttention(16, 2, batch_first=True).double())
    x = torch.randn(2, 5, 16).double()
    compiled = torch.compile(model, backend=poetx.poetx_backend, options={"stage": "eager"})
    expected = poetx.merge_and_unload(copy.deepcopy(model))(x, x, x)[0]
    assert_close(model(x, x, x)[0], expected)
    assert_close(compiled(x, x, x)[0], expected)


def test_without_the_pass_the_weight_is_built() -> None:
    model, x = gained(MLP()), torch.randn(3, 12)
    (row, _) = explained(model, x, disable_passes=["gains"]).rows
    assert row.reason == "weight-centric: gains is among disable_passes"
    assert_equals_eager(model, x, disable_passes=["gains"])
