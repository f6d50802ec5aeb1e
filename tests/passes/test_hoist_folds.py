"""`hoist_folds`: what leaves the graph, what stays, and why."""

from __future__ import annotations

import re

import expecttest
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from poetx_compile import passes
from poetx_compile.compile import folds
from poetx_compile.compile.options import BackendOptions
from poetx_compile.compile.rewrite import rewrite
from poetx_compile.passes import graphs, hoist_folds
from poetx_compile.passes.hoist_folds import HoistFolds, Reads
from tests.helpers.graph_of import after, dynamo_graph, explained, prepared
from tests.helpers.models import SwiGLU


def refusals(model: nn.Module, *inputs: torch.Tensor, **options) -> list[str]:
    """Why folds of `model` stay in its graph."""
    explanation = explained(model, *inputs, keep_folded="step", **options)
    return [e.detail for g in explanation.graphs for e in g.record.refused("hoist_folds")]


class TestGolden(expecttest.TestCase):
    def test_swiglu(self):
        self.maxDiff = None
        model = prepared(SwiGLU(), formulation="folded")
        x = torch.randn(3, 16)
        assert after(model, x).count("poetx.fold_weight") == 3
        self.assertExpectedInline(
            after(model, x, keep_folded="step"),
            """\
gate_proj.skew_in: f32[2, 28]
gate_proj.skew_out: f32[5, 28]
gate_proj.perm_in: i64[2, 8]
gate_proj.perm_out: i64[2, 20]
x: f32[3, 16]
up_proj.skew_in: f32[2, 28]
up_proj.skew_out: f32[5, 28]
up_proj.perm_out: i64[2, 20]
down_proj.skew_in: f32[5, 28]
down_proj.skew_out: f32[2, 28]
down_proj.perm_in: i64[2, 20]
down_proj.perm_out: i64[2, 8]
gate_proj.original_folded: f32[40, 16]
up_proj.original_folded: f32[40, 16]
down_proj.original_folded: f32[16, 40]
%1: f32[21, 28] = cat([gate_proj.skew_in, up_proj.skew_in, down_proj.skew_in, down_proj.skew_out, gate_proj.skew_out, up_proj.skew_out]) [recompute]
%2: f32[21, 8, 8] = poetx.rotation_tangent(%1, 8, 3, False, 12) [recompute]
%3: (f32[2, 8, 8], f32[2, 8, 8], f32[5, 8, 8], f32[2, 8, 8], f32[5, 8, 8], f32[5, 8, 8]) = split(%2, [2, 2, 5, 2, 5, 5]) [recompute]
%4: f32[2, 8, 8] = getitem(%3, 0) [recompute]
%5: f32[2, 8, 8] = getitem(%3, 1) [recompute]
%6: f32[5, 8, 8] = getitem(%3, 2) [recompute]
%7: f32[2, 8, 8] = getitem(%3, 3) [recompute]
%8: f32[5, 8, 8] = getitem(%3, 4) [recompute]
%9: f32[5, 8, 8] = getitem(%3, 5) [recompute]
%10: f32[3, 40] = poetx.folded_linear(x, gate_proj.original_folded, %4, %8, gate_proj.perm_in, gate_proj.perm_out)
%11: f32[3, 40] = silu(%10)
%12: f32[3, 40] = poetx.folded_linear(x, up_proj.original_folded, %5, %9, gate_proj.perm_in, up_proj.perm_out)
%13: f32[3, 40] = mul(%11, %12)
%14: f32[3, 16] = poetx.folded_linear(%13, down_proj.original_folded, %6, %7, down_proj.perm_in, down_proj.perm_out)
return (%14)

kept between calls:
gate_proj.original: f32[40, 16]
gate_proj.skew_in: f32[2, 28]
gate_proj.skew_out: f32[5, 28]
gate_proj.perm_in: i64[2, 8]
gate_proj.perm_out: i64[2, 20]
up_proj.original: f32[40, 16]
up_proj.skew_in: f32[2, 28]
up_proj.skew_out: f32[5, 28]
up_proj.perm_out: i64[2, 20]
down_proj.original: f32[16, 40]
down_proj.skew_in: f32[5, 28]
down_proj.skew_out: f32[2, 28]
down_proj.perm_in: i64[2, 20]
down_proj.perm_out: i64[2, 8]
%1: f32[21, 28] = cat([gate_proj.skew_in, up_proj.skew_in, down_proj.skew_in, down_proj.skew_out, gate_proj.skew_out, up_proj.skew_out])
%2: f32[21, 28] = .detach(%1)
%3: f32[21, 8, 8] = poetx.rotation_delta(%2, 8, 3, torch.float32, 12)
%4: (f32[2, 8, 8], f32[2, 8, 8], f32[5, 8, 8], f32[2, 8, 8], f32[5, 8, 8], f32[5, 8, 8]) = split(%3, [2, 2, 5, 2, 5, 5])
%5: f32[2, 8, 8] = getitem(%4, 0)
%6: f32[2, 8, 8] = getitem(%4, 1)
%7: f32[5, 8, 8] = getitem(%4, 2)
%8: f32[2, 8, 8] = getitem(%4, 3)
%9: f32[5, 8, 8] = getitem(%4, 4)
%10: f32[5, 8, 8] = getitem(%4, 5)
%11: f32[40, 16] = poetx.fold_weight(gate_proj.original, %5, %9, gate_proj.perm_in, gate_proj.perm_out, torch.float32)
%12: f32[40, 16] = poetx.fold_weight(up_proj.original, %6, %10, gate_proj.perm_in, up_proj.perm_out, torch.float32)
%13: f32[16, 40] = poetx.fold_weight(down_proj.original, %7, %8, down_proj.perm_in, down_proj.perm_out, torch.float32)
return (%11, %12, %13)
""",
        )


def test_folds_in_checkpoints_stay():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = SwiGLU(), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(checkpoint(self.inner, x, use_reentrant=False))

    model = prepared(Checkpointed(), formulation="folded")
    text = explained(model, torch.randn(3, 16), keep_folded="step").text(verbose=True)
    assert "hoist_folds: 1 folded weight(s) kept between calls (head)" in text
    names = "inner.gate_proj, inner.up_proj, inner.down_proj"
    assert f"hoist_folds: refused: {hoist_folds.IN_CHECKPOINT} ({names})" in text


class ByHand(nn.Module):
    """One folded linear, of values that the graph itself computes or writes."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.register_buffer("stored", torch.randn(16, 8))
        self.register_buffer("skew", 0.1 * torch.randn(1, 28))

    def forward(self, x):
        stored, skew, ops = self.stored, self.skew, torch.ops.poetx
        if self.how == "computes":
            stored = 2 * stored
        if self.how == "writes":
            skew.mul_(2)
        delta = ops.rotation_delta(skew.detach(), 8, 3, torch.float32, 0)
        weight = ops.fold_weight(stored, delta, None, None, None, torch.float32)
        return ops.folded_linear(x, weight, None, None, None, None)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("computes", "the graph computes what is folded, by mul"),
        ("writes", "the graph writes to .*skew"),
        ("refused", "because"),
        ("kept", None),
    ],
)
def test_values_of_the_graph_stay(how, reason):
    seen: list[Reads] = []

    def refuse(reads: Reads) -> str | None:
        seen.append(reads)
        return "because" if how == "refused" else None

    graph = graphs.clone(dynamo_graph(ByHand(how), torch.randn(3, 8)))
    names = [n.name for n in graph.graph.find_nodes(op="placeholder")]
    record, hoist = passes.Record(), HoistFolds(refuse)
    passes.run([hoist], graph, record, verify=True)
    folds = [n for n in graph.graph.nodes if graphs.is_op(n, torch.ops.poetx.fold_weight)]
    if reason is None:
        (reads,) = seen
        assert [["skew" in names[i] for i in part] for part in reads] == [[True], [False]]
        assert hoist.module is not None
        assert not folds
        assert "rotation_delta" not in str(graph.graph)
    else:
        (refusal,) = record.refused("hoist_folds")
        assert re.match(reason, refusal.detail)
        assert hoist.module is None
        assert len(folds) == 1


def test_nothing_moves_where_it_is_not_asked_for_or_disabled():
    model, x = prepared(nn.Linear(16, 8), formulation="folded"), torch.randn(3, 16)
    assert "kept between calls" not in after(model, x)
    options = {"keep_folded": "step", "disable_passes": ["hoist_folds"]}
    assert after(model, x, **options) == after(model, x)


def test_cuda_graphs():
    model = prepared(nn.Linear(16, 16), formulation="folded")
    options = {"triton.cudagraphs": True}
    assert refusals(model, torch.randn(3, 16), **options) == [folds.CUDA_GRAPHS]
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert refusals(model, torch.randn(3, 16)) == [folds.CUDA_GRAPHS]
        assert refusals(model, torch.randn(3, 16), stage="aot_eager") == []


def test_adopted_weights():
    options = {"formulation": "folded", "block_size": 8}
    assert refusals(SwiGLU(), torch.randn(3, 16), **options) == [folds.ADOPTED]


def test_stand_ins():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = prepared(nn.Linear(16, 16), formulation="folded")

        def forward(self, x):
            given = {n: 2 * p for n, p in self.inner.named_parameters() if "skew" in n}
            return torch.func.functional_call(self.inner, given, x)

    (reason,) = refusals(Called(), torch.randn(3, 16))
    assert reason == "the graph computes what is folded, by mul"

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = prepared(nn.Linear(16, 16), formulation="folded")
            skews = {n: p for n, p in self.inner.named_parameters() if "skew" in n}
            self.given = {n: p.detach().clone() for n, p in skews.items()}

        def forward(self, x):
            return torch.func.functional_call(self.inner, self.given, x)

    options = {"formulation": "folded", "block_size": 8}
    assert refusals(Given(), torch.randn(3, 16), **options) == [folds.STAND_INS]


@pytest.fixture
def one_process():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_fsdp(one_process):
    from torch.distributed.fsdp import fully_shard

    model = prepared(SwiGLU(), formulation="folded")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    seen = []

    def backend(gm, inputs):
        options = BackendOptions.parse(
            None, {"formulation": "folded", "block_size": 8, "keep_folded": "step"}
        )
        made = rewrite(gm, inputs, options)
        seen.extend(e.detail for e in made.record.refused("hoist_folds"))
        return made.bind(made.graph)

    fully_shard(model, mesh=mesh)
    torch.compile(model, backend=backend)(torch.randn(3, 16))
    assert seen == [folds.FSDP]
