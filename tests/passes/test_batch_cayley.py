"""`batch_cayley`: golden graph, byte budget, refusals, equality."""

from __future__ import annotations

import expecttest
import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from poetx_compile.passes import BatchCayley, Formulation
from tests.helpers.graph_of import assert_equals_eager, explained, prepared, run_passes
from tests.helpers.models import Block, SwiGLU


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 8, bias=False)

    def forward(self, x):
        return self.down(self.up(x))


class TestGolden(expecttest.TestCase):
    def test_batched_cayley(self):
        model = prepared(Two())
        self.assertExpectedInline(
            run_passes([Formulation(), BatchCayley()], model, torch.randn(3, 16))[0],
            """\
up.original: f32[24, 16]
up.skew_in: f32[2, 28]
up.skew_out: f32[3, 28]
up.perm_in: i64[2, 8]
up.perm_out: i64[2, 12]
x: f32[3, 16]
down.original: f32[8, 24]
down.skew_in: f32[3, 28]
down.skew_out: f32[1, 28]
down.perm_in: i64[2, 12]
down.perm_out: i64[2, 4]
%1: f32[9, 28] = cat([up.skew_in, up.skew_out, down.skew_in, down.skew_out])
%2: f32[9, 8, 8] = poetx.cayley_neumann(%1, 8, 3)
%3: (f32[2, 8, 8], f32[3, 8, 8], f32[3, 8, 8], f32[1, 8, 8]) = split(%2, [2, 3, 3, 1])
%4: f32[2, 8, 8] = getitem(%3, 0)
%5: f32[3, 8, 8] = getitem(%3, 1)
%6: f32[3, 8, 8] = getitem(%3, 2)
%7: f32[1, 8, 8] = getitem(%3, 3)
%8: f32[3, 16] = poetx.rotate_blocks(x, %4, up.perm_in, None, False)
%9: f32[3, 24] = linear(%8, up.original, None)
%10: f32[3, 24] = poetx.rotate_blocks(%9, %5, None, up.perm_out, False)
%11: f32[3, 24] = poetx.rotate_blocks(%10, %6, down.perm_in, None, False)
%12: f32[3, 8] = linear(%11, down.original, None)
%13: f32[3, 8] = poetx.rotate_blocks(%12, %7, None, down.perm_out, False)
return (%13)
""",
        )


def batches(model: nn.Module, max_bytes: int) -> list[str]:
    explanation = explained(model, torch.randn(3, 16), cayley_batch_bytes=max_bytes)
    return [e.detail for e in explanation.graphs[0].record.applied("batch_cayley")]


def test_the_byte_budget_bounds_each_batch():
    model = prepared(SwiGLU(width=16, hidden=40))  # sides of 2 and 5 blocks of 8×8 fp32
    assert batches(model, 2**20) == ["6 sides, 21 blocks of 8 in one launch"]
    block = 8 * 8 * 4
    split = batches(model, 7 * block)
    assert len(split) == 3
    assert all(f"{n} blocks" in detail for n, detail in zip((7, 7, 7), split, strict=True))
    assert batches(model, 1) == []


def test_a_lone_rotation_is_refused_with_a_reason():
    explanation = explained(prepared(nn.Linear(8, 16), (8, 16)), torch.randn(3, 8))
    reasons = [e.detail for e in explanation.graphs[0].record.refused("batch_cayley")]
    assert len(reasons) == 2
    assert all("alone" in reason for reason in reasons)


def test_block_sizes_are_not_mixed():
    explanation = explained(prepared(SwiGLU(), (8, 4)), torch.randn(3, 16))
    details = [e.detail for e in explanation.graphs[0].record.applied("batch_cayley")]
    assert ["of 8 " in details[0], "of 4 " in details[1]] == [True, True]


def test_batched_rotations_are_bitwise_the_same():
    model = prepared(Block())
    x = torch.randn(2, 5, 16)
    results = [
        torch.compile(
            model, backend=poetx.poetx_backend, options={"stage": "eager", "cayley_batch_bytes": n}
        )(x)
        for n in (1, 1500, 2**30)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_gradients_equal_eager_over_several_batches():
    model = prepared(SwiGLU().double())
    assert_equals_eager(model, torch.randn(4, 16).double(), cayley_batch_bytes=4000)


def test_a_budget_below_one_byte_is_refused():
    with pytest.raises(ConfigError, match="cayley_batch_bytes"):
        explained(prepared(nn.Linear(8, 8)), torch.randn(1, 8), cayley_batch_bytes=0)


def test_rotations_computed_in_the_graph_are_refused_with_a_reason():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = prepared(nn.Linear(8, 16))
            self.skew = nn.Parameter(torch.zeros(1, 28))

        def forward(self, x):
            skew = {"parametrizations.weight.0.skew_in": self.skew.sin()}
            return torch.func.functional_call(self.linear, skew, (x,))

    graph, record = run_passes([Formulation(), BatchCayley()], Computed(), torch.randn(3, 8))
    (event,) = record.refused("batch_cayley")
    assert "is not an input of the graph" in event.detail
    assert graph.count("poetx.cayley_neumann") == 2
