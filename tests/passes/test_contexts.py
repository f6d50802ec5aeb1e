"""What a node finds set around it, and passes that heed it or are stopped."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.compile.outputs import checked
from poetx_compile.errors import RewriteError
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.passes import BatchCayley, Formulation, Record, graphs, run
from poetx_compile.passes.contexts import Contexts
from tests.helpers.graph_of import dynamo_graph, prepared
from tests.helpers.rotations import turn


class Body(nn.Module):
    """`forward` is given by the test; q and k are linears that may share everything."""

    def __init__(self, forward):
        super().__init__()
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 12)
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def no_grad(m, x):
    with torch.no_grad():
        t = m.q(x)
    return m.k(x) * t


def twice(m, x):
    with torch.no_grad():
        t = m.q(x)
    return m.q(t) * m.k(x)


def set_grad_enabled(m, x):
    torch.set_grad_enabled(False)
    t = m.q(x)
    torch.set_grad_enabled(True)
    return m.k(x) * t


def inference(m, x):
    with torch.inference_mode():
        t = m.q(x)
    return m.q(x) + m.k(x) * t.clone()


def checkpointed(m, x):
    return checkpoint(lambda u: twice(m, u), x, use_reentrant=False)


def recurrent(m, x):
    with torch.no_grad():
        for _ in range(2):
            x = torch.tanh(m.q(x) + m.k(x))
    return torch.tanh(m.q(x) + m.k(x))


def unused(m, x):
    m.q(x)
    return m.k(x)


def decides(m, x):
    return torch.where(m.q(x) > 0, m.k(x), x)


FORWARDS = [no_grad, twice, set_grad_enabled, inference, checkpointed, recurrent, unused, decides]


def gradients(model, forward, x):
    leaf = x.clone().requires_grad_()
    out = forward(leaf)
    (out.double() ** 2).sum().backward()
    named = {name: p.grad for name, p in model.named_parameters()} | {"x": leaf.grad}
    for p in model.parameters():
        p.grad = None
    return out.detach(), named


@pytest.mark.parametrize(
    ("body", "formulation", "stage"),
    [(body, "folded", "eager") for body in FORWARDS]
    + [(body, "input_centric", "aot_eager") for body in (inference, checkpointed, unused)],
    ids=lambda f: getattr(f, "__name__", f),
)
def test_what_trains_in_eager_mode_trains_compiled(body, formulation, stage):
    model = prepared(Body(body).double(), formulation=formulation)
    x = torch.randn(5, 12, dtype=torch.float64)
    out, expected = gradients(model, model, x)
    options = {"stage": stage, "verify_passes": True}
    compiled = torch.compile(model, backend=poetx.poetx_backend, options=options, fullgraph=True)
    actual_out, actual = gradients(model, compiled, x)
    torch.testing.assert_close(actual_out, out)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("body", "stage"),
    [(body, "eager") for body in FORWARDS] + [(inference, "aot_eager"), (unused, "aot_eager")],
    ids=lambda f: getattr(f, "__name__", f),
)
def test_what_trains_in_eager_mode_trains_where_nobody_prepared(body, stage):
    model = Body(body).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    options = {"stage": stage, "block_size": 8}
    compiled = torch.compile(model, backend=poetx.poetx_backend, options=options)
    out, plain = gradients(model, model, x)
    actual_out, first = gradients(model, compiled, x)  # and the rotations move into the model
    torch.testing.assert_close(actual_out, out)
    torch.testing.assert_close(first["x"], plain["x"])
    trains = {name for name, gradient in plain.items() if gradient is not None}
    rotated = {f"{name}.weight" for name, _, _ in prepared_linears(model)}
    assert {f"{name}.weight" for name in ("q", "k")} & trains <= rotated
    turn(model)
    _, expected = gradients(model, model, x)
    _, second = gradients(model, compiled, x)
    torch.testing.assert_close(second, expected)


def test_a_graph_that_begins_without_gradients_adopts_what_turns_them_on():
    def forward(m, x):
        t = m.q(x)
        with torch.enable_grad():
            return m.k(x) + t

    model, x = Body(forward), torch.randn(3, 12)
    options = {"stage": "eager", "block_size": 8}
    compiled = torch.compile(model, backend=poetx.poetx_backend, options=options)
    with torch.no_grad():
        out = compiled(x)
    out.sum().backward()
    assert [name for name, _, _ in prepared_linears(model)] == ["k"]
    assert model.q.weight.grad is None


def contexts_by_module(forward):
    root = graphs.clone(dynamo_graph(Body(forward), torch.randn(3, 12)))
    contexts = Contexts(root)
    found = [(m, n) for m in graphs.nested(root) for n in m.graph.nodes if graphs.is_linear(n)]
    return root, contexts, [contexts.of(n) for _, n in found]


def test_a_region_that_is_over_leaves_nothing_behind():
    def forward(m, x):
        a = m.q(x)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            b = m.q(x)
            with torch.inference_mode():
                c = m.q(x)
            d = m.q(x)
        return a, b, c, d, m.q(x)

    _, _, (a, b, c, d, e) = contexts_by_module(forward)
    assert a == e
    assert b == d
    assert len({a, b, c}) == 3
    assert [k.records for k in (a, b, c)] == [True, False, False]
    assert [len(k.autocast) for k in (a, b, c)] == [0, 1, 1]


def test_marks_that_nobody_knows_are_borders():
    def forward(m, x):
        a = m.q(x)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            b = m.q(x)
        return a, b

    _, _, (a, b) = contexts_by_module(forward)
    assert a != b


def detached(m, x):
    with torch.inference_mode():
        t = m.q(x).detach()
        torch.set_grad_enabled(True)
        t = m.q(t)
        torch.set_grad_enabled(False)
    return m.k(x) * t.clone()


def test_inference_mode_that_aot_cannot_trace_is_compiled_as_no_grad():
    model = prepared(Body(detached).double())
    x = torch.randn(5, 12, dtype=torch.float64)
    out, expected = gradients(model, model, x)
    options = {"stage": "aot_eager"}
    compiled = torch.compile(model, backend=poetx.poetx_backend, options=options, fullgraph=True)
    actual_out, actual = gradients(model, compiled, x)
    torch.testing.assert_close(actual_out, out)
    torch.testing.assert_close(actual, expected)
    assert expected["q.parametrizations.weight.0.skew_in"] is None


def twins(m, x):
    y = m.q(x)
    out = torch.layer_norm(y, (12,))
    with torch.no_grad():
        again = torch.layer_norm(y, (12,))
    return again, out


def test_an_output_that_torch_takes_the_gradient_of_is_told():
    model, x = prepared(Body(twins)), torch.randn(3, 12)
    root = graphs.clone(dynamo_graph(model, x))
    lost = checked(root, lambda *args: tuple(value.detach() for value in model(x)))
    with pytest.raises(RewriteError, match=r"output 1 .* Clone one of the two"):
        lost()
    right = checked(root, lambda *args: model(x))
    assert [value.requires_grad for value in right()] == [False, True]


def test_cloned_it_keeps_its_gradient():
    model = prepared(Body(lambda m, x: tuple(value.clone() for value in twins(m, x))))
    options = {"stage": "aot_eager"}
    compiled = torch.compile(model, backend=poetx.poetx_backend, options=options)
    assert [value.requires_grad for value in compiled(torch.randn(3, 12))] == [False, True]


def test_a_new_node_has_the_context_of_its_place():
    root, contexts, _ = contexts_by_module(no_grad)
    inside, outside = [n for n in root.graph.nodes if graphs.is_linear(n)]
    for node, records in ((inside, False), (outside, True)):
        with root.graph.inserting_before(node):
            new = root.graph.call_function(torch.neg, (node.args[0],))
        assert contexts.of(new).records is records


def test_a_body_runs_in_the_context_of_its_call():
    def forward(m, x):
        with torch.no_grad():
            a = checkpoint(m.q, x, use_reentrant=False)
        return a, checkpoint(m.q, x, use_reentrant=False)

    _, _, (first, second) = contexts_by_module(forward)
    assert [first.records, second.records] == [False, True]


class Careless(BatchCayley):
    """Batches across contexts, and what no backward reaches with what one does."""

    name = "careless"

    def sites(self, graph):
        sites = super().sites(graph)
        return [type(sites[0])([n for site in sites for n in site.nodes])]


@pytest.mark.parametrize("body", [no_grad, unused], ids=lambda f: f.__name__)
def test_a_pass_that_changes_what_receives_gradients_is_stopped(body):
    model = prepared(Body(body))
    root = graphs.clone(dynamo_graph(model, torch.randn(3, 12)))
    with pytest.raises(RewriteError, match="disable_passes"):
        run([Formulation(), Careless()], root, Record())


def test_a_teacher_without_gradients_is_not_adopted():
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.student = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher(x)
            return ((self.student(x) - target) ** 2).mean()

    model, x = Distilled(), torch.randn(3, 12)
    before = model.teacher.weight.clone()
    options = {"stage": "aot_eager", "block_size": 8}
    compiled = torch.compile(model, backend=poetx.poetx_backend, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        compiled(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name, _, _ in prepared_linears(model)] == ["student"]
    assert torch.equal(model.teacher.weight, before)
