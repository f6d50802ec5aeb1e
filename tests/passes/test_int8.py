"""``base="int8"`` in graphs: golden ones, what is kept for the backward, gradients, refusals."""

from __future__ import annotations

import expecttest
import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.passes import Formulation, Gains
from tests.helpers.graph_of import assert_equals_eager, prepared, run_passes
from tests.helpers.held import saved_activations
from tests.helpers.models import MLP, OddZoo, Siblings, SwiGLU

FORMS = ("input_centric", "folded")


class TestGolden(expecttest.TestCase):
    def test_products_read_a_dequantised_weight(self):
        x = torch.randn(3, 12)
        model = prepared(nn.Linear(12, 20), base="int8", gains="rows")
        graph, _ = run_passes([Gains(), Formulation()], model, x)
        self.assertExpectedInline(
            graph,
            """\
original: i8[20, 12]
skew_in: f32[1, 28]
skew_out: f32[2, 28]
gain_out: f32[20]
perm_in: i64[2, 6]
perm_out: i64[2, 10]
scale: f32[20, 1]
bias: f32[20]
input: f32[3, 12]
%1: f32[1, 8, 8] = poetx.cayley_neumann(skew_in, 8, 3)
%2: f32[2, 8, 8] = poetx.cayley_neumann(skew_out, 8, 3)
%3: f32[20, 12] = poetx.dequantize(original, scale, torch.float32)
%4: f32[3, 12] = poetx.rotate_blocks(input, %1, perm_in, None, False)
%5: f32[3, 20] = linear(%4, %3, None)
%6: f32[3, 20] = poetx.rotate_blocks(%5, %2, None, perm_out, False)
%7: f32[3, 20] = mul(%6, gain_out)
%8: f32[3, 20] = .type_as(%7, %6)
%9: f32[20] = .type_as(bias, %8)
%10: f32[3, 20] = add(%8, %9)
return (%10)
""",
        )

    def test_the_fold_reads_int8(self):
        x = torch.randn(3, 12, dtype=torch.bfloat16)
        model = prepared(nn.Linear(12, 20, bias=False).bfloat16(), base="int8")
        graph, _ = run_passes([Formulation("folded")], model, x)
        self.assertExpectedInline(
            graph,
            """\
original: i8[20, 12]
skew_in: f32[1, 28]
skew_out: f32[2, 28]
perm_in: i64[2, 6]
perm_out: i64[2, 10]
scale: bf16[20, 1]
input: bf16[3, 12]
%1: f32[1, 28] = .detach(skew_in)
%2: bf16[1, 8, 8] = poetx.rotation_delta(%1, 8, 3, torch.bfloat16, 0)
%3: f32[1, 8, 8] = poetx.rotation_tangent(skew_in, 8, 3, True, 0)
%4: f32[2, 28] = .detach(skew_out)
%5: bf16[2, 8, 8] = poetx.rotation_delta(%4, 8, 3, torch.bfloat16, 2)
%6: f32[2, 8, 8] = poetx.rotation_tangent(skew_out, 8, 3, True, 2)
%7: bf16[20, 12] = poetx.dequantize(original, scale, torch.bfloat16)
%8: bf16[20, 12] = poetx.fold_weight(%7, %2, %5, perm_in, perm_out, torch.bfloat16)
%9: bf16[3, 20] = poetx.folded_linear(input, %8, %3, %6, perm_in, perm_out)
return (%9)
""",
        )


@pytest.mark.parametrize("variant", ["fast", "mem"])
@pytest.mark.parametrize("formulation", FORMS)
def test_no_dense_weight_is_kept_for_the_backward(formulation: str, variant: str) -> None:
    model = prepared(SwiGLU(16, 40), base="int8", formulation=formulation)
    saved = saved_activations(model, torch.randn(2, 16), variant)
    shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)}
    assert saved
    assert not shapes & {shape for _, shape in saved}


@pytest.mark.parametrize("formulation", FORMS)
@pytest.mark.parametrize(
    ("build", "width", "fields"),
    [
        (MLP, 12, {"variant": "mem", "gains": "both", "permutation": "random"}),
        (OddZoo, 7, {"block_size": (4, 3)}),
        (Siblings, 48, {"permutation": "chunked", "block_size": 16}),
    ],
)
def test_compiled_code_has_the_gradients_of_eager(build, width, fields, formulation) -> None:
    model = prepared(build(), base="int8", formulation=formulation, **fields)
    assert_equals_eager(model, torch.randn(5, width))


def test_under_autocast_the_weight_comes_in_its_dtype() -> None:
    model = prepared(nn.Linear(12, 20), base="int8")

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    graph, _ = run_passes([Formulation()], run, torch.randn(3, 12))
    assert "bf16[20, 12] = poetx.dequantize(original, scale, torch.bfloat16)" in graph


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (
            lambda: prepared(MLP(), base="int8"),
            {"keep_folded": "step"},
            "ConfigError",
            "keeps every folded weight between calls, a dense copy",
        ),
        (MLP, {"base": "int8"}, "AdoptionError", "base='int8' changes the weights"),
    ],
)
def test_dense_copies_and_changes_while_compiling_are_refused(
    build, options, error, message: str
) -> None:
    compiled = torch.compile(
        build(), backend=poetx.poetx_backend, options={"stage": "eager", **options}
    )
    with pytest.raises(Exception, match=f"{error}.*{message}"):
        compiled(torch.randn(3, 12))
