"""`poetx_backend`: entry points, options, stages, numerics of the whole path."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers.graph_of import explained, prepared
from tests.helpers.models import MLP, Block, SwiGLU, TinyLM
from tests.helpers.tolerances import assert_close, relative_error


def run(model: nn.Module, *inputs, **options):
    return torch.compile(model, backend=poetx.poetx_backend, options=options)(*inputs)


def test_by_name_and_by_callable():
    assert "poetx" in torch._dynamo.list_backends()
    model = prepared(SwiGLU().double())
    x = torch.randn(3, 16).double()
    for backend in ("poetx", poetx.poetx_backend):
        torch._dynamo.reset()
        y = torch.compile(model, backend=backend, options={"stage": "aot_eager"})(x)
        assert_close(y, model(x))


@pytest.mark.parametrize("stage", ["aot_eager", "eager"])
def test_every_stage_gives_the_same(stage):
    model = prepared(Block().double())
    x = torch.randn(2, 5, 16).double()
    assert_close(run(model, x, stage=stage), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_such_option": 1}, "no_such_option"),
        ({"stage": "tvm"}, "stage = 'tvm'"),
        ({"block_size": 1}, "block_size = 1"),
        ({"stage": "eager", "max_autotune": True}, "max_autotune"),
        ({"disable_passes": ["nothing"]}, "nothing"),
        ({"disable_passes": None}, "disable_passes = None"),
        ({"verify_passes": "yes"}, "verify_passes = 'yes'"),
        ({"cayley_batch_bytes": True}, "cayley_batch_bytes = True"),
    ],
)
def test_bad_options_raise_and_name_the_option(options, message):
    with pytest.raises(Exception, match=message):
        run(SwiGLU(), torch.randn(3, 16), **options)


def test_bad_options_are_config_errors():
    from poetx_compile.compile.options import BackendOptions

    with pytest.raises(ConfigError, match="list_options"):
        BackendOptions.parse(None, {"no_such_option": 1})
    with pytest.raises(ConfigError, match="mode"):
        BackendOptions.parse("reduce-overhead", {"stage": "eager"})
    with pytest.raises(RuntimeError, match="no-such-mode"):
        BackendOptions.parse("no-such-mode", None)


def test_mode_and_options_reach_inductor():
    from poetx_compile.compile.options import BackendOptions

    parsed = BackendOptions.parse("max-autotune", {"epilogue_fusion": False, "variant": "mem"})
    assert parsed.inductor["max_autotune"] is True
    assert parsed.inductor["epilogue_fusion"] is False
    assert parsed.config == {"variant": "mem"}


def test_settings_of_inductor(monkeypatch):
    """The user's, our pass, and partitions of a graph only where CUDA graphs need them."""
    seen = {}

    def compile_fx(gm, inputs, inner_compile, config_patches):
        seen.update(config_patches)
        return gm

    def settings(**options):
        seen.clear()
        run(prepared(SwiGLU()), torch.randn(3, 16), **options)
        return dict(seen)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    ours = settings(max_fusion_size=7)
    assert ours["max_fusion_size"] == 7
    assert ours["post_grad_custom_pre_pass"] is not None
    assert ours["graph_partition"] is False
    assert settings(graph_partition=True)["graph_partition"] is True
    assert "graph_partition" not in settings(**{"triton.cudagraphs": True})


@pytest.mark.parametrize(
    ("choice", "fraction"), [({"variant": "mem"}, None), ({"memory_budget": 0.8}, 0.8)]
)
def test_inductor_is_given_the_partitioner(monkeypatch, choice, fraction):
    seen = []

    def compile_fx(gm, inputs, inner_compile, config_patches):
        seen.append(config_patches.get("custom_partitioner_fn"))
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model, x = prepared(SwiGLU()), torch.randn(3, 16)
    run(model, x)
    torch._dynamo.reset()
    run(model, x, **choice)
    torchs, ours = seen
    assert torchs is None
    assert ours.fraction == fraction


def test_options_that_contradict_prepare_raise():
    model = prepared(SwiGLU(), 8)
    with pytest.raises(Exception, match=r"block_size: 8 at prepare, 4 here"):
        run(model, torch.randn(3, 16), block_size=4)
    run(model, torch.randn(3, 16), block_size=8, variant="mem", stage="eager")


@pytest.mark.parametrize(
    ("variant", "formulation"),
    [("fast", "input_centric"), ("mem", "input_centric"), ("mem", "folded")],
)
def test_inductor_equals_eager_with_gradients(variant, formulation):
    model = prepared(nn.Linear(16, 24))
    reference = copy.deepcopy(model)
    x, weights = torch.randn(6, 16, requires_grad=True), torch.randn(6, 24)
    (run(model, x, variant=variant, formulation=formulation) * weights).sum().backward()
    actual, x.grad = x.grad, None
    (reference(x) * weights).sum().backward()
    assert_close(actual, x.grad)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert_close(p.grad, q.grad, what=name)


@pytest.mark.parametrize("formulation", ["input_centric", "folded"])
def test_any_leading_shape_and_empty_batches(formulation):
    model = prepared(MLP())
    options = {"stage": "aot_eager", "variant": "mem", "formulation": formulation}
    compiled = torch.compile(
        model, backend=poetx.poetx_backend, fullgraph=True, dynamic=False, options=options
    )
    for leading in ((), (2, 3, 4), (2, 0, 5)):
        x = torch.randn(*leading, 12)
        y = compiled(x)
        assert_close(y, model(x), what=str(leading))
        y.sum().backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        model(x).sum().backward()
        expected = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        assert_close(torch.stack(norms), torch.stack(expected), what=f"gradients of {leading}")


def losses_and_gradients(
    steps: int = 20, **options: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """20 steps of SGD with two merges: by eager, or by the compiler where there are options."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Embedding(24, 16), SwiGLU(), nn.Linear(16, 24)).double()
    config = poetx.POETXConfig(block_size=8, merge_interval=8, redraw_interval=8)
    poetx.prepare(model, config)
    call = model
    if options:
        call = torch.compile(
            model,
            backend=poetx.poetx_backend,
            fullgraph=True,
            options={"stage": "aot_eager", **options},
        )
    optimizer = torch.optim.SGD(poetx.param_groups(model, lr=0.1, poetx_lr=0.02), momentum=0.9)
    schedule = poetx.attach(optimizer, model)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 24, (4, 7), generator=generator)
        optimizer.zero_grad()
        logits = call(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    assert schedule.merges == 2
    angle = max(e.skew_in.abs().max().item() for _, _, e in prepared_linears(model))
    assert angle > 1e-3, "the rotations moved"
    return losses, gradients


def test_all_ways_train_like_eager_over_two_merges():
    expected, expected_gradients = losses_and_gradients()
    for variant, formulation in itertools.product(("fast", "mem"), ("input_centric", "folded")):
        losses, gradients = losses_and_gradients(variant=variant, formulation=formulation)
        assert relative_error(torch.tensor(losses), torch.tensor(expected)) < 1e-5
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected_gradients[name]) < 1e-5, name


def test_a_merge_causes_no_recompilation():
    model = SwiGLU()
    run = torch.compile(model, backend=poetx.poetx_backend, options={"stage": "aot_eager"})
    optimizer = poetx.POETXAdamW(
        model, lr=1e-3, config=poetx.POETXConfig(block_size=8, merge_interval=2, redraw_interval=2)
    )
    torch._dynamo.utils.counters.clear()
    for _ in range(7):
        run(torch.randn(3, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_explain_prints_a_table_with_every_linear_and_its_reason():
    model = prepared(TinyLM())
    text = explained(model, torch.arange(6)[None]).text(verbose=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert name in text
    assert "14 of 15 nn.Linear rewritten in 1 graph" in text
    assert "excluded by name: lm_head" in text
    assert "gather(s) saved" in text
    assert "in one launch" in text


def test_explain_changes_nothing():
    model = SwiGLU()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    explanation = poetx.explain(model, torch.zeros(3, 16), options={"block_size": 8})
    assert [row.status for row in explanation.rows] == ["rewritten"] * 3
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


def test_explain_says_what_no_graph_called():
    class Unused(SwiGLU):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(16, 16)

    rows = {r.name: r for r in explained(prepared(Unused()), torch.randn(3, 16)).rows}
    assert rows["spare"].status == "not seen"
    assert rows["gate_proj"].status == "rewritten"


def test_a_weight_built_apart_from_its_product_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 12)

        def forward(self, x):
            weight = self.linear.weight
            if self.breaks:
                torch._dynamo.graph_break()
            return nn.functional.linear(x, weight)

    model = Apart()
    poetx.prepare(model, poetx.POETXConfig(block_size=4))
    compiled = torch.compile(model, backend=poetx.poetx_backend, options={"stage": "eager"})
    x = torch.randn(3, 8)
    for model.breaks in (False, True):
        assert_close(compiled(x), model(x))
        told = "weight of shape [12, 8] leaves the compiled graph" in caplog.text
        assert told == model.breaks
