"""Declared groups: which sides share a permutation, what is refused, what survives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError
from poetx_compile.layers.permutation import Permutation
from poetx_compile.layers.prepare import merge_and_unload, prepare
from poetx_compile.layers.prepared import equivalence_of, prepared_linears
from poetx_compile.optim.merge import merge
from tests.helpers.models import MLP, Attention, SwiGLU, TinyLM
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close

CONFIG = POETXConfig(block_size=4)
GATED = ("gate_proj.out", "up_proj.out", "down_proj.in")
RESIDUAL = (
    "layers.*.attention.[qkv]_proj.in",
    "layers.*.attention.o_proj.out",
    "layers.*.mlp.gate_proj.in",
    "layers.*.mlp.up_proj.in",
    "layers.*.mlp.down_proj.out",
)


def permutation(model: nn.Module, side: str) -> Permutation:
    name, _, which = side.rpartition(".")
    equivalence = equivalence_of(model.get_submodule(name))
    assert equivalence is not None
    return equivalence.perm_in if which == "in" else equivalence.perm_out


def groups(model: nn.Module) -> list[set[str]]:
    """The sides that share a permutation, of every permutation with more than one."""
    by_permutation: dict[int, set[str]] = {}
    for name, _, e in prepared_linears(model):
        by_permutation.setdefault(id(e.perm_in), set()).add(f"{name}.in")
        by_permutation.setdefault(id(e.perm_out), set()).add(f"{name}.out")
    return sorted((g for g in by_permutation.values() if len(g) > 1), key=lambda g: min(g))


# Groups


def test_one_group_for_each_parent() -> None:
    model = TinyLM()
    prepare(model, CONFIG, shared=[GATED])
    first, second = (permutation(model, f"layers.{i}.mlp.gate_proj.out") for i in range(2))
    assert first is not second
    assert first.group != second.group
    assert not torch.equal(first.pair, second.pair)
    for i, expected in enumerate((first, second)):
        for side in GATED:
            assert permutation(model, f"layers.{i}.mlp.{side}") is expected


def test_one_group_for_the_whole_model() -> None:
    model = TinyLM()
    prepare(model, CONFIG, shared=[RESIDUAL])
    stream = permutation(model, "layers.0.attention.q_proj.in")
    (of_stream,) = [g for g in groups(model) if "layers.0.attention.q_proj.in" in g]
    assert len(of_stream) == 14
    assert all(permutation(model, side) is stream for side in of_stream)
    assert stream is not permutation(model, "layers.0.attention.o_proj.in")


def test_a_nested_model_has_the_same_groups() -> None:
    alone, nested = TinyLM(), nn.ModuleDict({"model": TinyLM()})
    prepare(alone, CONFIG, shared=[GATED, RESIDUAL])
    prepare(nested, CONFIG, shared=[GATED, RESIDUAL])
    assert [{f"model.{s}" for s in g} for g in groups(alone)] == groups(nested)


def test_siblings_share_as_before_where_nothing_is_declared() -> None:
    plain, declared = Attention(), Attention()
    prepare(plain, CONFIG)
    prepare(declared, CONFIG, shared=[("q_proj.in", "k_proj.in", "v_proj.in")])
    assert groups(plain) == [{f"{n}_proj.in" for n in "qkvo"}]
    assert groups(declared) == [{f"{n}_proj.in" for n in "qkv"}]


def test_parts_that_were_compiled_are_named_as_the_user_names_them() -> None:
    model = TinyLM()
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend="eager")
    prepare(model, CONFIG, shared=[GATED, RESIDUAL])
    assert sorted(map(len, groups(model))) == [3, 3, 14]


@pytest.mark.parametrize("kind", ["random", "chunked"])
def test_step_zero_and_the_way_back_are_bitwise_the_original(kind: str) -> None:
    model, tokens = TinyLM(), torch.randint(24, (2, 5))
    original = copy.deepcopy(model)
    expected = model(tokens)
    config = POETXConfig(block_size=8, permutation=kind)
    prepare(model, config, shared=[GATED, RESIDUAL])
    drawn = permutation(model, "layers.0.mlp.gate_proj.out").pair[0]
    assert len(drawn) == (40 if kind == "random" else 20)
    assert not torch.equal(drawn, torch.arange(len(drawn)))
    assert torch.equal(model(tokens), expected)
    merge_and_unload(model)
    for mine, theirs in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_merge_draws_one_permutation_for_the_group() -> None:
    model, tokens = TinyLM().double(), torch.randint(24, (2, 5))
    prepare(model, CONFIG, shared=[GATED, RESIDUAL])
    turn(model, 0.02)
    before = groups(model)
    old = permutation(model, "layers.0.attention.q_proj.in").pair.clone()
    expected = model(tokens)
    merge(model, redraw=True)
    assert groups(model) == before
    assert not torch.equal(permutation(model, "layers.1.mlp.down_proj.out").pair, old)
    assert {e.draw for _, _, e in prepared_linears(model)} == {2}
    assert_close(model(tokens), expected, torch.float32)  # polar factors: within 2θ⁴


def test_groups_survive_moves_and_copies() -> None:
    model = TinyLM()
    prepare(model, CONFIG, shared=[GATED, RESIDUAL])
    before = groups(model)
    assert groups(model.to(torch.float64)) == before
    assert groups(copy.deepcopy(model)) == before


# Saving and resuming


def test_a_checkpoint_resumes_with_the_same_groups() -> None:
    tokens = torch.randint(24, (2, 5))
    model, resumed = TinyLM(), TinyLM()
    prepare(model, CONFIG, shared=[GATED, RESIDUAL])
    turn(model)
    merge(model, redraw=True)
    turn(model)
    prepare(resumed, CONFIG, shared=[GATED, RESIDUAL])
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed(tokens), model(tokens))
    merge(model, redraw=True)
    merge(resumed, redraw=True)
    assert torch.equal(resumed(tokens), model(tokens))


@pytest.mark.parametrize("shared", [(), (GATED,), (RESIDUAL, GATED[:2])])
def test_a_checkpoint_of_other_groups_is_refused(shared) -> None:
    model, other = TinyLM(), TinyLM()
    prepare(model, CONFIG, shared=[GATED, RESIDUAL])
    prepare(other, CONFIG, shared=shared)
    with pytest.raises(RuntimeError, match="the same `shared`"):
        other.load_state_dict(model.state_dict())


# Twice


def test_preparing_again_changes_nothing() -> None:
    model = TinyLM()
    prepare(model, CONFIG, shared=[GATED, RESIDUAL])
    before = groups(model), copy.deepcopy(model.state_dict())
    prepare(model)
    prepare(model, CONFIG, shared=[GATED, RESIDUAL])
    assert groups(model) == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())


def test_what_is_new_joins_its_group() -> None:
    model, x = SwiGLU(), torch.randn(3, 16)
    expected = model(x)
    prepare(model.up_proj, CONFIG)
    prepare(model, CONFIG, shared=[GATED])
    assert set(GATED) in groups(model)
    assert torch.equal(model(x), expected)


def test_sides_with_permutations_of_their_own_cannot_be_joined() -> None:
    model = SwiGLU()
    prepare(model, CONFIG)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"permutations of their own: merge_and_unload"):
        prepare(model, CONFIG, shared=[GATED])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    prepare(merge_and_unload(model), CONFIG, shared=[GATED])
    assert set(GATED) in groups(model)


def test_nothing_joins_a_group_that_has_been_merged() -> None:
    model = SwiGLU()
    prepare(model.up_proj, CONFIG)
    merge(model, redraw=True)
    with pytest.raises(ConfigError, match="another draw"):
        prepare(model, CONFIG, shared=[GATED])
    assert equivalence_of(model.gate_proj) is None


def test_adopted_states_are_grouped_when_they_are_moved() -> None:
    model, x = SwiGLU(), torch.randn(3, 16)
    options = {"stage": "aot_eager", "block_size": 4}
    compiled = torch.compile(model, backend=poetx.poetx_backend, options=options)
    y, expected = compiled(x), model(x)
    prepare(model, shared=[GATED])
    y.sum().backward()
    assert set(GATED) in groups(model)
    assert_close(model(x), expected)
    assert equivalence_of(model.up_proj).skew_out.grad is not None  # type: ignore[union-attr]
    merge(model, redraw=True)
    assert_close(model(x), expected)
    assert not torch.equal(permutation(model, "down_proj.in").pair[0], torch.arange(40))


# Errors


class Frozen(SwiGLU):
    """A gated MLP whose gate is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj.weight.requires_grad_(False)


class Mixed(nn.Module):
    """Two parents, one of which lacks a side."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = SwiGLU()
        self.other = nn.ModuleDict({"up_proj": nn.Linear(16, 40)})


@pytest.mark.parametrize(
    ("make", "shared", "message"),
    [
        (SwiGLU, GATED, r"shared\[0\] = 'gate_proj.out' is not allowed: give a sequence"),
        (SwiGLU, [(1, 2)], "is not allowed: give a sequence"),
        (SwiGLU, [("gate_proj", "up_proj")], "'gate_proj' is no side"),
        (SwiGLU, [("gate_proj.weight",)], "'gate_proj.weight' is no side"),
        (SwiGLU, [("in", "out")], "'in' is no side"),
        (SwiGLU, [("gate_proj.out", "w3.out")], r"'w3.out' matches no nn.Linear"),
        (SwiGLU, [("gate.out", "up_proj.out")], r"'gate.out' matches no nn.Linear"),
        (SwiGLU, [("gate_proj.out", "down_proj.out")], r"sizes \(gate_proj.out: 40, down_proj"),
        (SwiGLU, [GATED, ("up_proj.out", "down_proj.in")], "up_proj.out is in two groups"),
        (SwiGLU, [("gate_proj.out",)], "every group has one side"),
        (
            TinyLM,
            [("layers.0.mlp.down_proj.out", "mlp.gate_proj.in")],
            r"shared\[0\] below the model: nothing there matches 'mlp.gate_proj.in'",
        ),
        (TinyLM, [("lm_head.in", "norm.in")], r"names lm_head, which is not .*excluded by name"),
        (Frozen, [GATED], r"names gate_proj, which is not .*frozen by the user"),
        (Mixed, [("up_proj.out", "down_proj.in")], r"below other: nothing .* 'down_proj.in'"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_changes(make, shared, message) -> None:
    model = make()
    with pytest.raises(ConfigError, match=message):
        prepare(model, CONFIG, shared=shared)
    assert not list(prepared_linears(model))


def test_sides_on_different_devices_are_refused() -> None:
    model = MLP()
    prepare(model.up, CONFIG)
    model.up.to("meta")
    with pytest.raises(ConfigError, match=r"different devices \(up.out: meta, down.in: cpu\)"):
        prepare(model, CONFIG, shared=[("up.out", "down.in")])


def test_a_shared_module_counts_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12)})
    model["c"] = model["a"]
    prepare(model, CONFIG, shared=[("a.out", "b.in", "c.out")])
    assert {"a.out", "b.in"} in groups(model)
