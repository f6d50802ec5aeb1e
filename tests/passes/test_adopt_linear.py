"""`adopt_linear`: a model nobody prepared, through the compiler alone."""

from __future__ import annotations

import copy

import expecttest
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.errors import AdoptionError, ConfigError, UnownedRotationsError
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight
from poetx_compile.layers.registry import registry
from poetx_compile.passes.adopt_linear import AdoptLinear
from tests.helpers.graph_of import after, explained
from tests.helpers.models import MLP, Attention, Block, SwiGLU, TinyLM
from tests.helpers.tolerances import assert_close

OPTIONS = {"stage": "eager", "block_size": 8, "verify_passes": True}
AOT = {"stage": "aot_eager"}


def compiled(model: nn.Module, **options):
    return torch.compile(
        model, backend=poetx.poetx_backend, fullgraph=True, options={**OPTIONS, **options}
    )


def states(model: nn.Module) -> dict[str, OrthogonalEquivalence]:
    """The adopted states by name, in the registry still or in their modules."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {n: equivalence_of(m) or registry.adopted.get(m.weight) for n, m in linears.items()}
    return {n: s for n, s in found.items() if s is not None and s.adopted}


def waiting(model: nn.Module) -> set[str]:
    """The names of those that are in no module yet."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {n for n, m in linears.items() if registry.adopted.get(m.weight) is not None}


class TestGolden(expecttest.TestCase):
    def test_plain_mlp(self):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

            def forward(self, x):
                return self.a(x) * self.b(x)

        graph = after(
            Pair(), torch.randn(3, 8), block_size=8, disable_passes=["batch_cayley", "recompute"]
        )
        self.assertExpectedInline(
            graph,
            """\
a.weight: f32[8, 8]
x: f32[3, 8]
b.weight: f32[8, 8]
b.bias: f32[8]
a.skew_in: f32[1, 28]
a.skew_out: f32[1, 28]
a.perm_in: i64[2, 4]
a.perm_out: i64[2, 4]
b.skew_in: f32[1, 28]
b.skew_out: f32[1, 28]
b.perm_out: i64[2, 4]
%1: f32[8, 8] = .detach(a.weight)
%2: f32[1, 8, 8] = poetx.cayley_neumann(a.skew_in, 8, 3)
%3: f32[1, 8, 8] = poetx.cayley_neumann(a.skew_out, 8, 3)
%4: f32[3, 8] = poetx.permute_columns(x, a.perm_in)
%5: f32[3, 8] = poetx.rotate_blocks(%4, %2, None, None, False)
%6: f32[3, 8] = linear(%5, %1, None)
%7: f32[3, 8] = poetx.rotate_blocks(%6, %3, None, a.perm_out, False)
%8: f32[8, 8] = .detach(b.weight)
%9: f32[1, 8, 8] = poetx.cayley_neumann(b.skew_in, 8, 3)
%10: f32[1, 8, 8] = poetx.cayley_neumann(b.skew_out, 8, 3)
%11: f32[3, 8] = poetx.rotate_blocks(%4, %9, None, None, False)
%12: f32[3, 8] = linear(%11, %8, None)
%13: f32[3, 8] = poetx.rotate_blocks(%12, %10, None, b.perm_out, False)
%14: f32[8] = .type_as(b.bias, %13)
%15: f32[3, 8] = add(%13, %14)
%16: f32[3, 8] = mul(%7, %15)
return (%16)
""",
        )


@pytest.mark.parametrize("make", [MLP, SwiGLU, Attention, Block])
@pytest.mark.parametrize("variant", ["fast", "mem"])
def test_outputs_equal_the_plain_model_and_only_rotations_get_gradients(make, variant):
    model = make().double()
    plain = copy.deepcopy(model)
    width = 12 if make is MLP else 16
    x = torch.randn(2, 5, width, dtype=torch.float64)
    y = compiled(model, variant=variant, **AOT)(x)
    assert_close(y, plain(x))
    weights = torch.randn(y.shape, dtype=torch.float64)  # Σy² would not change under a rotation
    (y * weights).sum().backward()
    adopted = states(model)
    assert len(adopted) == sum(isinstance(m, nn.Linear) for m in model.modules())
    for name, state in adopted.items():
        assert stored_weight(model.get_submodule(name)).grad is None
        assert state.skew_in.grad.norm() > 0
        assert state.skew_out.grad.norm() > 0
    (plain(x) * weights).sum().backward()
    parameters = dict(model.named_parameters())
    for name, p in plain.named_parameters():
        if "norm" in name or "bias" in name:
            assert_close(parameters[name].grad, p.grad, what=name)


def test_checkpointed_body_is_adopted():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = SwiGLU(), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(checkpoint(self.inner, x, use_reentrant=False))

    model = Checkpointed().double()
    expected = model(torch.ones(3, 16).double())
    y = compiled(model, **AOT)(torch.ones(3, 16).double())
    assert_close(y, expected)
    y.sum().backward()
    assert set(states(model)) == {"inner.gate_proj", "inner.up_proj", "inner.down_proj", "head"}
    assert all(s.skew_in.grad.norm() > 0 for s in states(model).values())
    gate, up = states(model)["inner.gate_proj"], states(model)["inner.up_proj"]
    assert gate.perm_in is up.perm_in, "layers fed by one tensor share a permutation"


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    from poetx_compile.compile import backend

    rewrite = backend.rewrite

    def counting(*args, **kwargs):
        calls.append(1)
        return rewrite(*args, **kwargs)

    monkeypatch.setattr(backend, "rewrite", counting)
    return calls


def test_two_instances_reuse_the_code_and_have_states_of_their_own(monkeypatch):
    calls = count_compilations(monkeypatch)
    first, second = SwiGLU().double(), SwiGLU().double()
    x = torch.randn(3, 16).double()
    for model in (first, second):
        expected = model(x)
        y = compiled(model)(x)
        assert_close(y, expected)
        y.sum().backward()
    a, b = states(first), states(second)
    assert len(a) == len(b) == 3
    assert not {id(s) for s in a.values()} & {id(s) for s in b.values()}
    assert all(s.skew_in.grad.norm() > 0 for s in (*a.values(), *b.values()))
    assert len(calls) == 1


def test_no_grad_new_shapes_and_recompilation_share_one_state():
    model = SwiGLU().double()
    run = compiled(model)
    with torch.no_grad():
        run(torch.randn(3, 16).double())
    before = {n: id(s) for n, s in states(model).items()}
    assert before == {}, "nothing to adopt where nothing trains"
    run(torch.randn(3, 16).double())
    before = {n: id(s) for n, s in states(model).items()}
    for shape in ((3, 16), (5, 16), (2, 7, 16)):
        run(torch.randn(shape).double())
    torch._dynamo.reset()
    compiled(model)(torch.randn(3, 16).double())
    assert len(before) == 3
    assert before == {n: id(s) for n, s in states(model).items()}


def test_a_tied_weight_is_left_alone_and_trains_densely():
    model = TinyLM(layers=1, tied=True)
    explanation = explained(model, torch.arange(6)[None], block_size=8, exclude_modules=[])
    head = next(r for r in explanation.rows if r.name == "lm_head")
    assert head.status == "skipped"
    assert "tied" in head.reason
    loss = compiled(model, exclude_modules=[])(torch.arange(6)[None]).sum()
    loss.backward()
    assert "lm_head" not in states(model)
    assert model.lm_head.weight.grad.norm() > 0


def test_excluded_and_frozen_layers_are_left_alone():
    model = SwiGLU()
    model.up_proj.weight.requires_grad_(False)
    run = compiled(model, exclude_modules=["gate_proj"])
    run(torch.randn(3, 16)).sum().backward()
    assert set(states(model)) == {"down_proj"}
    assert model.gate_proj.weight.grad is not None
    model = SwiGLU()
    model.up_proj.weight.requires_grad_(False)
    torch._dynamo.reset()
    reasons = {
        r.name: r.reason
        for r in explained(model, torch.randn(3, 16), exclude_modules=["gate_proj"]).rows
    }
    assert "excluded by name" in reasons["gate_proj"]
    assert "frozen" in reasons["up_proj"]


def test_a_copy_made_before_the_first_backward_starts_from_fresh_state():
    model = MLP()
    compiled(model)(torch.randn(3, 12))
    assert len(waiting(model)) == 2
    assert states(copy.deepcopy(model)) == {}


def test_state_dies_with_its_weight():
    import gc

    model = MLP()
    compiled(model)(torch.randn(3, 12))
    before = len(registry.adopted)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(registry.adopted) <= before - 2


def test_the_layers_that_prepare_left_alone_are_not_adopted():
    model = SwiGLU()
    poetx.prepare(model, poetx.POETXConfig(block_size=8, exclude_modules=["down_proj"]))

    class HeadOnly(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    compiled(HeadOnly(model.down_proj))(torch.randn(3, 40)).sum().backward()
    assert registry.adopted.get(model.down_proj.weight) is None
    assert model.down_proj.weight.grad is not None


def test_reused_code_meets_a_weight_that_prepare_left_alone(monkeypatch):
    calls = count_compilations(monkeypatch)
    layers = [MLP(), MLP()]
    for layer in layers:
        layer.compile(backend=poetx.poetx_backend, fullgraph=True, options=OPTIONS)
    layers[0](torch.randn(2, 12))
    registry.decline(layers[1].up, "for the test")
    with pytest.raises(AdoptionError, match=r"poetx_compile\.prepare on every instance"):
        layers[1](torch.randn(2, 12))
    assert len(calls) == 1, "the second instance reused the code of the first"


def test_prepare_moves_adopted_state_into_the_model():
    model = SwiGLU()
    x = torch.randn(3, 16)
    run = compiled(model)
    expected = run(x)
    skews = {n: s.skew_in for n, s in states(model).items()}
    assert waiting(model) == set(skews)
    poetx.prepare(model)
    assert waiting(model) == set()
    for name, _, equivalence in prepared_linears(model):
        assert equivalence.skew_in is skews[name]
        assert equivalence.config.block_size == 8, "the options' configuration"
        assert equivalence.draw == 0
    assert torch.equal(
        model.gate_proj.parametrizations.weight[0].layout[2:3], torch.zeros(1).long()
    )
    expected.square().sum().backward()
    assert all(skew.grad is not None for skew in skews.values())
    assert_close(run(x), expected)
    assert_close(model(x), expected)
    keys = model.state_dict()
    assert "gate_proj.parametrizations.weight.0.skew_in" in keys


def test_prepare_with_another_configuration_after_gradients_is_refused():
    model = SwiGLU()
    compiled(model)(torch.randn(3, 16)).sum().backward()
    with pytest.raises(ConfigError, match=r"differs in block_size\).*torch.compile\(options="):
        poetx.prepare(model, poetx.POETXConfig(block_size=4))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("optimiser", ["POETXAdamW", "POETXMuon"])
def test_an_optimiser_built_before_or_after_the_first_call_trains_it(when, optimiser):
    torch.manual_seed(3)
    model, teacher = SwiGLU(), SwiGLU()
    run = compiled(model)
    x = torch.randn(64, 16)
    target = teacher(x).detach()

    def build():
        config = poetx.POETXConfig(block_size=8)
        return getattr(poetx, optimiser)(model, lr=2e-3, config=config)

    optimizer = build() if when == "before" else None
    losses = []
    for _ in range(12):
        loss = (run(x) - target).square().mean()
        loss.backward()
        optimizer = optimizer or build()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(equivalence_of(m) is not None for m in model.children())
    assert waiting(model) == set()


def test_unowned_rotations_raise_at_the_second_optimiser_step():
    model = MLP()
    run = compiled(model)
    optimizer = torch.optim.SGD([model.up.bias, model.down.bias], lr=1e-3)

    def step():
        run(torch.randn(3, 12)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with pytest.raises(UnownedRotationsError, match=r"2 adopted layer.*POETXAdamW"):
        step()


def test_a_shared_module_that_was_adopted_moves_without_a_warning(caplog):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(12, 12)
            self.again = self.first

        def forward(self, x):
            return self.again(torch.tanh(self.first(x)))

    model = Shared()
    compiled(model)(torch.randn(3, 12)).sum().backward()
    assert equivalence_of(model.first).skew_in.grad.norm() > 0
    assert set(states(model)) == {"first"}
    report = poetx.prepare(model)
    assert [row.reason.split(":")[0] for row in report][1] == "shared"
    assert not [r for r in caplog.records if r.name == "poetx_compile"]


def test_an_unloaded_model_is_a_plain_one_for_the_compiler_too():
    model = MLP()
    run = compiled(model)
    optimizer = poetx.POETXAdamW(model, lr=1e-3, config=poetx.POETXConfig(block_size=8))
    run(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    x = torch.randn(3, 12)
    expected = run(x)
    poetx.merge_and_unload(model)
    assert_close(run(x), expected)
    run(x).sum().backward()
    assert states(model) == {}
    assert model.up.weight.grad is not None
    poetx.prepare(model)
    assert all(equivalence_of(m) is not None for m in (model.up, model.down))


def test_adoption_can_be_switched_off():
    model = MLP()
    compiled(model, disable_passes=["adopt_linear"])(torch.randn(3, 12)).sum().backward()
    assert states(model) == {}
    assert model.up.weight.grad is not None


class NestedCheckpoints(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def inner(self, x):
        return torch.tanh(self.b(x))

    def outer(self, x):
        x = checkpoint(self.inner, torch.tanh(self.a(x)), use_reentrant=False)
        return self.c(checkpoint(self.inner, x, use_reentrant=False))

    def forward(self, x):
        return checkpoint(self.outer, x, use_reentrant=False)


def test_checkpoints_nested_twice_with_a_shared_module_are_adopted():
    model = NestedCheckpoints().double()
    x = torch.randn(3, 16).double()
    y = compiled(model)(x)
    assert_close(y, model(x))
    (y * torch.randn_like(y)).sum().backward()
    gradients = {n: s.skew_in.grad.clone() for n, s in states(model).items()}
    assert set(gradients) == {"a", "b", "c"}
    assert all(g.norm() > 0 for g in gradients.values())
    assert all(stored_weight(m).grad is None for m in (model.a, model.b, model.c))


def test_a_checkpoint_under_autocast_has_true_metadata():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MLP()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return checkpoint(self.inner, x, use_reentrant=False)

    model = Checkpointed()
    x = torch.randn(3, 12)
    y = compiled(model)(x)  # verify_passes is on
    assert_close(y, model(x))
    y.sum().backward()
    assert len(states(model)) == 2


def test_a_weight_inside_another_higher_order_op_is_refused_with_a_reason():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda t: self.a(t), lambda t: -self.a(t), (self.b(x),))

    rows = {r.name: r for r in explained(Branches(), torch.ones(3, 8), block_size=8).rows}
    assert rows["a"].status == "skipped"
    assert "cond" in rows["a"].reason
    assert rows["b"].status == "rewritten"


def test_only_what_prepare_can_take_over_is_adopted():
    """A parameter of a module of the user's own, or one read by a forward of its own: no optimiser
    would ever find its rotations."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            return nn.functional.linear(x, self.w)

    class Doubled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias) * 2

    model = nn.Sequential(Own(), Doubled(16, 16), nn.Linear(16, 16))
    compiled(model)(torch.randn(3, 16)).sum().backward()
    assert set(states(model)) == {"2"}
    assert registry.adopted.get(model[0].w) is None
    assert model[0].w.grad is not None
    assert model[1].weight.grad is not None


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_linears_inside_transforms_of_torch_func_stay_plain(transform):
    model = MLP().double()

    def gradient(x):
        return torch.func.grad(lambda z: model(z).sum())(x)

    function = {"grad": gradient, "vmap": torch.vmap(model)}[transform]
    x = torch.randn(3, 12).double()
    run = torch.compile(function, backend=poetx.poetx_backend, options=OPTIONS)
    assert_close(run(x), function(x))
    assert states(model) == {}


@pytest.mark.parametrize("cayley", ["neumann", "exact"])
def test_blocks_that_do_not_divide_a_side_and_are_alone_in_their_size(cayley):
    """AOTAutograd must take the sizes of a state as constants: nothing can guard on them."""
    model = nn.Sequential(nn.Linear(18, 25)).double()
    x = torch.randn(3, 18).double()
    y = compiled(model, block_size=(7, 9), cayley=cayley)(x)
    assert_close(y, model(x))
    y.sum().backward()


def test_other_options_for_an_adopted_weight_are_refused():
    first, second = MLP(), MLP()
    x = torch.randn(3, 12)
    compiled(second, block_size=4)(x)
    compiled(first, block_size=8)(x)  # code of this one is reused for the second
    with pytest.raises(ConfigError, match="block_size: 4 then, 8 here"):
        compiled(second, block_size=8)(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="block_size: 4 then, 8 here"):
        compiled(second, block_size=8)(x)
    compiled(second, block_size=4, variant="mem")(x)


class Broken(nn.Module):
    """Two graphs: the second holds nothing but the tail."""

    def __init__(self):
        super().__init__()
        self.body, self.tail = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.body(x)
        torch._dynamo.graph_break()
        return self.tail(torch.tanh(x))


class BrokenWithHead(Broken):
    def get_output_embeddings(self):
        return self.tail


@pytest.mark.parametrize("case", ["prepared in parts", "output embedding"])
def test_what_prepare_would_leave_alone_is_never_adopted(case):
    """The tail is in a graph of its own, which says nothing of the rest of the model."""
    config = poetx.POETXConfig(block_size=8)
    model = BrokenWithHead() if case == "output embedding" else Broken()
    if case == "prepared in parts":
        poetx.prepare(model.body, config)
    run = torch.compile(model, backend=poetx.poetx_backend, options=OPTIONS)
    x = torch.randn(3, 16)
    run(x).sum().backward()
    assert "tail" not in states(model)
    assert equivalence_of(model.body) is not None
    optimizer = poetx.POETXAdamW(model, config=config)
    before = model.tail.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        run(x).pow(3).sum().backward()
        optimizer.step()
    assert not torch.equal(model.tail.weight, before)


def test_prepare_takes_the_fields_that_do_not_shape_a_state():
    model = SwiGLU()
    y = compiled(model)(torch.randn(3, 16))
    poetx.prepare(model, poetx.POETXConfig(block_size=8, merge_interval=7, merge_rotation="plain"))
    y.sum().backward()
    for _, _, equivalence in prepared_linears(model):
        assert equivalence.config.merge_interval == 7
        assert equivalence.merge_rotation == "plain"
        assert equivalence.skew_in.grad is not None


def test_checkpoints_fit_whether_prepared_before_or_after_the_first_call():
    """Groups follow from the model, not from the order of the user's calls."""
    first, second = Block(), Block()
    poetx.prepare(first, poetx.POETXConfig(block_size=8))
    compiled(second)(torch.randn(2, 3, 16)).sum().backward()
    poetx.prepare(second)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 16)
    assert_close(second(x), first(x))


def test_gradients_left_over_say_nothing_new():
    """Those of a model nobody trains, while another one trains."""
    idle, other = MLP(), nn.Linear(4, 4)
    compiled(idle)(torch.randn(3, 12)).sum().backward()
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-3)
    for _ in range(3):
        other(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    compiled(idle)(torch.randn(3, 12)).sum().backward()
    with pytest.raises(UnownedRotationsError):
        optimizer.step()


def test_compiled_code_keeps_neither_inputs_nor_graphs_alive():
    import gc
    import weakref

    model = SwiGLU()
    run = compiled(model, **AOT)
    x = torch.randn(3, 16)
    seen = weakref.ref(x)
    run(x).sum().backward()
    del x
    gc.collect()
    assert seen() is None
    alive = [o for o in gc.get_objects() if type(o) is AdoptLinear]
    assert alive == []
