"""`formulation`: golden graphs, the choice of each side and its reason, and what is refused."""

from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from poetx_compile.passes import Event, Formulation, Machine, Record, graphs, run
from tests.helpers.graph_of import (
    assert_equals_eager,
    dynamo_graph,
    explained,
    prepared,
    run_passes,
)
from tests.helpers.models import MLP

BYTES_ALONE = Machine(bytes=1e3, launch=1e-12)
"""Rotating moves 2·T·d elements twice, folding 2·n·m once: at 64×64 they meet at T = 32."""

READ_BY_T = "weight-centric: the weight is read by t, not by F.linear"


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = MLP()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class ReadsWeight(nn.Module):
    """Uses the weight itself, as `F.multi_head_attention_forward` does."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(12, 12)

    def forward(self, x):
        return x @ self.proj.weight.t()


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 20)

    def forward(self, x):
        return F.linear(bias=self.inner.bias, weight=self.inner.weight, input=x)


class Twice(nn.Module):
    """Two calls with one weight, one behind the other."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        return self.proj(torch.tanh(self.proj(x)))


def narrow(model: nn.Module, **config) -> nn.Module:
    """`model` in bf16, which is where ``formulation="auto"`` considers folding."""
    return prepared(model.bfloat16(), formulation="auto", **config)


def event_of(model: nn.Linear, tokens: int = 64, **options) -> Event:
    """What `Formulation(**options)` says of a linear that is the model."""
    x = torch.randn(tokens, model.in_features, dtype=model.bias.dtype)
    (event,) = run_passes([Formulation(**options)], model, x)[1].events
    return event


def reasons(event: Event) -> set[str]:
    """Why the sides run as they do."""
    return {choice.reason for choice in event.choices}


class TestGolden(expecttest.TestCase):
    def test_both_sides_rotated(self):
        x = torch.randn(3, 12)
        graph, _ = run_passes([Formulation()], prepared(nn.Linear(12, 20)), x)
        self.assertExpectedInline(
            graph,
            """\
original: f32[20, 12]
skew_in: f32[1, 28]
skew_out: f32[2, 28]
perm_in: i64[2, 6]
perm_out: i64[2, 10]
bias: f32[20]
input: f32[3, 12]
%1: f32[1, 8, 8] = poetx.cayley_neumann(skew_in, 8, 3)
%2: f32[2, 8, 8] = poetx.cayley_neumann(skew_out, 8, 3)
%3: f32[3, 12] = poetx.rotate_blocks(input, %1, perm_in, None, False)
%4: f32[3, 20] = linear(%3, original, None)
%5: f32[3, 20] = poetx.rotate_blocks(%4, %2, None, perm_out, False)
%6: f32[20] = .type_as(bias, %5)
%7: f32[3, 20] = add(%5, %6)
return (%7)
""",
        )

    def test_both_sides_folded(self):
        x = torch.randn(3, 12)
        graph, _ = run_passes([Formulation("folded")], prepared(nn.Linear(12, 20)), x)
        self.assertExpectedInline(
            graph,
            """\
original: f32[20, 12]
skew_in: f32[1, 28]
skew_out: f32[2, 28]
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
%8: f32[3, 20] = poetx.folded_linear(input, %7, %3, %6, perm_in, perm_out)
%9: f32[20] = .type_as(bias, %8)
%10: f32[3, 20] = add(%8, %9)
return (%10)
""",
        )

    def test_one_side_folded(self):
        # Per token, rotating 2 columns is cheap and rotating 320 is not.
        model = narrow(nn.Linear(2, 320, bias=False))
        x = torch.randn(8, 2, dtype=torch.bfloat16)
        machine = Machine(bytes=1e3, launch=1e-9)
        graph, _ = run_passes([Formulation(machine=machine)], model, x)
        self.assertExpectedInline(
            graph,
            """\
original: bf16[320, 2]
skew_in: f32[1, 1]
skew_out: f32[40, 28]
perm_in: i64[2, 2]
perm_out: i64[2, 160]
input: bf16[8, 2]
%1: f32[1, 2, 2] = poetx.cayley_neumann(skew_in, 2, 3, True)
%2: f32[40, 28] = .detach(skew_out)
%3: bf16[40, 8, 8] = poetx.rotation_delta(%2, 8, 3, torch.bfloat16, 40)
%4: f32[40, 8, 8] = poetx.rotation_tangent(skew_out, 8, 3, True, 40)
%5: bf16[320, 2] = poetx.fold_weight(original, None, %3, None, perm_out, torch.bfloat16)
%6: bf16[8, 2] = poetx.rotate_blocks(input, %1, perm_in, None, False)
%7: bf16[8, 320] = poetx.folded_linear(%6, %5, None, %4, None, perm_out)
return (%7)
""",
        )

    def test_a_weight_of_two_calls_is_built_once(self):
        graph, _ = run_passes([Formulation()], prepared(Twice()), torch.randn(3, 16))
        self.assertExpectedInline(
            graph,
            """\
proj.original: f32[16, 16]
proj.skew_in: f32[2, 28]
proj.skew_out: f32[2, 28]
proj.perm_in: i64[2, 8]
proj.perm_out: i64[2, 8]
proj.bias: f32[16]
x: f32[3, 16]
%1: f32[2, 8, 8] = poetx.cayley_neumann(proj.skew_in, 8, 3)
%2: f32[2, 8, 8] = poetx.cayley_neumann(proj.skew_out, 8, 3)
%3: f32[3, 16] = poetx.rotate_blocks(x, %1, proj.perm_in, None, False)
%4: f32[3, 16] = linear(%3, proj.original, None)
%5: f32[3, 16] = poetx.rotate_blocks(%4, %2, None, proj.perm_out, False)
%6: f32[16] = .type_as(proj.bias, %5)
%7: f32[3, 16] = add(%5, %6)
%8: f32[3, 16] = tanh(%7)
%9: f32[3, 16] = poetx.rotate_blocks(%8, %1, proj.perm_in, None, False)
%10: f32[3, 16] = linear(%9, proj.original, None)
%11: f32[3, 16] = poetx.rotate_blocks(%10, %2, None, proj.perm_out, False)
%12: f32[16] = .type_as(proj.bias, %11)
%13: f32[3, 16] = add(%11, %12)
return (%13)
""",
        )

    def test_a_chain_inside_a_checkpoint(self):
        graph, _ = run_passes([Formulation()], prepared(Checkpointed()), torch.randn(3, 12))
        self.assertExpectedInline(
            graph.replace(" [may recompute]", ""),  # so Dynamo of torch 2.11 marks a checkpoint
            """\
x: f32[3, 12]
inner.up.original: f32[22, 12]
inner.up.skew_in: f32[1, 28]
inner.up.skew_out: f32[2, 28]
inner.up.perm_in: i64[2, 6]
inner.up.perm_out: i64[2, 11]
inner.up.bias: f32[22]
inner.down.original: f32[12, 22]
inner.down.skew_in: f32[2, 28]
inner.down.skew_out: f32[1, 28]
inner.down.perm_in: i64[2, 11]
inner.down.perm_out: i64[2, 6]
inner.down.bias: f32[12]
%1: (f32[3, 12]) = tag_activation_checkpoint(wrap_body_0, inner.up.original, inner.up.skew_in, inner.up.skew_out, inner.up.perm_in, inner.up.perm_out, x, inner.up.bias, inner.down.original, inner.down.skew_in, inner.down.skew_out, inner.down.perm_in, inner.down.perm_out, inner.down.bias, use_reentrant=False)
    inner.up.original: f32[22, 12]
    inner.up.skew_in: f32[1, 28]
    inner.up.skew_out: f32[2, 28]
    inner.up.perm_in: i64[2, 6]
    inner.up.perm_out: i64[2, 11]
    x: f32[3, 12]
    inner.up.bias: f32[22]
    inner.down.original: f32[12, 22]
    inner.down.skew_in: f32[2, 28]
    inner.down.skew_out: f32[1, 28]
    inner.down.perm_in: i64[2, 11]
    inner.down.perm_out: i64[2, 6]
    inner.down.bias: f32[12]
    %1: f32[1, 8, 8] = poetx.cayley_neumann(inner.up.skew_in, 8, 3)
    %2: f32[2, 8, 8] = poetx.cayley_neumann(inner.up.skew_out, 8, 3)
    %3: f32[3, 12] = poetx.rotate_blocks(x, %1, inner.up.perm_in, None, False)
    %4: f32[3, 22] = linear(%3, inner.up.original, None)
    %5: f32[3, 22] = poetx.rotate_blocks(%4, %2, None, inner.up.perm_out, False)
    %6: f32[22] = .type_as(inner.up.bias, %5)
    %7: f32[3, 22] = add(%5, %6)
    %8: f32[3, 22] = gelu(%7)
    %9: f32[2, 8, 8] = poetx.cayley_neumann(inner.down.skew_in, 8, 3)
    %10: f32[1, 8, 8] = poetx.cayley_neumann(inner.down.skew_out, 8, 3)
    %11: f32[3, 22] = poetx.rotate_blocks(%8, %9, inner.down.perm_in, None, False)
    %12: f32[3, 12] = linear(%11, inner.down.original, None)
    %13: f32[3, 12] = poetx.rotate_blocks(%12, %10, None, inner.down.perm_out, False)
    %14: f32[12] = .type_as(inner.down.bias, %13)
    %15: f32[3, 12] = add(%13, %14)
    return (%15)
%2: f32[3, 12] = getitem(%1, 0)
return (%2)
""",
        )

    def test_dynamic_batch(self):
        x = torch.randn(3, 5, 12)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        graph, _ = run_passes([Formulation()], prepared(nn.Linear(12, 20)), x)
        self.assertExpectedInline(
            graph,
            """\
original: f32[20, 12]
skew_in: f32[1, 28]
skew_out: f32[2, 28]
perm_in: i64[2, 6]
perm_out: i64[2, 10]
bias: f32[20]
input: f32[s0, s1, 12]
%1: f32[1, 8, 8] = poetx.cayley_neumann(skew_in, 8, 3)
%2: f32[2, 8, 8] = poetx.cayley_neumann(skew_out, 8, 3)
%3: f32[s0, s1, 12] = poetx.rotate_blocks(input, %1, perm_in, None, False)
%4: f32[s0, s1, 20] = linear(%3, original, None)
%5: f32[s0, s1, 20] = poetx.rotate_blocks(%4, %2, None, perm_out, False)
%6: f32[20] = .type_as(bias, %5)
%7: f32[s0, s1, 20] = add(%5, %6)
return (%7)
""",
        )


def test_a_weight_read_by_anything_but_linear_stays_as_it_is() -> None:
    graph, record = run_passes([Formulation()], prepared(ReadsWeight()), torch.randn(3, 12))
    (event,) = record.refused("input_centric")
    assert event.detail == READ_BY_T
    assert "poetx.orthogonal_equivalence" in graph
    assert record.applied("folded") == record.applied("input_centric") == []


def test_a_model_without_prepared_layers_stays_as_it_is() -> None:
    graph, record = run_passes([Formulation()], MLP(), torch.randn(3, 12))
    assert record.events == []
    assert "poetx" not in graph


def test_a_linear_by_keyword_is_matched() -> None:
    graph, record = run_passes([Formulation()], prepared(Keyword()), torch.randn(3, 12))
    assert record.applied("input_centric")
    assert "orthogonal_equivalence" not in graph


def test_a_weight_read_twice_is_folded_once() -> None:
    graph, record = run_passes([Formulation("folded")], prepared(Twice()), torch.randn(3, 16))
    assert len(record.applied("folded")) == 2, "a parametrization computes the weight at each read"
    assert graph.count("poetx.fold_weight") == 1


@pytest.mark.parametrize("formulation", ["folded", "input_centric"])
def test_all_calls_with_one_reading_are_rewritten(formulation) -> None:
    class OneReading(ReadsWeight):
        def forward(self, x):
            weight = self.proj.weight
            return F.linear(F.linear(x, weight), weight, self.proj.bias)

    model, x = prepared(OneReading(), formulation=formulation), torch.randn(3, 12)
    graph, record = run_passes([Formulation(formulation)], model, x)
    assert len(record.applied(formulation)) == 1
    assert "orthogonal_equivalence" not in graph
    assert_equals_eager(model, x, stage="eager")


def test_a_reading_whose_calls_compute_in_several_dtypes_rotates() -> None:
    class Mixed(ReadsWeight):
        def forward(self, x):
            weight = self.proj.weight
            with torch.autocast("cpu", torch.bfloat16):
                y = F.linear(x, weight)
            return F.linear(y.float(), weight)

    _, record = run_passes([Formulation("folded")], prepared(Mixed()), torch.randn(3, 12))
    (event,) = record.applied("input_centric")
    assert reasons(event) == {"its calls compute in several dtypes"}


def test_a_weight_that_leaves_the_graph_stays_as_it_is() -> None:
    class Returned(ReadsWeight):
        def forward(self, x):
            return x, self.proj.weight

    _, record = run_passes([Formulation()], prepared(Returned()), torch.randn(3, 12))
    (event,) = record.refused("input_centric")
    assert "the weight leaves the graph" in event.detail


def test_a_call_inside_a_transform_stays_as_it_is() -> None:
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(12, 12)

        def forward(self, x):
            return torch.func.vmap(lambda rows: self.proj(rows))(x)

    _, record = run_passes([Formulation()], prepared(Mapped()), torch.randn(3, 5, 12))
    (event,) = record.refused("input_centric")
    assert event.detail == "weight-centric: inside a torch.func transform"


@pytest.mark.parametrize("formulation", ["folded", "input_centric"])
@pytest.mark.parametrize("last", [False, True])
def test_explain_tells_of_the_reading_that_was_refused(formulation, last) -> None:
    class Both(ReadsWeight):
        def forward(self, x):
            raw, linear = super().forward, self.proj
            return linear(raw(x)) if last else raw(linear(x))

    (row,) = explained(prepared(Both(), formulation=formulation), torch.randn(3, 12)).rows
    assert (row.status, row.reason) == ("refused", READ_BY_T)


def test_a_side_of_size_one_has_no_rotation_and_no_choice() -> None:
    for name in ("folded", "input_centric"):
        graph, record = run_passes(
            [Formulation(name)], prepared(nn.Linear(1, 8)), torch.randn(3, 1)
        )
        (event,) = record.applied(name)
        assert [choice.side for choice in event.choices] == ["out"]
        assert graph.count("poetx.rotate_blocks") == (name == "input_centric")


def test_each_side_takes_the_cheaper_form() -> None:
    # Only launches cost anything: a fold is one, a rotation is two.
    model = narrow(nn.Linear(64, 64))
    free = event_of(model, 8, machine=Machine(flops=1e30, bytes=1e30))
    assert [choice.folded for choice in free.choices] == [True, True]
    rotated = event_of(model, 31, machine=BYTES_ALONE)
    how = "input_centric: rotated in (fold where T > 31), rotated out (fold where T > 31)"
    assert (rotated.pass_name, rotated.detail) == ("input_centric", how)
    folded = event_of(model, 32, machine=BYTES_ALONE)
    how = "folded in (fold where T > 31), folded out (fold where T > 31)"
    assert (folded.pass_name, folded.detail) == ("folded", how)
    assert all(choice.cost.tokens == 32 for choice in folded.choices)


def test_the_calls_of_a_weight_count_together() -> None:
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    _, record = run_passes([Formulation()], narrow(Twice()), x)
    assert {c.cost.tokens for e in record.events for c in e.choices} == {64}


def test_folding_again_in_the_backward_costs_twice() -> None:
    event = event_of(narrow(nn.Linear(64, 64)), folds=2, machine=BYTES_ALONE)
    assert reasons(event) == {"fold where T > 64"}
    model = narrow(nn.Linear(64, 64), variant="mem")
    rates = {"bytes": 1e3, "launch": 1e-12}
    (row,) = explained(model, torch.randn(8, 64).bfloat16(), machine=rates).rows
    assert "T > 64" in row.formulation


def test_a_form_that_was_asked_for_is_taken_whatever_it_costs() -> None:
    model = narrow(nn.Linear(64, 64))
    for name, machine in (("folded", BYTES_ALONE), ("input_centric", Machine(1e30, 1e30))):
        event = event_of(model, 8, formulation=name, machine=machine)
        assert (event.pass_name, event.detail) == (name, name)


def test_fp32_rotates() -> None:
    event = event_of(prepared(nn.Linear(64, 64)), 4096, machine=BYTES_ALONE)
    assert event.detail == "input_centric"
    assert reasons(event) == {"a weight is folded where the layer computes in bf16 or fp16"}


@pytest.mark.parametrize("config", [{"neumann_order": 2}, {"cayley": "exact"}, {"block_size": 512}])
def test_auto_rotates_where_the_tangent_would_be_a_solve(config) -> None:
    event = event_of(narrow(nn.Linear(512, 512), **config))
    assert event.detail == "input_centric"
    assert reasons(event) == {"folding is fast for order 3 and blocks up to 256"}


def test_without_the_angle_guard_auto_rotates_and_folded_raises() -> None:
    model = narrow(nn.Linear(64, 64), max_angle=None)
    explanation = explained(model, torch.randn(64, 64).bfloat16())
    assert explanation.rows[0].formulation == "input_centric"
    (event,) = explanation.graphs[0].record.applied("input_centric")
    assert reasons(event) == {"folding needs the angle guard (max_angle of at most 0.25)"}
    with pytest.raises(ConfigError, match="max_angle"):
        poetx.POETXConfig(formulation="folded", max_angle=None)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="max_angle"):
        explained(model, torch.randn(3, 64).bfloat16(), formulation="folded")
    poetx.POETXConfig(formulation="folded", max_angle=None, cayley="exact")


@pytest.mark.parametrize(("formulation", "name"), [("auto", "input_centric"), ("folded", "folded")])
def test_without_sizes_nothing_is_compared(formulation, name) -> None:
    model = narrow(nn.Sequential(nn.Tanh(), nn.Linear(64, 64)))
    root = graphs.clone(dynamo_graph(model, torch.randn(8, 64).bfloat16()))
    (linear,) = filter(graphs.is_linear, root.graph.nodes)
    del graphs.linear_arguments(linear)[0].meta[graphs.VALUE]
    record = Record()
    run([Formulation(formulation)], root, record)
    (event,) = record.applied(name)
    assert not any(choice.cost for choice in event.choices)


def test_a_form_can_be_left_out() -> None:
    model, x = narrow(nn.Linear(64, 64)), torch.randn(8, 64).bfloat16()
    fold, rotate = {"flops": 1e30, "bytes": 1e30}, {"bytes": 1e3, "launch": 1e-12}

    def told(rates: dict[str, float], *left_out: str) -> tuple[str, str]:
        (row,) = explained(model, x, disable_passes=left_out, machine=rates).rows
        return row.formulation.partition(" ")[0], row.reason

    assert told(fold) == told(fold, "input_centric") == ("folded", "")
    assert told(fold, "folded") == ("input_centric", "")
    refused = "weight_centric", "weight-centric: input_centric is among disable_passes"
    assert told(rotate, "input_centric") == told(fold, "folded", "input_centric") == refused


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
