"""`load_state_dict` of prepared models: exact, as a whole, refused before anything is written."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError, IncompatibleStateError, InterruptedMergeError
from poetx_compile.layers.prepare import merge_and_unload, prepare
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.optim import POETXAdamW
from poetx_compile.optim.angle import AngleGuard
from poetx_compile.optim.merge import merge
from poetx_compile.state.plain import plain_state_dict
from tests.helpers.models import MLP, OddZoo, SwiGLU, TinyLM
from tests.helpers.rotations import trained, turn
from tests.helpers.tolerances import assert_close

CONFIG = POETXConfig(block_size=4)
TOKENS = torch.arange(12).reshape(2, 6)
PARTS = ("attention_norm", "mlp_norm", "mlp")
RESIDUAL = ("layers.*.attention.q_proj.in", "layers.*.mlp.down_proj.out")


def tiny(width: int = 16) -> TinyLM:
    return TinyLM(width=width, layers=1)


def prepared(model: nn.Module, **config) -> nn.Module:
    prepare(model, POETXConfig(**({"block_size": 4} | config)))
    return model


def snapshot(model: nn.Module) -> list[Tensor]:
    """Every tensor of a model: parameters, and buffers whether they are saved or not."""
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def assert_unchanged(model: nn.Module, before: list[Tensor]) -> None:
    assert all(map(torch.equal, snapshot(model), before))
    assert not any(e.interrupted for _, _, e in prepared_linears(model))


# The state of a prepared model


@pytest.mark.parametrize("make", [MLP, SwiGLU, OddZoo])
def test_the_layout_of_a_checkpoint_wins_over_the_models_seed(make) -> None:
    saved = prepared(make(), seed=1)
    turn(saved)
    loaded = prepared(make(), seed=2)
    width = {MLP: 12, SwiGLU: 16, OddZoo: 7}[make]
    x = torch.randn(5, width)
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(loaded(x), saved(x))
    for (_, _, a), (_, _, b) in zip(prepared_linears(saved), prepared_linears(loaded), strict=True):
        assert torch.equal(a.perm_in.pair, b.perm_in.pair)
        assert torch.equal(a.perm_out.pair, b.perm_out.pair)
        assert (b.seed, b.draw) == (1, 1)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["random", "chunked"])
def test_a_state_saved_after_merges_is_taken_over_exactly(assign: bool, kind: str) -> None:
    saved = trained(tiny(), block_size=8, permutation=kind)
    loaded = prepared(tiny(), block_size=8, permutation=kind, seed=5)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()), assign=assign)
    assert torch.equal(loaded(TOKENS), saved(TOKENS))
    assert {e.draw for _, _, e in prepared_linears(loaded)} == {3}
    for model in (saved, loaded):
        merge(model, redraw=True)
    assert torch.equal(loaded(TOKENS), saved(TOKENS))
    for one, other in zip(loaded.state_dict().values(), saved.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("through", ["compiled", "part", "parent"])
def test_it_is_checked_and_loaded_through_wrappers_and_parts(through: str) -> None:
    saved, loaded = trained(tiny()), prepared(tiny())
    outer, source = loaded, saved
    if through == "compiled":
        outer, source = (torch.compile(m, backend="eager") for m in (loaded, saved))
    elif through == "parent":
        outer, source = nn.ModuleDict({"m": loaded}), nn.ModuleDict({"m": saved})
    elif through == "part":  # each of these is closed: nothing outside shares its permutations
        for name in ("embedding", "norm", "lm_head", *(f"layers.0.{p}" for p in PARTS)):
            loaded.get_submodule(name).load_state_dict(saved.get_submodule(name).state_dict())
        outer, source = loaded.layers[0].attention, saved.layers[0].attention
    outer.load_state_dict(source.state_dict())
    assert torch.equal(loaded(TOKENS), saved(TOKENS))


def test_a_shared_module_is_loaded_under_both_names() -> None:
    def shared() -> nn.Module:
        linear = nn.Linear(12, 12)
        return nn.Sequential(linear, nn.Tanh(), linear)

    saved, loaded, plain = trained(shared()), prepared(shared()), shared()
    x = torch.randn(3, 12)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(x), saved(x))
    loaded.load_state_dict(plain.state_dict())
    assert torch.equal(loaded(x), plain(x))


# What does not fit: refused with the reason, and nothing is written


def _without(state: dict[str, Tensor], *endings: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.endswith(endings)}


REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "block size": (
        lambda: trained(tiny(), block_size=8).state_dict(),
        r"layers\.0\.attention\.q_proj: block_size \(8, 8\) was saved, the model has \(4, 4\).*"
        r"poetx\.plain_state_dict\(state\)",
    ),
    "order": (
        lambda: trained(tiny(), neumann_order=4).state_dict(),
        "neumann_order 4 was saved, the model has 3",
    ),
    "exact": (
        lambda: trained(tiny(), cayley="exact").state_dict(),
        r"neumann_order none \(cayley='exact'\) was saved",
    ),
    "kind": (
        lambda: trained(tiny(), permutation="random").state_dict(),
        "permutation random was saved, the model has chunked",
    ),
    "size of the vocabulary does not matter, that of a layer does": (
        lambda: trained(tiny(width=32)).state_dict(),
        r"q_proj\.parametrizations\.weight\.original: size mismatch: \[32, 32\] was saved",
    ),
    "a layer without its rotations": (
        lambda: _without(trained(tiny()).state_dict(), "0.mlp.up_proj.parametrizations.weight.0.skew_in"),  # noqa: E501
        r"layers\.0\.mlp\.up_proj: the state has .*original and not .*skew_in",
    ),
    "a part that shares": (
        lambda: {
            k: v for k, v in trained(tiny()).state_dict().items() if "0.attention.k_proj" not in k
        },
        r"layers\.0\.attention\.q_proj was saved at another draw .*layers\.0\.attention\.k_proj "
        "sharing it would keep a weight in the old order",
    ),
    "layers of two moments": (
        lambda: trained(tiny()).state_dict()
        | {
            k: v
            for k, v in trained(tiny(), merges=1).state_dict().items()
            if "0.attention.k_proj" in k
        },
        r"q_proj and layers\.0\.attention\.k_proj share a permutation and were saved at different",
    ),
    "plain weights of another size": (
        lambda: tiny(width=32).state_dict(),
        r"layers\.0\.attention\.q_proj\.weight: size mismatch: \[32, 32\] for a weight of \[16, 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(case: str) -> None:
    make, message = REFUSED[case]
    state, model = make(), trained(tiny(), merges=1)
    before = snapshot(model)
    with pytest.raises(IncompatibleStateError, match=f"(?s)nothing has been loaded.*{message}"):
        model.load_state_dict(state, strict=False)  # it is no matter of missing keys
    assert_unchanged(model, before)


def test_other_groups_are_refused() -> None:
    saved, loaded = prepared(SwiGLU()), SwiGLU()
    prepare(loaded.down_proj, CONFIG)
    prepare(loaded, CONFIG)  # down first: it took the groups that gate and up have in the other
    before = snapshot(loaded)
    with pytest.raises(RuntimeError, match=r"permutation groups \(0, 1\) was saved.*same `shared`"):
        loaded.load_state_dict(saved.state_dict())
    assert_unchanged(loaded, before)


def test_another_format_is_a_clear_error() -> None:
    linear = prepared(nn.Linear(11, 7))
    state = linear.state_dict()
    state["parametrizations.weight.0.layout"] = torch.tensor([1, 0, 1, 0, 1, 0, 3])
    with pytest.raises(RuntimeError, match="has format 1, this version of poetx_compile reads 3"):
        linear.load_state_dict(state)


def test_a_part_at_the_models_own_draw_is_loaded() -> None:
    saved, loaded = trained(tiny(), merges=1), trained(tiny(), merges=1)
    part = loaded.layers[0].attention.q_proj
    part.load_state_dict(saved.layers[0].attention.q_proj.state_dict())
    assert torch.equal(part.weight, saved.layers[0].attention.q_proj.weight)


def test_a_part_at_another_draw_is_refused_where_others_share() -> None:
    saved, loaded = trained(tiny()), prepared(tiny())
    before = snapshot(loaded)
    part, state = loaded.layers[0].attention.q_proj, saved.layers[0].attention.q_proj.state_dict()
    with pytest.raises(IncompatibleStateError, match=r"and 3 layer\(s\) sharing it would keep"):
        part.load_state_dict(state)
    assert_unchanged(loaded, before)
    part.load_state_dict(plain_state_dict(state))  # the way out that the message names
    assert torch.equal(part.weight, saved.layers[0].attention.q_proj.weight)


def test_merging_a_part_is_refused_where_others_share_its_permutations() -> None:
    model = TinyLM()
    prepare(model, CONFIG, shared=[RESIDUAL])
    turn(model)
    before = snapshot(model)
    for part in (model.layers[0], model.layers[0].mlp.down_proj):
        with pytest.raises(ConfigError, match="a merge of one is a merge of all"):
            merge(part, redraw=True)
        with pytest.raises(ConfigError, match="a merge of one is a merge of all"):
            POETXAdamW(part)
    assert_unchanged(model, before)
    closed = model.layers[0].mlp.gate_proj, model.layers[0].mlp.up_proj
    merge(nn.ModuleList(closed), redraw=True)
    assert {equivalence_of(linear).draw for linear in closed} == {2}


def test_what_was_unloaded_or_copied_shares_nothing_any_more() -> None:
    model = prepared(SwiGLU())
    optimizer = POETXAdamW(model)  # still holds the state of the layer that is unloaded
    merge_and_unload(model.gate_proj)
    merge(model, redraw=True)
    assert equivalence_of(model.up_proj).draw == 2
    merge(copy.deepcopy(model.up_proj), redraw=True)
    assert equivalence_of(model.up_proj).draw == 2
    assert optimizer.schedule.merges == 0


def test_a_load_that_is_cut_off_is_refused_until_it_is_repeated(monkeypatch) -> None:
    saved, loaded = trained(tiny()), prepared(tiny())
    down = loaded.layers[0].mlp.down_proj.parametrizations["weight"]
    with monkeypatch.context() as patch:
        patch.setattr(down, "_load_from_state_dict", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loaded.load_state_dict(saved.state_dict())
    with pytest.raises(InterruptedMergeError, match="a merge or a load was cut off"):
        loaded(TOKENS)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(TOKENS), saved(TOKENS))


# Plain weights into a prepared model


@pytest.mark.parametrize(("assign", "strict"), [(False, True), (True, True), (False, False)])
def test_plain_weights_are_stored_permuted_and_rotations_start_again(assign, strict) -> None:
    plain, model = tiny(), trained(tiny())
    result = model.load_state_dict(copy.deepcopy(plain.state_dict()), strict=strict, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(model(TOKENS), plain(TOKENS))
    for name, linear, e in prepared_linears(model):
        assert not e.skew_in.any()
        assert not e.skew_out.any()
        assert (e.skew_in.requires_grad, stored_weight(linear).requires_grad) == (True, False)
        assert e.draw == 3
        weight = plain.get_submodule(name).weight
        assert torch.equal(stored_weight(linear), e.stored_form(weight))
        assert not torch.equal(stored_weight(linear), weight)
    turn(model)
    before = model(TOKENS)
    merge(model, redraw=True)
    # 7 layers, each within the bound of one merge.
    assert (model(TOKENS) - before).norm() <= 7e-3 * before.norm()


def test_plain_weights_leave_the_optimisers_state_and_parameters() -> None:
    model = prepared(MLP())
    optimizer = POETXAdamW(model, lr=1e-3, poetx_lr=1e-3)
    x = torch.randn(8, 12)

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = copy.deepcopy(optimizer.state_dict())
    model.load_state_dict(MLP().state_dict())
    for index, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, state["state"][index][k]) for k, v in values.items())
    groups = zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
    for now, then in groups:  # the guard measures other rotations from here on
        changed = {key for key in now if now[key] != then[key]}
        assert changed <= AngleGuard.fresh().keys()
    step()
    assert equivalence_of(model.up).skew_in.any()


def test_some_plain_weights_are_enough_where_not_strict() -> None:
    plain, model = MLP(), trained(MLP())
    expected = model.down.weight.detach().clone()
    result = model.load_state_dict({"up.weight": plain.up.weight, "else": 1}, strict=False)
    assert result.unexpected_keys == ["else"]
    assert torch.equal(model.up.weight, plain.up.weight)
    assert torch.equal(model.down.weight, expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*down\.parametrizations"):
        model.load_state_dict({"up.weight": plain.up.weight})


def test_narrow_plain_weights_are_cast_or_assigned() -> None:
    plain, copied, assigned = MLP().bfloat16(), prepared(MLP()), prepared(MLP())
    copied.load_state_dict(plain.state_dict())
    assert copied.up.weight.dtype == torch.float32
    assert torch.equal(copied.up.weight, plain.up.weight.float())
    assigned.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(assigned.up.weight, plain.up.weight)
    assert equivalence_of(assigned.up).skew_in.dtype == torch.float32


@pytest.mark.parametrize("config", [{"block_size": 8}, {"permutation": "random"}, {"seed": 9}])
def test_a_checkpoint_moves_to_another_configuration_through_plain_weights(config) -> None:
    saved, loaded = trained(tiny()), prepared(tiny(), **config)
    loaded.load_state_dict(plain_state_dict(saved.state_dict()))
    assert torch.equal(loaded(TOKENS), saved(TOKENS))


# Models without values


@pytest.mark.parametrize("kind", ["random", "chunked"])
@pytest.mark.parametrize("state", ["its own", "plain"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_model_prepared_on_meta_is_the_model_prepared_after(kind, state, assign) -> None:
    """Permutations do not depend on the weights: they can be drawn before there are any."""
    source = tiny()
    plain = copy.deepcopy(source.state_dict())
    prepared(source, block_size=8, permutation=kind)
    if state == "its own":
        turn(source)
        merge(source, redraw=True)
        turn(source)
    with torch.device("meta"):
        model = tiny()
    prepared(model, block_size=8, permutation=kind)
    assert all(p.is_meta for p in model.parameters())
    if not assign:
        model.to_empty(device="cpu")
    own = copy.deepcopy(source.state_dict())
    model.load_state_dict(own if state == "its own" else plain, assign=assign)
    assert torch.equal(model(TOKENS), source(TOKENS))
    for model_ in (model, source):
        merge(model_, redraw=True)
    for one, other in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_model_prepared_on_meta_is_initialised_as_a_plain_one() -> None:
    def initialise(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        return model

    with torch.device("meta"):
        model = tiny()
    prepared(model)
    model.to_empty(device="cpu")
    expected = initialise(tiny())(TOKENS)
    assert torch.equal(initialise(model)(TOKENS), expected)
    assert not any(e.skew_in.any() or e.skew_out.any() for _, _, e in prepared_linears(model))
    assert_close(merge_and_unload(model)(TOKENS), expected)


def test_a_model_without_storage_can_be_loaded() -> None:
    saved = prepared(SwiGLU())
    turn(saved)
    loaded = copy.deepcopy(saved).to("meta").to_empty(device="cpu")
    loaded.load_state_dict(saved.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(loaded(x), saved(x))


# Traces


def test_an_unloaded_model_keeps_no_trace_of_the_checks() -> None:
    model = copy.deepcopy(prepared(tiny()))
    assert model._load_state_dict_pre_hooks
    merge_and_unload(model)
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"poetx" not in buffer.getvalue()
