"""`folded`: golden graphs, the choice of each side, and the same function as eager."""

from __future__ import annotations

import expecttest
import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from poetx_compile.optim.merge import merge
from tests.helpers.graph_of import after, assert_equals_eager, explained, prepared
from tests.helpers.held import saved_activations
from tests.helpers.models import MLP, Block, OddZoo, SwiGLU
from tests.helpers.tolerances import assert_close


def narrow(model: nn.Module) -> nn.Module:
    """`model` in bf16, which is where ``formulation="auto"`` considers folding."""
    return prepared(model.bfloat16(), formulation="auto")


def detail(model: nn.Module, tokens: int, **machine: float) -> str:
    """What `explain` says of the one layer of `model` on a machine."""
    x = torch.randn(tokens, 64, dtype=torch.bfloat16)
    (row,) = explained(model, x, machine=machine).rows
    return row.formulation


class TestGolden(expecttest.TestCase):
    def test_both_sides(self):
        model = prepared(nn.Linear(12, 20), formulation="folded")
        self.assertExpectedInline(
            after(model, torch.randn(3, 12)),
            """\
original: f32[20, 12]
skew_in: f32[1, 28]
skew_out: f32[2, 28]
perm_in: i64[2, 12]
perm_out: i64[2, 20]
bias: f32[20]
args_0: f32[3, 12]
%1: f32[3, 28] = cat([skew_in, skew_out]) [recompute]
%2: f32[3, 28] = .detach(%1) [recompute]
%3: f32[3, 8, 8] = poetx.rotation_delta(%2, 8, 3, torch.float32, 2) [recompute]
%4: (f32[1, 8, 8], f32[2, 8, 8]) = split(%3, [1, 2]) [recompute]
%5: f32[1, 8, 8] = getitem(%4, 0) [recompute]
%6: f32[2, 8, 8] = getitem(%4, 1) [recompute]
%7: f32[3, 28] = cat([skew_in, skew_out]) [recompute]
%8: f32[3, 8, 8] = poetx.rotation_tangent(%7, 8, 3, False, 2) [recompute]
%9: (f32[1, 8, 8], f32[2, 8, 8]) = split(%8, [1, 2]) [recompute]
%10: f32[1, 8, 8] = getitem(%9, 0) [recompute]
%11: f32[2, 8, 8] = getitem(%9, 1) [recompute]
%12: f32[20, 12] = poetx.fold_weight(original, %5, %6, perm_in, perm_out, torch.float32)
%13: f32[3, 20] = poetx.folded_linear(args_0, %12, %10, %11, perm_in, perm_out)
%14: f32[20] = .type_as(bias, %13)
%15: f32[3, 20] = add(%13, %14)
return (%15)
""",
        )

    def test_one_side(self):
        # Per token, rotating 2 columns is cheap and rotating 320 is not.
        model = prepared(nn.Linear(2, 320, bias=False).bfloat16(), formulation="auto")
        x = torch.randn(8, 2, dtype=torch.bfloat16)
        options = {"machine": {"bytes": 1e3, "launch": 1e-9}}
        self.assertExpectedInline(
            after(model, x, **options),
            """\
original: bf16[320, 2]
skew_in: f32[1, 1]
skew_out: f32[40, 28]
perm_in: i64[2, 2]
perm_out: i64[2, 320]
args_0: bf16[8, 2]
%1: f32[1, 2, 2] = poetx.cayley_neumann(skew_in, 2, 3, True) [recompute]
%2: f32[40, 28] = .detach(skew_out) [recompute]
%3: bf16[40, 8, 8] = poetx.rotation_delta(%2, 8, 3, torch.bfloat16, 40) [recompute]
%4: f32[40, 8, 8] = poetx.rotation_tangent(skew_out, 8, 3, True, 40) [recompute]
%5: bf16[320, 2] = poetx.fold_weight(original, None, %3, None, perm_out, torch.bfloat16)
%6: bf16[8, 2] = poetx.rotate_blocks(args_0, %1, perm_in, None, False)
%7: bf16[8, 320] = poetx.folded_linear(%6, %5, None, %4, None, perm_out)
return (%7)
""",
        )


@pytest.mark.parametrize(("make", "width"), [(MLP, 12), (SwiGLU, 16), (Block, 16), (OddZoo, 7)])
@pytest.mark.parametrize("variant", ["fast", "mem"])
def test_the_same_function(make, width, variant) -> None:
    model, x = make(), torch.randn(2, 5, width)
    assert_equals_eager(prepared(model, formulation="folded", variant=variant), x)


@pytest.mark.parametrize("order", [1, 2, 4, None])
def test_other_expansions(order) -> None:
    config = {"cayley": "exact"} if order is None else {"neumann_order": order}
    model = prepared(nn.Linear(16, 24), formulation="folded", **config)
    assert_equals_eager(model, torch.randn(6, 16))


def test_dynamic_shapes() -> None:
    model = prepared(SwiGLU(), formulation="folded")
    assert_equals_eager(model, torch.randn(3, 16), dynamic=True)


def test_a_module_called_twice_folds_once() -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(16, 16)

        def forward(self, x):
            return self.proj(torch.tanh(self.proj(x)))

    model, x = prepared(Twice(), formulation="folded"), torch.randn(4, 16)
    assert after(model, x).count("poetx.fold_weight") == 1
    assert_equals_eager(model, x)


def test_merges_leave_the_compiled_graph_right() -> None:
    model = prepared(SwiGLU(), formulation="folded", merge_rotation="plain")
    compiled = torch.compile(model, backend=poetx.poetx_backend, options={"stage": "aot_eager"})
    x = torch.randn(4, 16)
    before = compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        merge(model)
        assert_close(compiled(x), before, torch.bfloat16)
        assert_close(compiled(x), model(x))


def test_each_side_takes_the_cheaper_form() -> None:
    model = narrow(nn.Linear(64, 64))
    # Only launches cost anything: a fold is one, a rotation is two.
    free = {"flops": 1e30, "bytes": 1e30}
    text = detail(model, 8, **free)
    assert "folded in" in text
    assert "folded out" in text
    # Only bytes cost anything: T·64 twice against 64·64 once.
    text = detail(model, 16, bytes=1e3, launch=1e-12)
    assert text == "input_centric: rotated in (fold where T > 31), rotated out (fold where T > 31)"
    text = detail(model, 4096, bytes=1e3, launch=1e-12)
    assert text == "folded in (fold where T > 31), folded out (fold where T > 31)"
    assert "folded" in detail(model, 32, bytes=1e3, launch=1e-12)
    assert "folded" not in detail(model, 31, bytes=1e3, launch=1e-12)


def test_folding_again_in_the_backward_costs_twice() -> None:
    model = prepared(nn.Linear(64, 64).bfloat16(), formulation="auto", variant="mem")
    text = detail(model, 4096, bytes=1e3, launch=1e-12)
    assert "T > 64" in text


def test_fp32_rotates() -> None:
    model = prepared(nn.Linear(64, 64), formulation="auto")
    explanation = explained(model, torch.randn(4096, 64), machine={"bytes": 1e3})
    assert explanation.rows[0].formulation == "input_centric"
    (refusal,) = explanation.graphs[0].record.refused("folded")
    assert "bf16 or fp16" in refusal.detail


@pytest.mark.parametrize("config", [{"neumann_order": 2}, {"cayley": "exact"}, {"block_size": 512}])
def test_auto_rotates_where_the_tangent_would_be_a_solve(config) -> None:
    model = prepared(nn.Linear(512, 512).bfloat16(), formulation="auto", **config)
    explanation = explained(model, torch.randn(64, 512).bfloat16())
    assert explanation.rows[0].formulation == "input_centric"
    (refusal,) = explanation.graphs[0].record.refused("folded")
    assert "order 3 and blocks up to 256" in refusal.detail


def test_without_the_angle_guard_auto_rotates_and_folded_raises() -> None:
    model = prepared(nn.Linear(64, 64).bfloat16(), formulation="auto", max_angle=None)
    assert detail(model, 4096) == "input_centric"
    with pytest.raises(ConfigError, match="max_angle"):
        poetx.POETXConfig(formulation="folded", max_angle=None)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="max_angle"):
        explained(model, torch.randn(3, 64).bfloat16(), formulation="folded")
    poetx.POETXConfig(formulation="folded", max_angle=None, cayley="exact")


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"bytes": 0}, "machine constant bytes"),
        ({"speed": 1}, "unknown rate"),
        (3, "a dict of rates"),
    ],
)
def test_bad_machines_are_named(machine, message) -> None:
    model = narrow(nn.Linear(64, 64))
    with pytest.raises(ConfigError, match=message):
        explained(model, torch.randn(3, 64).bfloat16(), machine=machine)


def test_nothing_but_inputs_and_outputs_is_kept() -> None:
    model = prepared(SwiGLU(), formulation="folded")
    x = torch.randn(2, 16)
    fast = [shape for _, shape in saved_activations(model, x, "fast")]
    mem = [shape for _, shape in saved_activations(model, x, "mem")]
    weights = {tuple(p.shape) for n, p in model.named_parameters() if n.endswith("original")}
    assert weights & set(fast)
    assert not weights & set(mem)
    assert not [shape for shape in (*fast, *mem) if shape[-2:] == (8, 8)]
