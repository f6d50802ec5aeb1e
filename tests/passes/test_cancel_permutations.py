"""`cancel_permutations`: what is gone, what stays and why, and that the function is the same."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import poetx_compile as poetx
from llama import Llama, LlamaConfig
from poetx_compile.compile.options import BackendOptions
from poetx_compile.compile.rewrite import DryRun, rewrite
from poetx_compile.inspect.render import render
from poetx_compile.layers.permutation import draw_permutation
from poetx_compile.layers.prepare import config_of
from poetx_compile.optim.merge import merge
from poetx_compile.passes import (
    CancelPermutations,
    Formulation,
    Record,
    SharePermutations,
    graphs,
    metadata,
    run,
)
from tests.helpers.graph_of import (
    after,
    assert_equals_eager,
    explained,
    given_to_a_backend,
    prepared,
    run_passes,
)
from tests.helpers.models import MLP, Block, SwiGLU, TinyLM
from tests.helpers.tolerances import assert_close

GATED = ("gate_proj.out", "up_proj.out", "down_proj.in")
RESIDUAL = (
    "layers.*.*.[qkv]_proj.in",
    "layers.*.*.o_proj.out",
    "layers.*.mlp.gate_proj.in",
    "layers.*.mlp.up_proj.in",
    "layers.*.mlp.down_proj.out",
)
HIDDEN = ("up.out", "down.in")
CANCEL = "cancel_permutations"


def sharing(model: nn.Module, *shared: tuple[str, ...], block_size=8, **config: Any) -> nn.Module:
    """`model` prepared with declared groups, rotated away from the identity."""
    config = {"formulation": "input_centric", **config}
    poetx.prepare(model, poetx.POETXConfig(block_size=block_size, **config), shared=shared)
    return prepared(model, block_size, **config)


def rewritten(model: nn.Module, *inputs: Any) -> str:
    """The graph after the pass and those it needs, formulated as `model` was prepared."""
    formulation = Formulation(config_of(model).formulation)
    return run_passes([formulation, SharePermutations(), CancelPermutations()], model, *inputs)[0]


def permutations(graph: str) -> str:
    """The lines of a printed graph that permute something."""
    kept = [
        line.strip()
        for line in graph.splitlines()
        if "permute_columns" in line or ("rotate_blocks" in line and "None, None" not in line)
    ]
    return "\n".join(kept) + "\n"


def counts(model: nn.Module, *inputs: Any) -> tuple[int, int]:
    """Numbers of permutations of activations without and with the pass."""

    is_vector = re.compile(r": \w+\[\d+\] = ")
    traced = given_to_a_backend(model, *inputs)  # once for both, which check no metadata

    def count(*disabled: str) -> int:
        options = BackendOptions.parse(None, {"disable_passes": disabled})
        graph = rewrite(*traced, options, dry_run=DryRun()).graph
        lines = permutations(render(graph)).splitlines()
        return sum("rotate_blocks" in line or not is_vector.search(line) for line in lines)

    return count(CANCEL), count()


def details(model: nn.Module, *inputs: Any) -> list[str]:
    """What the pass says it did, and the reasons of its refusals."""
    record = explained(model, *inputs).graphs[0].record
    return [e.detail for e in record.events if e.pass_name == CANCEL]


class TestGolden(expecttest.TestCase):
    def test_no_activation_is_permuted_inside_an_mlp(self):
        model = sharing(SwiGLU(), GATED, permutation="random")
        graph = rewritten(model, torch.randn(3, 16))
        self.assertExpectedInline(
            graph,
            """\
gate_proj.original: f32[40, 16]
gate_proj.skew_in: f32[2, 28]
gate_proj.skew_out: f32[5, 28]
gate_proj.perm_in: i64[2, 16]
x: f32[3, 16]
up_proj.original: f32[40, 16]
up_proj.skew_in: f32[2, 28]
up_proj.skew_out: f32[5, 28]
down_proj.original: f32[16, 40]
down_proj.skew_in: f32[5, 28]
down_proj.skew_out: f32[2, 28]
down_proj.perm_out: i64[2, 16]
%1: f32[2, 8, 8] = poetx.cayley_neumann(gate_proj.skew_in, 8, 3)
%2: f32[5, 8, 8] = poetx.cayley_neumann(gate_proj.skew_out, 8, 3)
%3: f32[3, 16] = poetx.permute_columns(x, gate_proj.perm_in)
%4: f32[3, 16] = poetx.rotate_blocks(%3, %1, None, None, False)
%5: f32[3, 40] = linear(%4, gate_proj.original, None)
%6: f32[3, 40] = poetx.rotate_blocks(%5, %2, None, None, False)
%7: f32[3, 40] = silu(%6)
%8: f32[2, 8, 8] = poetx.cayley_neumann(up_proj.skew_in, 8, 3)
%9: f32[5, 8, 8] = poetx.cayley_neumann(up_proj.skew_out, 8, 3)
%10: f32[3, 16] = poetx.rotate_blocks(%3, %8, None, None, False)
%11: f32[3, 40] = linear(%10, up_proj.original, None)
%12: f32[3, 40] = poetx.rotate_blocks(%11, %9, None, None, False)
%13: f32[3, 40] = mul(%7, %12)
%14: f32[5, 8, 8] = poetx.cayley_neumann(down_proj.skew_in, 8, 3)
%15: f32[2, 8, 8] = poetx.cayley_neumann(down_proj.skew_out, 8, 3)
%16: f32[3, 40] = poetx.rotate_blocks(%13, %14, None, None, False)
%17: f32[3, 16] = linear(%16, down_proj.original, None)
%18: f32[3, 16] = poetx.rotate_blocks(%17, %15, None, down_proj.perm_out, False)
return (%18)
""",
        )

    def test_folded_weights_stay_in_permuted_coordinates(self):
        model = sharing(SwiGLU(), GATED, formulation="folded")
        graph = rewritten(model, torch.randn(3, 16))
        folded = [line.strip() for line in graph.splitlines() if "fold" in line]
        self.assertExpectedInline(
            "\n".join(folded) + "\n",
            """\
%7: f32[40, 16] = poetx.fold_weight(gate_proj.original, %2, %5, gate_proj.perm_in, None, torch.float32)
%8: f32[3, 40] = poetx.folded_linear(x, %7, %3, %6, gate_proj.perm_in, None)
%16: f32[40, 16] = poetx.fold_weight(up_proj.original, %11, %14, gate_proj.perm_in, None, torch.float32)
%17: f32[3, 40] = poetx.folded_linear(x, %16, %12, %15, gate_proj.perm_in, None)
%25: f32[16, 40] = poetx.fold_weight(down_proj.original, %20, %23, None, down_proj.perm_out, torch.float32)
%26: f32[3, 16] = poetx.folded_linear(%18, %25, %21, %24, None, down_proj.perm_out)
""",
        )

    def test_a_stack_permutes_its_embedding_and_its_head(self):
        model = sharing(TinyLM(), GATED, RESIDUAL)
        graph = rewritten(model, torch.randint(24, (2, 5)))
        self.assertExpectedInline(
            permutations(graph),
            """\
%1: f32[16] = poetx.permute_columns(layers.0.attention_norm.weight, layers.0.attention.q_proj.perm_in)
%2: f32[16] = poetx.permute_columns(layers.0.mlp_norm.weight, layers.0.attention.q_proj.perm_in)
%3: f32[16] = poetx.permute_columns(layers.1.attention_norm.weight, layers.0.attention.q_proj.perm_in)
%4: f32[16] = poetx.permute_columns(layers.1.mlp_norm.weight, layers.0.attention.q_proj.perm_in)
%6: f32[2, 5, 16] = poetx.permute_columns(%5, layers.0.attention.q_proj.perm_in)
%12: f32[2, 5, 16] = poetx.rotate_blocks(%11, %9, None, layers.0.attention.q_proj.perm_out, False)
%20: f32[2, 5, 8] = poetx.rotate_blocks(%19, %17, None, layers.0.attention.k_proj.perm_out, False)
%28: f32[2, 5, 8] = poetx.rotate_blocks(%27, %25, None, layers.0.attention.v_proj.perm_out, False)
%37: f32[2, 5, 16] = poetx.rotate_blocks(%34, %35, layers.0.attention.o_proj.perm_in, None, False)
%65: f32[2, 5, 16] = poetx.rotate_blocks(%64, %62, None, layers.1.attention.q_proj.perm_out, False)
%73: f32[2, 5, 8] = poetx.rotate_blocks(%72, %70, None, layers.1.attention.k_proj.perm_out, False)
%81: f32[2, 5, 8] = poetx.rotate_blocks(%80, %78, None, layers.1.attention.v_proj.perm_out, False)
%90: f32[2, 5, 16] = poetx.rotate_blocks(%87, %88, layers.1.attention.o_proj.perm_in, None, False)
%113: f32[2, 5, 16] = poetx.permute_columns(%112, layers.0.attention.q_proj.perm_in, True)
""",
        )

    def test_a_stack_without_sharing(self):
        model = sharing(TinyLM())
        graph = rewritten(model, torch.randint(24, (2, 5)))
        self.assertExpectedInline(
            permutations(graph),
            """\
%5: f32[2, 5, 16] = poetx.permute_columns(%2, layers.0.attention.q_proj.perm_in)
%8: f32[2, 5, 16] = poetx.rotate_blocks(%7, %4, None, layers.0.attention.q_proj.perm_out, False)
%16: f32[2, 5, 8] = poetx.rotate_blocks(%15, %13, None, layers.0.attention.k_proj.perm_out, False)
%24: f32[2, 5, 8] = poetx.rotate_blocks(%23, %21, None, layers.0.attention.v_proj.perm_out, False)
%33: f32[2, 5, 16] = poetx.rotate_blocks(%30, %31, layers.0.attention.q_proj.perm_in, None, False)
%35: f32[2, 5, 16] = poetx.rotate_blocks(%34, %32, None, layers.0.attention.o_proj.perm_out, False)
%40: f32[2, 5, 16] = poetx.permute_columns(%37, layers.0.mlp.gate_proj.perm_in)
%43: f32[2, 5, 40] = poetx.rotate_blocks(%42, %39, None, layers.0.mlp.gate_proj.perm_out, False)
%49: f32[2, 5, 40] = poetx.rotate_blocks(%48, %46, None, layers.0.mlp.up_proj.perm_out, False)
%53: f32[2, 5, 40] = poetx.rotate_blocks(%50, %51, layers.0.mlp.down_proj.perm_in, None, False)
%55: f32[2, 5, 16] = poetx.rotate_blocks(%54, %52, None, layers.0.mlp.down_proj.perm_out, False)
%60: f32[2, 5, 16] = poetx.permute_columns(%57, layers.1.attention.q_proj.perm_in)
%63: f32[2, 5, 16] = poetx.rotate_blocks(%62, %59, None, layers.1.attention.q_proj.perm_out, False)
%71: f32[2, 5, 8] = poetx.rotate_blocks(%70, %68, None, layers.1.attention.k_proj.perm_out, False)
%79: f32[2, 5, 8] = poetx.rotate_blocks(%78, %76, None, layers.1.attention.v_proj.perm_out, False)
%88: f32[2, 5, 16] = poetx.rotate_blocks(%85, %86, layers.1.attention.q_proj.perm_in, None, False)
%90: f32[2, 5, 16] = poetx.rotate_blocks(%89, %87, None, layers.1.attention.o_proj.perm_out, False)
%95: f32[2, 5, 16] = poetx.permute_columns(%92, layers.1.mlp.gate_proj.perm_in)
%98: f32[2, 5, 40] = poetx.rotate_blocks(%97, %94, None, layers.1.mlp.gate_proj.perm_out, False)
%104: f32[2, 5, 40] = poetx.rotate_blocks(%103, %101, None, layers.1.mlp.up_proj.perm_out, False)
%108: f32[2, 5, 40] = poetx.rotate_blocks(%105, %106, layers.1.mlp.down_proj.perm_in, None, False)
%110: f32[2, 5, 16] = poetx.rotate_blocks(%109, %107, None, layers.1.mlp.down_proj.perm_out, False)
""",
        )

    def test_biases_and_norms_have_their_vectors_gathered(self):
        groups = [("*.up.in", "*.down.out"), ("up.out", "down.in")]
        model = sharing(Residual(), *groups, permutation="random")
        graph = rewritten(model, torch.randn(3, 12))
        self.assertExpectedInline(
            graph,
            """\
norms.0.weight: f32[12]
norms.0.bias: f32[12]
x: f32[3, 12]
mlps.0.up.original: f32[22, 12]
mlps.0.up.skew_in: f32[1, 28]
mlps.0.up.skew_out: f32[2, 28]
mlps.0.up.perm_in: i64[2, 12]
mlps.0.up.perm_out: i64[2, 22]
mlps.0.up.bias: f32[22]
mlps.0.down.original: f32[12, 22]
mlps.0.down.skew_in: f32[2, 28]
mlps.0.down.skew_out: f32[1, 28]
mlps.0.down.bias: f32[12]
norms.1.weight: f32[12]
norms.1.bias: f32[12]
mlps.1.up.original: f32[22, 12]
mlps.1.up.skew_in: f32[1, 28]
mlps.1.up.skew_out: f32[2, 28]
mlps.1.up.perm_out: i64[2, 22]
mlps.1.up.bias: f32[22]
mlps.1.down.original: f32[12, 22]
mlps.1.down.skew_in: f32[2, 28]
mlps.1.down.skew_out: f32[1, 28]
mlps.1.down.bias: f32[12]
%1: f32[12] = poetx.permute_columns(norms.0.weight, mlps.0.up.perm_in)
%2: f32[12] = poetx.permute_columns(norms.0.bias, mlps.0.up.perm_in)
%3: f32[3, 12] = poetx.permute_columns(x, mlps.0.up.perm_in)
%4: f32[12] = poetx.permute_columns(norms.1.weight, mlps.0.up.perm_in)
%5: f32[12] = poetx.permute_columns(norms.1.bias, mlps.0.up.perm_in)
%6: f32[3, 12] = layer_norm(%3, (12), %1, %2, 1e-05)
%7: f32[1, 8, 8] = poetx.cayley_neumann(mlps.0.up.skew_in, 8, 3)
%8: f32[2, 8, 8] = poetx.cayley_neumann(mlps.0.up.skew_out, 8, 3)
%9: f32[3, 12] = poetx.rotate_blocks(%6, %7, None, None, False)
%10: f32[3, 22] = linear(%9, mlps.0.up.original, None)
%11: f32[3, 22] = poetx.rotate_blocks(%10, %8, None, None, False)
%12: f32[22] = .type_as(mlps.0.up.bias, %11)
%13: f32[22] = poetx.permute_columns(%12, mlps.0.up.perm_out)
%14: f32[3, 22] = add(%11, %13)
%15: f32[3, 22] = gelu(%14)
%16: f32[2, 8, 8] = poetx.cayley_neumann(mlps.0.down.skew_in, 8, 3)
%17: f32[1, 8, 8] = poetx.cayley_neumann(mlps.0.down.skew_out, 8, 3)
%18: f32[3, 22] = poetx.rotate_blocks(%15, %16, None, None, False)
%19: f32[3, 12] = linear(%18, mlps.0.down.original, None)
%20: f32[3, 12] = poetx.rotate_blocks(%19, %17, None, None, False)
%21: f32[12] = .type_as(mlps.0.down.bias, %20)
%22: f32[12] = poetx.permute_columns(%21, mlps.0.up.perm_in)
%23: f32[3, 12] = add(%20, %22)
%24: f32[3, 12] = add(%3, %23)
%25: f32[3, 12] = layer_norm(%24, (12), %4, %5, 1e-05)
%26: f32[1, 8, 8] = poetx.cayley_neumann(mlps.1.up.skew_in, 8, 3)
%27: f32[2, 8, 8] = poetx.cayley_neumann(mlps.1.up.skew_out, 8, 3)
%28: f32[3, 12] = poetx.rotate_blocks(%25, %26, None, None, False)
%29: f32[3, 22] = linear(%28, mlps.1.up.original, None)
%30: f32[3, 22] = poetx.rotate_blocks(%29, %27, None, None, False)
%31: f32[22] = .type_as(mlps.1.up.bias, %30)
%32: f32[22] = poetx.permute_columns(%31, mlps.1.up.perm_out)
%33: f32[3, 22] = add(%30, %32)
%34: f32[3, 22] = gelu(%33)
%35: f32[2, 8, 8] = poetx.cayley_neumann(mlps.1.down.skew_in, 8, 3)
%36: f32[1, 8, 8] = poetx.cayley_neumann(mlps.1.down.skew_out, 8, 3)
%37: f32[3, 22] = poetx.rotate_blocks(%34, %35, None, None, False)
%38: f32[3, 12] = linear(%37, mlps.1.down.original, None)
%39: f32[3, 12] = poetx.rotate_blocks(%38, %36, None, None, False)
%40: f32[12] = .type_as(mlps.1.down.bias, %39)
%41: f32[12] = poetx.permute_columns(%40, mlps.0.up.perm_in)
%42: f32[3, 12] = add(%39, %41)
%43: f32[3, 12] = add(%24, %42)
%44: f32[3, 12] = poetx.permute_columns(%43, mlps.0.up.perm_in, True)
return (%44)
""",
        )


class Residual(nn.Module):
    """Two MLPs with biases behind LayerNorms, on a residual stream."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.mlps = nn.ModuleList(MLP(width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return x


RESIDUAL_MLP = (("*.up.in", "*.down.out"), HIDDEN)


class WrittenOutNorm(nn.Module):
    """RMSNorm in fp32, as many models write it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def stack(norm: Callable[[int], nn.Module]) -> TinyLM:
    model = TinyLM(layers=1)
    for block in model.layers:
        block.attention_norm, block.mlp_norm = norm(16), norm(16)
    model.norm = norm(16)
    return model


def with_random_vectors(model: nn.Module) -> nn.Module:
    """A permuted weight of ones would look right in any order."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm | nn.LayerNorm):
            for parameter in module.parameters():
                nn.init.normal_(parameter)
    return model


def llama(layers: int = 1, **kwargs: Any) -> Llama:
    return Llama(LlamaConfig(32, 48, layers, 4, 2, vocab_size=24, max_seq_len=8), **kwargs)


# The same function


@pytest.mark.parametrize(
    ("make", "shared", "permutation", "shape", "before", "now"),
    [
        (SwiGLU, [GATED], "random", (3, 16), 5, 2),
        # That of the input looks like one of a vector.
        (SwiGLU, [GATED], "chunked", (16,), 4, 1),
        (MLP, [HIDDEN], "random", (2, 5, 12), 4, 2),
        (Residual, RESIDUAL_MLP, "chunked", (2, 5, 12), 8, 2),
        (lambda: Residual(32), RESIDUAL_MLP, "random", (3, 32), 8, 2),
        (TinyLM, [GATED, RESIDUAL], "chunked", None, 22, 10),
        (lambda: stack(WrittenOutNorm), [GATED, RESIDUAL], "random", None, 11, 6),
        (lambda: stack(nn.LayerNorm), [GATED, RESIDUAL], "chunked", None, 11, 6),
        (llama, [GATED, RESIDUAL], "random", None, 11, 6),
    ],
)
def test_fewer_permutations_give_the_outputs_and_gradients_of_eager(
    make, shared, permutation, shape, before, now
) -> None:
    model = with_random_vectors(make().double())
    x = torch.randint(24, (2, 5)) if shape is None else torch.randn(shape).double()
    model = sharing(model, *shared, permutation=permutation)
    assert counts(model, x) == (before, now)
    assert_equals_eager(model, x, stage="eager")  # and through AOTAutograd after a merge
    model.zero_grad()
    merge(model, redraw=True)
    prepared(model, permutation=permutation)
    assert_equals_eager(model, x)


@pytest.mark.parametrize(
    ("make", "shared", "permutation"),
    [
        (SwiGLU, (GATED,), "random"),
        (SwiGLU, (GATED,), "chunked"),
        (lambda: TinyLM(layers=1), (GATED, RESIDUAL), "random"),
    ],
)
def test_folded_layers_equal_eager(make, shared, permutation) -> None:
    config = {"permutation": permutation, "formulation": "folded"}
    model = sharing(make().double(), *shared, **config)
    is_lm = isinstance(model, TinyLM)
    x = torch.randint(24, (2, 5)) if is_lm else torch.randn(2, 5, 16).double()
    text = after(model, x)
    assert text.count("permute_columns") == (2 if is_lm else 0) + text.count("[16] = poetx.permute")
    assert_equals_eager(model, x, stage="eager")  # and through AOTAutograd after a merge
    model.zero_grad()
    merge(model, redraw=True)
    prepared(model, **config)
    assert_equals_eager(model, x)


def test_a_folded_weight_that_two_calls_read_keeps_its_permutations() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(torch.tanh(self.proj(x)))

    model, x = sharing(Twice(), ("proj.in", "proj.out"), formulation="folded"), torch.randn(3, 16)
    assert "None" not in next(line for line in after(model, x).splitlines() if "fold_w" in line)
    assert_equals_eager(model, x)


def test_elementwise_nodes_keep_every_bit() -> None:
    # Whole vectors of any processor: what is left over would be other instructions' work.
    model, x = sharing(SwiGLU(), GATED), torch.randn(32, 16)
    results = [
        torch.compile(
            model,
            backend=poetx.poetx_backend,
            options={"stage": "eager", "disable_passes": disabled},
        )(x)
        for disabled in ((), (CANCEL,))
    ]
    assert torch.equal(*results)


def test_dynamic_shapes() -> None:
    model = sharing(with_random_vectors(TinyLM(layers=1).double()), GATED, RESIDUAL)
    compiled = torch.compile(
        model,
        backend=poetx.poetx_backend,
        fullgraph=True,
        dynamic=True,
        options={"stage": "aot_eager", "verify_passes": True},
    )
    for shape in ((2, 5), (3, 7)):
        tokens = torch.randint(24, shape)
        with torch._dynamo.config.patch(error_on_recompile=shape[0] == 3):
            actual = compiled(tokens)
        assert_close(actual, model(tokens))


def test_autocast() -> None:
    model, x = (
        sharing(with_random_vectors(Block()), GATED, *_block_residual()),
        torch.randn(2, 5, 16),
    )
    with torch.autocast("cpu", torch.bfloat16):
        _, remaining = counts(model, x)
        compiled = torch.compile(
            model,
            backend=poetx.poetx_backend,
            options={"stage": "aot_eager", "verify_passes": True},
        )(x)
        expected = model(x)
    assert remaining == 6
    assert_close(compiled, expected, torch.bfloat16)


def _block_residual() -> list[tuple[str, ...]]:
    return [tuple(p.removeprefix("layers.*.") for p in RESIDUAL)]


def test_what_is_recomputed() -> None:
    model = sharing(with_random_vectors(Residual().double()), *RESIDUAL_MLP, variant="mem")
    assert_equals_eager(model, torch.randn(3, 12).double())


# How much is gone


@pytest.mark.parametrize(("shared", "now"), [([], 11), ([GATED], 8)])
def test_what_is_not_shared_stays(shared, now) -> None:
    assert counts(sharing(TinyLM(layers=1), *shared), torch.randint(24, (2, 5))) == (11, now)


def test_within_activation_checkpoints() -> None:
    model = sharing(llama(2, activation_checkpointing=True).double(), GATED, RESIDUAL)
    tokens = torch.randint(24, (2, 5))
    # Each body has 4 left inside attention, and takes and gives natural coordinates: 2 more.
    assert counts(model, tokens) == (22, 12)
    assert_equals_eager(model, tokens)


# Refusals


def test_different_groups_are_refused_with_a_reason() -> None:
    model, x = sharing(SwiGLU()), torch.randn(3, 16)
    (event,) = explained(model, x).graphs[0].record.refused(CANCEL)
    assert "different groups" in event.detail
    assert "shared" in event.detail
    assert {layer.name for layer in event.layers} == {"gate_proj", "up_proj", "down_proj"}


class Pair(nn.Module):
    """Two linears with something between them: their hidden sides are a group."""

    def __init__(self, between: Callable[[Tensor], Tensor]):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


def _written_after_reading(y: Tensor) -> Tensor:
    z = 2 * y
    y.add_(1.0)
    return z * y


def _written_through_a_view(y: Tensor) -> Tensor:
    y.view(-1, 4, 4)[..., 0].mul_(2.0)
    return F.silu(y)


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y,
        F.gelu,
        lambda y: F.leaky_relu(y, 0.1),
        lambda y: F.silu(y) * y + 2 * y - y / 3,
        lambda y: y.float().to(y.dtype).type_as(y),
        lambda y: F.layer_norm(y, (16,)),
        lambda y: F.rms_norm(y, (16,)),
        lambda y: (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 0.1).sqrt(),
        lambda y: y / (1 + y.abs().amax(dim=(1, -1), keepdim=True)),
        lambda y: F.dropout(y, 0.5, False),
        lambda y: torch.add(y, y.detach(), alpha=0.5),
        lambda y: y.clone() * y.shape[0],
        lambda y: torch.clamp(y, min=-0.5) + y.new_ones(1),
    ],
)
def test_what_a_permutation_goes_through(between) -> None:
    model, x = sharing(Pair(between).double(), HIDDEN), torch.randn(2, 3, 12).double()
    assert details(model, x) == ["2 permutation(s) removed, 0 added"]
    assert_equals_eager(model, x, stage="eager")
    model.zero_grad()
    assert_equals_eager(model, x, dynamic=True, stage="eager")


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y.unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2),
        lambda y: y.flip(-1),
        lambda y: y.cumsum(-1),
        lambda y: torch.cat([y[..., 8:], y[..., :8]], dim=-1),
        lambda y: y.softmax(-2).roll(1, -1),
        lambda y: F.layer_norm(y, y.shape[-2:]),
        lambda y: F.leaky_relu(y, 0.1, True),
        lambda y: F.relu(y, inplace=True),
        lambda y: y.add_(1.0) * y,
        _written_after_reading,
        _written_through_a_view,
    ],
)
def test_what_stops_a_permutation(between) -> None:
    model, x = sharing(Pair(between).double(), HIDDEN), torch.randn(2, 3, 12).double()
    (detail,) = details(model, x)
    assert "share a permutation but do not meet" in detail
    assert_equals_eager(model, x, stage="eager")


def test_dropout_keeps_its_mask() -> None:
    model, x = sharing(Pair(lambda y: F.dropout(y, 0.5, True)), HIDDEN), torch.randn(3, 12)
    options = {"stage": "eager"}
    compiled = torch.compile(model, backend=poetx.poetx_backend, options=options)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert_close(compiled(x), expected)


class Fork(nn.Module):
    """The hidden values leave the layer as well."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.up(x))
        return torch.cat([self.down(y), y], dim=-1)


def test_what_leaves_the_region_is_put_back() -> None:
    model, x = sharing(Fork().double(), HIDDEN), torch.randn(3, 12).double()
    assert details(model, x) == ["2 permutation(s) removed, 1 added"]
    assert_equals_eager(model, x)


class Skip(nn.Module):
    """What is added comes from outside, and the sum goes there."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16, bias=False), nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.up(x)
        return torch.cat([self.down(y), y], dim=-1)


def test_as_many_added_as_removed_is_refused() -> None:
    model, x = sharing(Skip(), HIDDEN), torch.randn(3, 16)
    assert details(model, x) == ["as many permutations would be added as removed"]


class TwoSums(nn.Module):
    """A sum of two layers: their outputs are a group."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x) + self.b(x)).flip(-1)


def test_two_scatters_become_one() -> None:
    model, x = sharing(TwoSums().double(), ("a.out", "b.out")), torch.randn(3, 12).double()
    assert details(model, x) == ["2 permutation(s) removed, 1 added"]
    assert_equals_eager(model, x)


# Composition


class ForthAndBack(nn.Module):
    """Permutations of one's own, one after the other."""

    def __init__(self, *inverse: bool):
        super().__init__()
        self.inverse = inverse
        pair = draw_permutation(16, seed=0, draw=1, group=0, kind="random")
        self.register_buffer("pair", pair)
        self.layer = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for inverse in self.inverse:
            x = torch.tanh(torch.ops.poetx.permute_columns(x, self.pair, inverse))
        return x


@pytest.mark.parametrize(
    ("inverse", "left"),
    [
        ((False, True), 0),
        ((True, False), 0),
        ((False, True, False), 1),
        ((False, False), 2),
    ],
)
def test_forth_and_back_cancels(inverse, left) -> None:
    model = prepared(ForthAndBack(*inverse).double())
    x = torch.randn(3, 16).double()
    assert after(model, x).count("permute_columns") == left
    assert_equals_eager(model, x)


# Any graph


KINDS = ("scatter", "gather", "both", "permute", "add", "mul", "norm", "unary", "flip", "vector")


def random_graph(choose: random.Random) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph of permutations, rotations and other nodes over [2, 3, 6], and its inputs."""
    graph, generator = fx.Graph(), torch.Generator().manual_seed(choose.randrange(2**31))
    inputs: list[Tensor] = []

    def placeholder(value: Tensor) -> fx.Node:
        node = graph.placeholder(f"input_{len(inputs)}")
        node.meta[graphs.VALUE] = value
        inputs.append(value)
        return node

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    pairs = [
        placeholder(draw_permutation(6, seed=0, draw=1, group=group, kind="random"))
        for group in range(choose.choice([1, 1, 2]))
    ]
    rotation, weight = placeholder(randn(2, 3, 3)), placeholder(randn(6))
    values = [placeholder(randn(2, 3, 6)), placeholder(randn(2, 3, 6))]
    ops = torch.ops.poetx

    def pick() -> fx.Node:
        return choose.choice(values[-4:])

    for _ in range(choose.randrange(6, 20)):
        pair = choose.choice(pairs)
        kind = choose.choice(KINDS)
        if kind in ("scatter", "gather", "both"):
            ends = (pair if kind != "scatter" else None, pair if kind != "gather" else None)
            node = graph.call_function(ops.rotate_blocks.default, (pick(), rotation, *ends, False))
        elif kind == "permute":
            node = graph.call_function(
                ops.permute_columns.default, (pick(), pair, choose.choice([False, True]))
            )
        elif kind in ("add", "mul"):
            node = graph.call_function(getattr(torch, kind), (pick(), pick()))
        elif kind == "norm":
            node = graph.call_function(F.rms_norm, (pick(), (6,), choose.choice([None, weight])))
        elif kind == "unary":
            node = graph.call_function(torch.tanh, (pick(),))
        elif kind == "flip":
            node = graph.call_function(torch.flip, (pick(), (-1,)))
        else:
            node = graph.call_function(torch.sub, (pick(), weight))
        values.append(node)
    graph.output(tuple(choose.sample(values, 2) + values[-1:]))
    module = fx.GraphModule(nn.Module(), graph)
    metadata.refresh(module)
    return module, inputs


def cost(graph: fx.Graph) -> int:
    """Number of permutations of activations."""
    total = 0
    for node in graph.nodes:
        if graphs.is_op(node, torch.ops.poetx.rotate_blocks):
            total += sum(end is not None for end in node.args[2:4])
        elif graphs.is_op(node, torch.ops.poetx.permute_columns):
            total += node.meta[graphs.VALUE].dim() > 1
    return total


def test_random_graphs_compute_the_same_with_fewer_permutations() -> None:
    fewer = 0
    for seed in range(300):
        module, inputs = random_graph(random.Random(seed))
        module.graph.eliminate_dead_code()
        expected, before = module(*inputs), cost(module.graph)
        record = Record()
        run([CancelPermutations()], module, record, verify=True)
        module.graph.eliminate_dead_code()
        for mine, theirs in zip(module(*inputs), expected, strict=True):
            assert_close(mine, theirs, what=f"output of graph {seed}")
        now = cost(module.graph)
        assert now < before if record.applied(CANCEL) else now == before, seed
        fewer += now < before
    assert fewer > 100
