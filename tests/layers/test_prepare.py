"""`prepare` and `merge_and_unload`: identity at step 0, eligibility, report, and the way back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import poetx_compile as poetx
from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError, NothingToTrainError
from poetx_compile.layers.prepare import config_of, merge_and_unload, prepare
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from tests.helpers.models import MLP, Attention, OddZoo, SwiGLU, TinyLM
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close

CONFIG = POETXConfig(block_size=4)


class Shared(nn.Module):
    """One linear under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


class SelfAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` of one tensor: it reads `out_proj.weight` by itself."""

    def __init__(self) -> None:
        super().__init__(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def _features(width: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randn(2, 5, width).to(dtype)


def _tokens(dtype: torch.dtype) -> Tensor:
    return torch.randint(24, (2, 5))


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.dtype], Tensor]]] = {
    "root": (lambda: nn.Linear(11, 7), _features(11)),
    "mlp": (MLP, _features(12)),
    "swiglu": (SwiGLU, _features(16)),
    "attention": (Attention, _features(16)),
    "odd": (OddZoo, _features(7)),
    "shared": (Shared, _features(12)),
    "multihead": (SelfAttention, _features(12)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True),
        _features(12),
    ),
    "language_model": (TinyLM, _tokens),
    "tied": (lambda: TinyLM(tied=True), _tokens),
}
zoo = pytest.mark.parametrize("name", list(ZOO))


def _make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    make, inputs = ZOO[name]
    return make().to(dtype), inputs(dtype)


def _status(report) -> dict[str, tuple[str, str]]:
    """Of each `nn.Linear`."""
    return {row.name: (row.status, row.reason) for row in report if row.is_linear}


# Identity at step 0


@zoo
@pytest.mark.parametrize(
    ("dtype", "block_size"),
    [
        (torch.float32, 4),
        (torch.float32, 256),
        (torch.bfloat16, (3, 5)),
        (torch.float16, 4),
    ],
)
def test_step_zero_is_bitwise_the_original(name: str, dtype, block_size) -> None:
    model, x = _make(name, dtype)
    expected = model(x)
    weights = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    prepare(model, POETXConfig(block_size=block_size))
    assert torch.equal(model(x), expected)
    moved = 0
    for layer, linear, _ in prepared_linears(model):
        assert torch.equal(linear.weight, weights[layer])
        moved += not torch.equal(stored_weight(linear), weights[layer])
    assert moved, "no permutation moved a weight: the test would prove nothing"


@pytest.mark.parametrize("permutation", ["random", "chunked"])
def test_step_zero_holds_for_a_wide_layer(permutation: str) -> None:
    linear, x = nn.Linear(300, 130), torch.randn(33, 300)
    expected = linear(x)
    prepare(linear, POETXConfig(block_size=32, permutation=permutation))
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("name", ["multihead", "encoder"])
def test_the_fast_path_of_evaluation_sees_the_effective_weight(name: str) -> None:
    model, x = _make(name)
    model.eval()
    with torch.no_grad():
        expected = model(x)
    prepare(model, CONFIG)
    with torch.no_grad():
        assert_close(model(x), expected)
    turn(model)
    slow = model(x)  # gradients are on: the path of training
    with torch.no_grad():
        assert_close(model(x), slow)
    assert not torch.allclose(slow, expected, atol=1e-3)


def test_an_output_projection_read_by_its_owner_trains() -> None:
    model, x = _make("multihead")
    prepare(model, CONFIG)
    model(x).square().sum().backward()
    equivalence = equivalence_of(model.out_proj)
    assert equivalence.skew_in.grad.abs().sum() > 0
    assert equivalence.skew_out.grad.abs().sum() > 0


def test_the_bias_is_added_after_the_rotation() -> None:
    linear = nn.Linear(12, 8)
    with torch.no_grad():
        linear.bias.fill_(3.0)
    prepare(linear, CONFIG)
    turn(linear)
    assert torch.equal(linear(torch.zeros(2, 12)), torch.full((2, 8), 3.0))


def test_the_global_generator_is_not_touched() -> None:
    model, _ = _make("language_model")
    before = torch.get_rng_state()
    prepare(model, CONFIG)
    assert torch.equal(torch.get_rng_state(), before)


# What trains


@zoo
def test_only_dense_weights_stop_training(name: str) -> None:
    model, x = _make(name)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    prepare(model, CONFIG)
    prepared = {n for n, _, _ in prepared_linears(model)}
    frozen = {f"{n}.weight".lstrip(".") for n in prepared}
    after = {n for n, p in model.named_parameters() if p.requires_grad and "skew" not in n}
    assert after == before - frozen
    model(x).float().square().sum().backward()
    for n, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, n


def test_biases_train_as_before() -> None:
    model, plain = MLP(), MLP()
    plain.load_state_dict(model.state_dict())
    prepare(model, CONFIG)
    x = torch.randn(5, 12)
    for m in (model, plain):
        m(x).square().sum().backward()
    assert torch.equal(model.down.bias.grad, plain.down.bias.grad)
    assert_close(model.up.bias.grad, plain.up.bias.grad)


def test_a_gradient_of_the_dense_weight_is_dropped() -> None:
    model = MLP()
    model(torch.randn(5, 12)).sum().backward()
    prepare(model, CONFIG)
    assert stored_weight(model.up).grad is None
    assert model.up.bias.grad is not None


def test_names_that_contain_the_words_of_other_methods_mean_nothing() -> None:
    model = nn.ModuleDict({"soft_prompt": nn.Linear(8, 8), "loft": nn.Embedding(4, 8)})
    prepare(model, CONFIG)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "soft_prompt.bias",
        "soft_prompt.parametrizations.weight.0.skew_in",
        "soft_prompt.parametrizations.weight.0.skew_out",
        "loft.weight",
    ]


# Groups


def test_layers_that_read_one_tensor_share_an_input_permutation() -> None:
    model = TinyLM()
    prepare(model, CONFIG)
    attention, mlp = model.layers[0].attention, model.layers[0].mlp
    q, k, v = (equivalence_of(getattr(attention, f"{n}_proj")) for n in "qkv")
    gate, up, down = (equivalence_of(getattr(mlp, f"{n}_proj")) for n in ("gate", "up", "down"))
    assert q.perm_in is k.perm_in is v.perm_in
    assert gate.perm_in is up.perm_in
    assert gate.perm_in is not q.perm_in
    assert down.perm_in is not up.perm_in
    other = equivalence_of(model.layers[1].attention.q_proj)
    assert other.perm_in is not q.perm_in
    outputs = [e.perm_out.group for _, _, e in prepared_linears(model)]
    assert len(set(outputs)) == len(outputs)


def test_groups_and_permutations_are_a_function_of_model_and_seed() -> None:
    models = [TinyLM() for _ in range(3)]
    for global_seed, (model, seed) in enumerate(zip(models, (0, 0, 1), strict=True)):
        torch.manual_seed(global_seed)
        prepare(model, POETXConfig(block_size=4, seed=seed))
    pairs = [[e.perm_in.pair for _, _, e in prepared_linears(model)] for model in models]
    assert all(map(torch.equal, pairs[0], pairs[1]))
    assert not any(map(torch.equal, pairs[0], pairs[2]))


# Eligibility: each case has a defined result and a reason


class _OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + 1, self.bias)


class _Plain(nn.Linear):
    """A subclass without a forward of its own."""


class _TopRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(8, 4)


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)  # a gate of a gated MLP, no router


class _Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.shared_expert_gate = nn.Linear(8, 1)
        self.top = _TopRouter()
        self.experts = nn.ModuleList(_Expert() for _ in range(2))


class _HuggingFaceLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.logits = nn.Linear(8, 8), nn.Linear(8, 20)

    def get_output_embeddings(self) -> nn.Module:
        return self.logits


def _ineligible() -> nn.ModuleDict:
    frozen = nn.Linear(8, 8)
    frozen.weight.requires_grad_(False)
    integer = nn.Linear(8, 8)
    integer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    buffer = nn.Linear(8, 8)
    weight = buffer.weight
    del buffer.weight
    buffer.register_buffer("weight", weight.detach())
    tied = nn.Linear(8, 20)
    embedding = nn.Embedding(20, 8)
    tied.weight = embedding.weight
    return nn.ModuleDict(
        {
            "fine": nn.Linear(8, 8),
            "subclass": _Plain(8, 8),
            "frozen": frozen,
            "integer": integer,
            "buffer": buffer,
            "embedding": embedding,
            "tied": tied,
            "own_forward": _OwnForward(8, 8),
            "normalised": parametrizations.weight_norm(nn.Linear(8, 8)),
            "spectral": nn.utils.spectral_norm(nn.Linear(8, 8)),
            "scalar": nn.Linear(1, 1),
            "empty": nn.Linear(8, 0),
            "lazy": nn.LazyLinear(8),
            "lm_head": nn.Linear(8, 20),
            "moe": _Mixture(),
            "hub": _HuggingFaceLike(),
            "convolution": nn.Conv2d(3, 3, 3),
        }
    )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_every_linear_has_a_row_a_status_and_a_reason() -> None:
    model = _ineligible()
    status = _status(prepare(model, CONFIG))
    assert set(status) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {n: reason for n, (kind, reason) in status.items() if kind == "skipped"} == {
        "frozen": "frozen by the user (requires_grad is False)",
        "integer": "dtype torch.int8 cannot be rotated",
        "buffer": "weight is no parameter",
        "tied": "tied: the weight belongs to embedding as well",
        "own_forward": "_OwnForward has a forward of its own",
        "normalised": "weight has another parametrization",
        "spectral": "weight is no parameter",
        "scalar": "shape [1, 1] has nothing to rotate",
        "empty": "shape [0, 8] has nothing to rotate",
        "lazy": "not initialised: run the model once, then call prepare",
        "lm_head": "excluded by name: lm_head",
        "moe.gate": "router of a mixture of experts",
        "moe.shared_expert_gate": "router of a mixture of experts",
        "moe.top.score": "router of a mixture of experts",
        "hub.logits": "output embedding (model.get_output_embeddings())",
    }
    prepared = {n for n, (kind, _) in status.items() if kind == "prepared"}
    assert prepared == {n for n, _, _ in prepared_linears(model)}
    assert prepared == {"fine", "subclass", "hub.body"} | {f"moe.experts.{i}.gate" for i in (0, 1)}


def test_a_sharded_or_quantised_weight_is_left_alone() -> None:
    class Wrapper(Tensor):
        """A wrapper subclass, as DTensor and quantised tensors are."""

        @staticmethod
        def __new__(cls, inner: Tensor) -> Wrapper:
            return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner: Tensor):
            self.inner = inner

        def __tensor_flatten__(self):
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(tensors, context, size, stride):
            return Wrapper(tensors["inner"])

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.detach.default:
                return Wrapper(args[0].inner)
            raise NotImplementedError(function)

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    model[1].weight = nn.Parameter(Wrapper(torch.zeros(8, 8)))
    reason = "weight is a Wrapper: prepare before quantising"
    assert _status(prepare(model, CONFIG))["1"] == ("skipped", reason)


def test_a_shared_module_is_prepared_once_and_stays_shared() -> None:
    model = Shared()
    status = _status(prepare(model, CONFIG))
    assert status["first"] == ("prepared", "")
    assert status["second"] == ("prepared", "shared: the same module as first")
    assert model.first is model.second
    assert len(list(prepared_linears(model))) == 1


def test_a_shared_module_is_excluded_under_any_of_its_names() -> None:
    model = Shared()
    model.lm_head = model.first
    model.other = nn.Linear(8, 8)
    assert _status(prepare(model, CONFIG))["first"] == ("skipped", "excluded by name: lm_head")


def test_weights_tied_between_linears_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    status = _status(prepare(model, CONFIG))
    assert status["0"] == ("skipped", "tied: the weight belongs to 1 as well")
    assert status["1"] == ("skipped", "tied: the weight belongs to 0 as well")
    assert model[0].weight is model[1].weight
    assert status["2"][0] == "prepared"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("all-linear", {"a.q_proj", "a.Q_proj", "a.my_q_proj", "b.up"}),
        (["q_proj"], {"a.q_proj"}),
        (["a.q_proj", "up"], {"a.q_proj", "b.up"}),
        (r"a\..*q_proj", {"a.q_proj", "a.my_q_proj"}),
        (r"b\.up", {"b.up"}),
    ],
)
def test_target_modules_match_whole_names(target, expected: set[str]) -> None:
    a = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q_proj", "Q_proj", "my_q_proj")})
    model = nn.ModuleDict({"a": a, "b": nn.ModuleDict({"up": nn.Linear(8, 8)})})
    status = _status(prepare(model, POETXConfig(block_size=4, target_modules=target)))
    assert {n for n, (kind, _) in status.items() if kind == "prepared"} == expected
    rest = {reason for kind, reason in status.values() if kind == "skipped"}
    assert rest <= {"not in target_modules"}


def test_names_are_the_users_where_parts_were_compiled_one_by_one() -> None:
    part = torch.compile(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("up", "down")}))
    model = nn.ModuleDict({"a": part, "b": torch.compile(nn.Linear(8, 8))})
    config = POETXConfig(block_size=4, target_modules=r"a\..*|b", exclude_modules=["a.down"])
    reasons = [reason for _, reason in _status(prepare(model, config)).values()]
    assert reasons == ["", "excluded by name: a.down", ""]


@pytest.mark.parametrize("target", ["gate", ["up", "gate"], r".*\.up"])
def test_a_pattern_that_matches_nothing_raises_and_changes_nothing(target) -> None:
    model = MLP()
    with pytest.raises(NothingToTrainError, match=r"matches no nn\.Linear; there are: up, down"):
        prepare(model, POETXConfig(block_size=4, target_modules=target))
    assert not list(prepared_linears(model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d(3, 3, 3), "the model has no nn.Linear: there is nothing to train"),
        (
            nn.Sequential(nn.Linear(1, 1)),
            r"is eligible: .*\n  0: shape \[1, 1\] has nothing to rot",
        ),
        (_OwnForward(8, 8), r"is eligible: .*\n  \(root\): _OwnForward has a forward of its own"),
    ],
)
def test_nothing_eligible_raises_with_every_reason(model: nn.Module, message: str) -> None:
    with pytest.raises(NothingToTrainError, match=message):
        prepare(model, CONFIG)


# Calling it again, on compiled models, on parts


def test_prepare_twice_changes_nothing_and_takes_in_what_is_new() -> None:
    model = MLP()
    prepare(model, CONFIG)
    turn(model)
    x = torch.randn(5, 12)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    status = _status(prepare(model))
    assert status["up"] == ("prepared", "already prepared; left over until the next redraw: 2 out")
    assert torch.equal(model(x), expected)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.extra = nn.Linear(12, 12)
    assert _status(prepare(model, CONFIG))["extra"] == ("prepared", "")
    groups = [e.perm_out.group for _, _, e in prepared_linears(model)]
    assert len(set(groups)) == len(groups)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("part", ["", "up"])
def test_another_configuration_raises_also_where_a_part_is_prepared(part: str) -> None:
    model = MLP()
    prepare(model.get_submodule(part), CONFIG)
    with pytest.raises(ConfigError, match=r"differs in block_size, seed\): merge_and_unload"):
        prepare(model, POETXConfig(block_size=8, seed=1))
    assert config_of(model) == CONFIG
    assert config_of(model.up) == CONFIG


@pytest.mark.parametrize("make", [MLP, lambda: nn.Linear(12, 6)])
def test_prepare_and_unload_reach_through_a_compiled_model(make) -> None:
    model = make()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(5, 12)
    expected = compiled(x)
    prepare(compiled, CONFIG)
    assert list(prepared_linears(model))
    assert torch.equal(compiled(x), expected)
    turn(model)
    turned = model(x)
    assert torch.equal(compiled(x), turned)
    assert not torch.equal(turned, expected)
    assert merge_and_unload(compiled) is compiled
    assert not list(prepared_linears(model))
    assert_close(compiled(x), turned)


def test_a_prepared_model_compiles_without_a_graph_break() -> None:
    model, x = TinyLM(), _tokens(torch.float32)
    prepare(model, CONFIG)
    turn(model)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


# The way back


@zoo
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unload_gives_the_original_model_back(name: str, dtype) -> None:
    model, x = _make(name, dtype)
    reference = copy.deepcopy(model)
    prepare(model, CONFIG)
    assert merge_and_unload(model) is model
    _assert_same_structure(model, reference)
    assert torch.equal(model(x), reference(x))
    for actual, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(actual, expected)


@zoo
@pytest.mark.parametrize(
    ("dtype", "cayley"),
    [(torch.float32, "neumann"), (torch.float32, "exact"), (torch.bfloat16, "neumann")],
)
def test_merge_and_unload_keeps_the_outputs_of_rotated_layers(name, dtype, cayley) -> None:
    model, x = _make(name, dtype)
    original, reference = model(x), copy.deepcopy(model)
    prepare(model, POETXConfig(block_size=4, cayley=cayley))
    turn(model, angle=0.3)
    rotated = model(x)
    assert not torch.allclose(rotated, original, rtol=0, atol=1e-2)
    merge_and_unload(model)
    _assert_same_structure(model, reference)
    assert torch.equal(model(x), rotated)


def _assert_same_structure(model: nn.Module, reference: nn.Module) -> None:
    for actual, expected in zip(model.modules(), reference.modules(), strict=True):
        assert type(actual) is type(expected)
    names = [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
    assert names == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in reference.named_parameters()
    ]
    assert list(model.state_dict()) == list(reference.state_dict())
    assert all(p.is_contiguous() for p in model.parameters())
    assert config_of(model) is None


def test_an_exported_model_needs_nothing_of_this_package() -> None:
    model, x = _make("language_model")
    prepare(model, CONFIG)
    turn(model)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(merge_and_unload(model).state_dict(), buffer)
    buffer.seek(0)
    plain = TinyLM()
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(plain(x), expected)


def test_merge_and_unload_keeps_the_parameter_objects() -> None:
    model = MLP()
    before = list(model.parameters())
    prepare(model, CONFIG)
    turn(model)
    merge_and_unload(model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]


def test_a_plain_model_is_returned_as_it_is() -> None:
    model = MLP()
    before = copy.deepcopy(model.state_dict())
    assert merge_and_unload(model) is model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_prepare_after_unload_may_have_another_configuration() -> None:
    model, x = MLP(), torch.randn(5, 12)
    prepare(model, CONFIG)
    turn(model)
    expected = model(x)
    prepare(merge_and_unload(model), POETXConfig(block_size=8, seed=4))
    assert torch.equal(model(x), expected)


# The report


def test_the_report_counts_parameters() -> None:
    model = SwiGLU()
    plain = sum(p.numel() for p in model.parameters())
    report = prepare(model, CONFIG)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == plain == prepare(model).total
    assert len(report) == len(list(report)) == 3


class _Experts(nn.Module):
    """The experts of a mixture in one tensor each, as Hugging Face has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 20, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 10))
        self.bias = nn.Parameter(torch.zeros(8))


class _Linear4bit(nn.Linear):
    """A quantised layer in the manner of bitsandbytes: packed bytes, a forward of its own."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        packed = torch.zeros(in_features * out_features // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _PackedLinear(nn.Module):
    """A quantised layer in the manner of GPTQ: buffers, and no `nn.Linear`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.zeros(in_features // 8, out_features).int())


def test_a_model_of_all_kinds_of_weights_lists_each_with_a_reason() -> None:
    """Odd sizes, a tied head, convolutions, 3-D experts and 4-bit layers."""
    embedding = nn.Embedding(24, 8)
    model = nn.ModuleDict(
        {
            "embedding": embedding,
            "positions": nn.Embedding(9, 8).requires_grad_(False),
            "patches": nn.Conv2d(3, 8, 2),
            "odd": nn.ModuleList([nn.Linear(7, 13), nn.Linear(13, 1), nn.Linear(5, 1, bias=False)]),
            "attention": SelfAttention(),
            "experts": _Experts(),
            "adapter": _Linear4bit(8, 8),
            "packed": _PackedLinear(8, 16),
            "norm": nn.LayerNorm(8),
            "lm_head": nn.Linear(8, 24, bias=False),
        }
    )
    model.lm_head.weight = embedding.weight
    assert_expected_inline(
        prepare(model, POETXConfig(block_size=4, exclude_modules=())).text(verbose=True),
        """\
11.9 % of 2,131 parameters (4 of 6 nn.Linear) train by rotations
trainable: 1,858 = 84 of rotations + 1,774 dense
layer                     shape    blocks in|out  status    reason
------------------------  -------  -------------  --------  ------------------------------------------------------------------------
embedding.weight          24x8     -              dense     embedding
positions.weight          9x8      -              frozen    embedding
patches.weight            8x3x2x2  -              dense     Conv2d is no nn.Linear (4 dimensions)
odd.0                     13x7     1x4 | 3x4      prepared  left over until the next redraw: 3 in, 1 out
odd.1                     1x13     3x4 | 0x1      prepared  out side of size 1 is not rotated; left over until the next redraw: 1 in
odd.2                     1x5      1x4 | 0x1      prepared  out side of size 1 is not rotated; left over until the next redraw: 1 in
attention.in_proj_weight  36x12    -              dense     SelfAttention is no nn.Linear
attention.out_proj        12x12    3x4 | 3x4      prepared
experts.gate_up_proj      4x20x8   -              dense     _Experts is no nn.Linear (3 dimensions)
experts.down_proj         4x8x10   -              dense     _Experts is no nn.Linear (3 dimensions)
adapter                   8x8      -              skipped   _Linear4bit has a forward of its own
packed                    16x8     -              frozen    _PackedLinear is no nn.Linear
lm_head                   24x8     -              skipped   tied: the weight belongs to embedding as well""",  # noqa: E501
    )
    parameters = {n for n, p in model.named_parameters() if p.dim() >= 2 and "param" not in n}
    listed = {row.name for row in prepare(model)}
    assert parameters - {"adapter.weight"} <= listed


def test_the_report_prints_as_a_table() -> None:
    model = nn.ModuleDict({"odd": OddZoo(), "attention": SelfAttention(), "lm_head": MLP()})
    model.lm_head = nn.Linear(8, 24)
    assert_expected_inline(
        str(prepare(model, CONFIG)),
        """\
38.8 % of 1,183 parameters (8 of 9 nn.Linear) train by rotations
trainable: 876 = 152 of rotations + 724 dense
layer                     shape  blocks in|out, or why not
odd.chain.0               13x7   1x4 | 3x4; left over until the next redraw: 3
                                 in, 1 out
odd.chain.1               1x13   3x4 | 0x1; out side of size 1 is not rotated;
                                 left over until the next redraw: 1 in
odd.chain.2               5x1    0x1 | 1x4; in side of size 1 is not rotated;
                                 left over until the next redraw: 1 out
odd.chain.3               2x5    1x4 | 1x2; left over until the next redraw: 1
                                 in
odd.chain.4               3x2    1x2 | 1x3
odd.chain.5               19x3   1x3 | 4x4; left over until the next redraw: 3
                                 out
odd.chain.6               7x19   4x4 | 1x4; left over until the next redraw: 3
                                 in, 3 out
attention.in_proj_weight  36x12  SelfAttention is no nn.Linear
attention.out_proj        12x12  3x4 | 3x4
lm_head                   24x8   excluded by name: lm_head""",
    )


@pytest.mark.parametrize("call", [prepare, poetx.POETXAdamW, poetx.POETXMuon, merge_and_unload])
@pytest.mark.parametrize("wrong", [[nn.ReLU()], iter([torch.zeros(2)]), torch.relu, None])
def test_what_is_no_model_is_named(call: Callable, wrong: object) -> None:
    with pytest.raises(ConfigError, match=f"a {type(wrong).__name__} is no model"):
        call(wrong)


@pytest.mark.parametrize("call", [prepare, poetx.POETXMuon])
def test_a_configuration_is_a_poetxconfig(call: Callable) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="is no POETXConfig"):
        call(model, config={"block_size": 4})
    assert type(model) is nn.Linear


def test_a_weight_with_an_optimiser_step_in_its_backward_is_skipped_with_the_reason() -> None:
    model = MLP()
    model.up.weight.register_post_accumulate_grad_hook(lambda p: None)
    report = prepare(model, POETXConfig(block_size=4))
    assert [row.name for row in report if "post-accumulate" in row.reason] == ["up"]
    assert type(model.up) is nn.Linear
