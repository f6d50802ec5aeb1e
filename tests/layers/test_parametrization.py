"""`OrthogonalEquivalence`: precision, moves and casts, saving and loading."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from poetx_compile import ops
from poetx_compile.compile.options import BackendOptions
from poetx_compile.compile.rewrite import config_in_force
from poetx_compile.config import POETXConfig
from poetx_compile.errors import InterruptedMergeError
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.prepare import prepare
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.layers.sides import side_blocks
from tests.helpers.models import SwiGLU
from tests.helpers.references import expand
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close

CONFIG = POETXConfig(block_size=4)


@pytest.mark.parametrize(
    ("size", "b", "expected"),
    [
        (12, 4, (3, 4)),
        (13, 4, (3, 4)),
        (4, 4, (1, 4)),
        (3, 4, (1, 3)),
        (2, 4, (1, 2)),
        (1, 4, (0, 1)),
        (7, 6, (1, 6)),
    ],
)
def test_blocks_of_a_side(size: int, b: int, expected: tuple[int, int]) -> None:
    assert side_blocks(size, b) == expected


def _linear(dtype: torch.dtype = torch.float32, m: int = 11, n: int = 7):
    linear = nn.Linear(m, n, dtype=dtype)
    prepare(linear, CONFIG)
    equivalence = equivalence_of(linear)
    assert equivalence is not None
    return linear, equivalence


def test_sides_are_what_the_module_holds_now() -> None:
    linear, e = _linear(m=11, n=1)
    before, out = e.sides
    assert before == ("in", e.skew_in, e.perm_in, 2, 4)
    assert (out.name, out.permutation, out.blocks, out.elements) == ("out", e.perm_out, 0, 0)
    linear.load_state_dict(linear.state_dict(), assign=True)
    assert e.sides[0].skew is e.skews[0] is e.skew_in is not before.skew


@pytest.mark.parametrize(
    ("weight", "skew"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_skew_parameters_are_packed_and_fp32_at_least(weight, skew) -> None:
    linear, equivalence = _linear(weight)
    assert stored_weight(linear).dtype == weight
    assert equivalence.skew_in.dtype == equivalence.skew_out.dtype == skew
    assert equivalence.skew_in.shape == (2, 6)
    assert equivalence.skew_out.shape == (1, 6)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        nn.Module.half,
        nn.Module.bfloat16,
        lambda m: m.type(torch.bfloat16),  # buffers of integers too
    ],
)
def test_a_cast_to_half_precision_leaves_rotations_in_fp32(cast) -> None:
    model = SwiGLU()
    prepare(model, CONFIG)
    turn(model)
    skews = [p.detach().clone() for n, p in model.named_parameters() if "skew" in n]
    cast(model)
    for _, linear, equivalence in prepared_linears(model):
        assert stored_weight(linear).dtype in (torch.float16, torch.bfloat16)
        assert equivalence.skew_in.dtype == equivalence.skew_out.dtype == torch.float32
        assert equivalence.perm_in.pair.dtype == equivalence.layout.dtype == torch.int64
    after = [p for n, p in model.named_parameters() if "skew" in n]
    assert all(map(torch.equal, skews, after))


def test_a_cast_to_double_is_followed_both_ways() -> None:
    linear, equivalence = _linear()
    linear.double()
    assert equivalence.skew_in.dtype == torch.float64
    linear.float()
    assert equivalence.skew_in.dtype == torch.float32
    for cast in (nn.Module.bfloat16, nn.Module.half):  # not of their dtype, nor wider than fp32
        linear.double()
        cast(linear)
        assert equivalence.skew_in.dtype == equivalence.skew_out.dtype == torch.float32


def test_the_effective_weight_is_the_ops() -> None:
    linear, e = _linear()
    turn(linear)
    expected = ops.orthogonal_equivalence(
        stored_weight(linear), e.skew_in, e.skew_out, e.perm_in.pair, e.perm_out.pair, 4, 4, 3
    )
    assert torch.equal(linear.weight, expected)


@pytest.mark.parametrize(
    ("kind", "m", "n"), [("random", 11, 7), ("chunked", 40, 7), ("chunked", 32, 48)]
)
def test_the_stored_weight_is_permuted_once(kind: str, m: int, n: int) -> None:
    linear = nn.Linear(m, n)
    before = linear.weight.detach().clone()
    prepare(linear, POETXConfig(block_size=8, permutation=kind))
    e = equivalence_of(linear)
    rows, columns = expand(e.perm_out.pair, n)[0], expand(e.perm_in.pair, m)[0]
    permuted = before[rows][:, columns]
    assert torch.equal(stored_weight(linear), permuted)
    assert not torch.equal(stored_weight(linear), before)
    assert stored_weight(linear).is_contiguous()


def test_assigning_a_weight_stores_it_and_resets_the_rotations() -> None:
    linear, e = _linear()
    turn(linear)
    new = torch.randn(7, 11)
    linear.weight = new
    assert torch.equal(linear.weight, new)
    assert not e.skew_in.any()
    assert not e.skew_out.any()


def test_the_state_holds_the_layout_and_no_permutation() -> None:
    linear, e = _linear()
    state = linear.state_dict()
    assert {name.rpartition(".")[2] for name in state} == {
        "bias",
        "original",
        "skew_in",
        "skew_out",
        "layout",
    }
    *layout, checksum = state["parametrizations.weight.0.layout"].tolist()
    assert layout == [3, CONFIG.seed, 1, 1, e.perm_in.group, e.perm_out.group, 1, 3, 4, 4]
    assert checksum > 2**24


def _prepared(model: nn.Module, **config) -> nn.Module:
    prepare(model, POETXConfig(**({"block_size": 4} | config)))
    return model


def test_deepcopy_keeps_groups_shared_and_states_apart() -> None:
    model = _prepared(SwiGLU())
    turn(model)
    copied = copy.deepcopy(model)
    gate, up = equivalence_of(copied.gate_proj), equivalence_of(copied.up_proj)
    assert gate.perm_in is up.perm_in
    assert gate.perm_in is not equivalence_of(model.gate_proj).perm_in
    assert gate.config == equivalence_of(model.gate_proj).config
    x = torch.randn(5, 16)
    expected = model(x)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        gate.skew_in.zero_()
        gate.perm_in.redraw(0, 9)
    assert torch.equal(model(x), expected)


def test_an_interrupted_merge_is_reported_until_a_checkpoint_is_loaded() -> None:
    linear, e = _linear()
    state, x = copy.deepcopy(linear.state_dict()), torch.randn(3, 11)
    expected = linear(x)
    e.interrupted = True
    with pytest.raises(InterruptedMergeError, match="Load the last checkpoint"):
        linear(x)
    with pytest.raises(InterruptedMergeError, match="Load the last checkpoint"):
        linear.state_dict()
    linear.load_state_dict(state)
    assert torch.equal(linear(x), expected)


def test_gradients_reach_the_skew_parameters_and_not_the_weight() -> None:
    linear, e = _linear()
    linear(torch.randn(9, 11)).square().sum().backward()
    assert stored_weight(linear).grad is None
    for parameter in (e.skew_in, e.skew_out, linear.bias):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_the_representation_names_blocks_order_and_draw() -> None:
    _, e = _linear()
    assert isinstance(e, OrthogonalEquivalence)
    assert e.extra_repr() == "in=2x4, out=1x4, order=3, draw=1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotated_layer_in_low_precision_follows_the_fp64_one(dtype) -> None:
    torch.manual_seed(3)
    wide = _prepared(SwiGLU().double())
    turn(wide)
    low = _prepared(SwiGLU().to(dtype))
    with torch.no_grad():
        for p, q in zip(low.parameters(), wide.parameters(), strict=True):
            p.copy_(q)
            q.copy_(p)  # both start from the rounded values
    x = torch.randn(64, 16).to(dtype)
    assert_close(low(x), wide(x.double()))


@pytest.mark.parametrize("how", ["as prepared", "assigned parameters", "deepcopy"])
def test_the_backend_finds_the_configuration_of_a_graph(how: str) -> None:
    layer = nn.Linear(6, 4)
    prepare(layer, POETXConfig(block_size=2, variant="mem"))
    if how == "assigned parameters":
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)
    if how == "deepcopy":
        layer = copy.deepcopy(layer)
    found = []

    def backend(gm, inputs):
        found.append(config_in_force(gm, BackendOptions.parse(None, None)).variant)
        return gm

    torch.compile(layer, backend=backend)(torch.randn(3, 6))
    assert found == ["mem"]
