"""The runner: refusals are recorded, metadata is checked, passes can be left out by name."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from poetx_compile.passes import NAMES, GraphPass, Record, Refusal, graphs, metadata, run
from tests.helpers.graph_of import after, dynamo_graph, prepared
from tests.helpers.models import SwiGLU


class Relabel(GraphPass[fx.Node]):
    """Replaces relu by tanh; refuses the second one; lies about the dtype if asked to."""

    name = "relabel"

    def __init__(self, lie: bool = False):
        self.lie, self.seen = lie, 0

    def sites(self, graph):
        return [n for n in graph.nodes if n.target is torch.relu]

    def describe(self, site):
        return {"layers": graphs.layers_of([site])}

    def decide(self, site):
        self.seen += 1
        if self.seen == 2:
            raise Refusal("one is enough")
        return "tanh"

    def apply(self, graph, site):
        with graph.inserting_before(site):
            new = graph.call_function(torch.tanh, site.args)
        if self.lie:
            new.meta[graphs.VALUE] = site.meta[graphs.VALUE].to(torch.int64)
        site.replace_all_uses_with(new)
        graph.erase_node(site)


class TwoRelus(nn.Module):
    def forward(self, x):
        return torch.relu(torch.relu(x) + 1)


def test_a_refusal_is_recorded_with_its_reason_and_the_rest_is_applied():
    root = graphs.clone(dynamo_graph(TwoRelus(), torch.randn(3)))
    record = Record()
    run([Relabel()], root, record, verify=True)
    assert [e.detail for e in record.applied("relabel")] == ["tanh"]
    assert [e.detail for e in record.refused("relabel")] == ["one is enough"]
    x = torch.randn(3)
    torch.testing.assert_close(root(x)[0], torch.relu(torch.tanh(x) + 1))


def test_new_nodes_get_metadata():
    root = graphs.clone(dynamo_graph(TwoRelus(), torch.randn(3)))
    run([Relabel()], root, Record())
    (new,) = [n for n in root.graph.nodes if n.target is torch.tanh]
    assert new.meta[graphs.VALUE].shape == (3,)


def test_verify_catches_stale_metadata():
    root = graphs.clone(dynamo_graph(TwoRelus(), torch.randn(3)))
    with pytest.raises(AssertionError, match="stale metadata"):
        run([Relabel(lie=True)], root, Record(), verify=True)


def test_verify_looks_again_at_what_changed():
    root = graphs.clone(dynamo_graph(TwoRelus(), torch.randn(3)))
    checked: metadata.Checked = {}
    metadata.verify(root, checked=checked)
    (x,) = root.graph.find_nodes(op="placeholder")
    first, second = (n for n in root.graph.nodes if n.target is torch.relu)
    second.target = torch.isnan
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"stale metadata at .*isnan"):
            metadata.verify(root, checked=checked)
    second.target = torch.relu
    metadata.verify(root, checked=checked)
    x.meta[graphs.VALUE] = x.meta[graphs.VALUE].double()
    with pytest.raises(AssertionError, match=rf"stale metadata at %{first.name}"):
        metadata.verify(root, checked=checked)


def test_the_graph_of_dynamo_is_not_touched():
    gm = dynamo_graph(TwoRelus(), torch.randn(3))
    before = str(gm.graph)
    run([Relabel()], graphs.clone(gm), Record())
    assert str(gm.graph) == before


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("adopt_linear", "hoist_folds", "merged")]
)
def test_every_pass_can_be_left_out_and_the_function_stays(name):
    model = SwiGLU().double()
    formulation = "folded" if name == "folded" else "input_centric"
    given = {"formulation": formulation, "gains": "rows" if name == "gains" else "none"}
    config = poetx.POETXConfig(block_size=8, **given)
    poetx.prepare(model, config, shared=[("gate_proj.out", "up_proj.out", "down_proj.in")])
    model, x = prepared(model, **given), torch.randn(3, 16).double()
    options = {"stage": "aot_eager", "disable_passes": name, "verify_passes": True}
    y = torch.compile(model, backend=poetx.poetx_backend, options=options)(x)
    torch.testing.assert_close(y, model(x))
    marks = {
        "gains": "gate_proj.gain_out)",
        "formulation": "orthogonal_equivalence",
        "folded": "rotate_blocks",
        "input_centric": "orthogonal_equivalence",
        "share_permutations": "rotate_blocks(x, ",
        "cancel_permutations": "gate_proj.perm_out, False)",
        "batch_cayley": "cayley_neumann(gate_proj.skew_in",
        "recompute": "cayley",
    }
    assert marks[name] in after(model, x, disable_passes=[name])


def test_an_unknown_pass_name_is_refused():
    with pytest.raises(ConfigError, match="no_such_pass"):
        after(prepared(SwiGLU()), torch.randn(3, 16), disable_passes=["no_such_pass"])
