"""The ops inside Inductor: what code they become, that it is right, and that caches are honest."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from poetx_compile import ops
from poetx_compile.compile.lowerings import ExpandOps, chain_passes, identity, source_digest
from tests.helpers.tolerances import assert_close

BLOCK, BLOCKS = 8, 5


def packed(blocks: int = BLOCKS, block: int = BLOCK, dtype: torch.dtype = torch.float32) -> Tensor:
    skew = 0.05 * torch.randn(blocks, block * (block - 1) // 2, dtype=dtype)
    return skew.requires_grad_()


def pair(width: int) -> Tensor:
    permutation = torch.randperm(width)
    return torch.stack([permutation, permutation.argsort()])


def compiled(function: Callable[..., Any], custom_pass: Any) -> Callable[..., Any]:
    """`function` through AOTAutograd and Inductor with `custom_pass` and nothing else of ours."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, inputs, config_patches={"post_grad_custom_pre_pass": custom_pass})

    return torch.compile(function, backend=backend, fullgraph=True)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    out = function(*inputs)
    wanted = [i for i in inputs if i.requires_grad]
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), wanted)]


def counts(code: str) -> dict[str, int]:
    """How many C++ kernels, batched products, and calls back into our ops the code holds."""
    return {
        "kernels": len(re.findall(r"async_compile\.cpp_pybinding", code)),
        "products": len(re.findall(r"extern_kernels\.bmm", code)),
        "fallbacks": len(re.findall(r"torch\.ops\.poetx\.", code)),
        "scatters": len(re.findall(r"index_put|scatter|atomic_add", code)),
    }


def test_cayley_neumann_is_three_pointwise_kernels_beside_two_products(inductor_cache):
    def rotation(skew: Tensor) -> Tensor:
        return ops.cayley_neumann(skew, BLOCK, 3)

    skew = packed()
    fast = compiled(rotation, ExpandOps("count"))
    actual, codes = run_and_get_code(lambda: with_gradients(fast, skew))
    for got, expected in zip(actual, with_gradients(rotation, skew), strict=True):
        assert_close(got, expected)
    forward, backward = (counts(code) for code in codes)
    assert forward == {"kernels": 3, "products": 2, "fallbacks": 0, "scatters": 0}
    # K − Kᵀ, written packed, is the last of four: one between any two of the four products.
    assert backward == {"kernels": 4, "products": 4, "fallbacks": 0, "scatters": 0}


def test_all_ops_of_tokens_under_a_dynamic_number_of_them(inductor_cache):
    width = 20  # two blocks of 8 and four columns that pass through

    def layer(x: Tensor, rotation: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        y = ops.rotate_blocks(x, rotation, gather, None)
        y = ops.rotate_blocks(y.sin(), rotation, None, scatter, True)
        return ops.permute_columns(y, gather, True)

    fast = compiled(layer, ExpandOps("dynamic"))
    rotation = torch.randn(2, BLOCK, BLOCK, requires_grad=True)
    gather, scatter = pair(width), pair(width)

    def inputs(batch: int, tokens: int) -> tuple[Tensor, ...]:
        x = torch.randn(batch, tokens, width, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        return x, rotation, gather, scatter

    first = inputs(2, 5)
    actual, codes = run_and_get_code(with_gradients, fast, *first)
    for got, expected in zip(actual, with_gradients(layer, *first), strict=True):
        assert_close(got, expected)
        assert got.stride() == expected.stride()
    assert [counts(code)["fallbacks"] for code in codes] == [0, 0]
    graphs = counters["stats"]["unique_graphs"]
    second = inputs(3, 7)
    for got, expected in zip(
        with_gradients(fast, *second), with_gradients(layer, *second), strict=True
    ):
        assert_close(got, expected)
    assert counters["stats"]["unique_graphs"] == graphs, "other sizes were compiled again"


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "cayley_neumann": (torch.ops.poetx.cayley_neumann, (packed(), BLOCK, 4)),
    "cayley_neumann_backward": (
        torch.ops.poetx.cayley_neumann_backward,
        (torch.randn(BLOCKS, BLOCK, BLOCK), packed(), BLOCK, 5),
    ),
    "rotate_blocks": (
        torch.ops.poetx.rotate_blocks,
        (torch.randn(2, 4, 11).mT, torch.randn(1, 3, 3), None, pair(4), True),
    ),
    "rotate_blocks without blocks": (
        torch.ops.poetx.rotate_blocks,
        (torch.randn(2, 4), torch.randn(0, 3, 3), None, None, False),
    ),
    "block_product": (
        torch.ops.poetx.block_product,
        (torch.randn(5, 7), torch.randn(5, 7).bfloat16(), 2, 3, pair(7), None),
    ),
    "stacked_block_products": (
        torch.ops.poetx.stacked_block_products,
        (*torch.randn(2, 5, 7), *torch.randn(2, 5, 6), 2, 1, 3, pair(7), pair(2)),
    ),
    "permute_columns": (torch.ops.poetx.permute_columns, (torch.randn(3, 5).T, pair(3), True)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_expanded_graph_equals_the_op_and_keeps_its_metadata(name, mode):
    op, args = CALLS[name]
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    tensors = [args[i].detach() for i in places]

    def call(*inputs: Tensor) -> Tensor:
        filled = list(args)
        for place, tensor in zip(places, inputs, strict=True):
            filled[place] = tensor
        return op(*filled)

    gm = make_fx(call, tracing_mode=mode)(*tensors)
    (before,) = (n for n in gm.graph.nodes if str(n.target).startswith("poetx."))
    before.meta["stack_trace"] = "here"
    expected = before.meta["val"]
    ExpandOps()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert not [n for n in gm.graph.nodes if str(n.target).startswith("poetx.")]
    (result,) = gm.graph.output_node().all_input_nodes
    value = result.meta["val"]
    assert (value.shape, value.stride(), value.dtype) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
    )
    assert result.op == "call_function"  # a value of its own, not an input
    assert result.meta["stack_trace"] == "here"
    assert_close(gm(*tensors), op(*args))
    assert gm(*tensors).data_ptr() not in {t.data_ptr() for t in tensors}


def test_slices_put_together_again_are_the_tensor_they_are_slices_of():
    def graph_of(function: Callable[[Tensor], Tensor]) -> fx.Graph:
        gm = make_fx(function, tracing_mode="fake")(torch.randn(5, 2))
        ExpandOps()(gm.graph)
        gm.graph.lint()
        gm.recompile()
        x = torch.randn(5, 2)
        assert torch.equal(gm(x), function(x))
        return gm.graph

    def cats(function: Callable[[Tensor], Tensor]) -> int:
        nodes = graph_of(function).nodes
        assert all(node.users for node in nodes if "slice" in str(node.target))
        return sum(node.target == torch.ops.aten.cat.default for node in nodes)

    assert cats(lambda x: torch.cat([(x + 1)[:2], (x + 1)[2:]]) * 2) == 1  # of two tensors

    def cut(*ends: int) -> Callable[[Tensor], Tensor]:
        def rejoined(x: Tensor) -> Tensor:
            y = x + 1
            return torch.cat([y[a:b] for a, b in itertools.pairwise((0, *ends))]) * 2

        return rejoined

    assert cats(cut(2, 5)) == cats(cut(1, 3, 5)) == 0
    assert cats(cut(2, 4)) == 1  # a part is missing
    assert cats(lambda x: torch.cat([x[:2], x[1:]]) * 2) == 1  # a row twice
    assert cats(lambda x: torch.cat([x[2:], x[:2]]) * 2) == 1
    assert cats(lambda x: torch.cat([x.mT[:, :2], x.mT[:, 2:]], 1) * 2) == 1  # not contiguous
    assert cats(lambda x: torch.cat([x[:2], x[2:]])) == 1  # an output of its own


def test_parameters_are_put_side_by_side_by_one_call(inductor_cache):
    """And nothing else: what is computed, or read by other code, is Inductor's to fuse."""

    def rotations(*skews: Tensor) -> Tensor:
        return torch.ops.poetx.cayley_exact(torch.cat(skews), BLOCK)

    def calls(function: Callable[..., Tensor]) -> tuple[int, int]:
        """Concatenations that stay calls, and generated kernels."""
        skews = [packed(blocks).detach() for blocks in (1, 2, 3)]
        actual, (code,) = run_and_get_code(compiled(function, ExpandOps("cat")), *skews)
        assert_close(actual, function(*skews))
        return code.count("aten.cat.default("), counts(code)["kernels"]

    assert calls(rotations) == (1, 0)
    assert calls(lambda a, b, c: rotations(a, b, 2 * c)) == (0, 1)
    assert calls(lambda a, b, c: torch.cat([a, b, c]) + 1) == (0, 1)


def test_exact_transform_stays_a_call():
    gm = make_fx(lambda s: torch.ops.poetx.cayley_exact(s, BLOCK), tracing_mode="fake")(
        packed().detach()
    )
    before = str(gm.graph)
    ExpandOps()(gm.graph)
    assert str(gm.graph) == before


@pytest.mark.parametrize(("dtype", "stays"), [(torch.float32, True), (torch.float64, False)])
def test_rotations_keep_their_precision_where_tf32_is_allowed(dtype, stays):
    skew = packed(dtype=dtype).detach()
    gm = make_fx(lambda s: torch.ops.poetx.cayley_neumann(s, BLOCK, 3), tracing_mode="fake")(skew)
    torch.set_float32_matmul_precision("high")
    ExpandOps()(gm.graph)
    assert ("poetx.cayley_neumann" in str(gm.graph)) == stays


class Marker(CustomGraphPass):
    """A user's pass: notes how many of our ops it saw."""

    def __init__(self, uuid: str | None = "marker"):
        self.seen: list[int] = []
        self._uuid = uuid

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append(sum("poetx" in str(n.target) for n in graph.nodes))

    def uuid(self) -> str | None:
        return self._uuid


def _uuids(chained: Any) -> list[Any]:
    if isinstance(chained, list):
        return [p.uuid() if isinstance(p, CustomGraphPass) else None for p in chained]
    one = chained.uuid()
    return [one] if one is None else list(one)


def test_users_pass_runs_first_and_is_part_of_the_cache_identity():
    ours = ExpandOps("x")
    assert chain_passes(None, ours) is ours
    assert _uuids(chain_passes(Marker(), ours)) == ["marker", ours.uuid()]
    assert None in _uuids(chain_passes(Marker(None), ours))
    assert None in _uuids(chain_passes(lambda graph: None, ours))


def test_chained_passes_compile_and_reuse_the_cache(fresh_inductor_cache):
    marker = Marker()
    x, order = torch.randn(2, 6), pair(6)

    def run(name: str) -> dict[str, int]:
        torch._dynamo.reset()
        torch.compiler.reset()
        counters.clear()
        custom = chain_passes(marker, ExpandOps(name))
        fast = compiled(lambda x, p: ops.permute_columns(x, p), custom)
        assert torch.equal(fast(x, order), x[:, order[0]])
        return dict(counters["inductor"])

    first = run("a")
    assert marker.seen == [1]
    assert first["fxgraph_cache_miss"] == 1
    again = run("a")
    assert marker.seen == [1], "a hit compiles nothing"
    assert again["fxgraph_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in again
    other = run("b")
    assert other["fxgraph_cache_miss"] == 1
    assert "fxgraph_cache_hit" not in other
    assert marker.seen == [1, 1]


def test_uuid_covers_arguments_and_precision():
    base = ExpandOps({"variant": "fast"}).uuid()
    assert ExpandOps({"variant": "fast"}).uuid() == base
    assert ExpandOps({"variant": "mem"}).uuid() != base
    torch.set_float32_matmul_precision("high")
    assert ExpandOps({"variant": "fast"}).uuid() != base
    with pytest.raises(TypeError):
        ExpandOps(object())


def _copy(tmp_path: Path) -> list[Path]:
    roots = []
    for number, root in enumerate(identity._roots()):
        copy = tmp_path / str(number)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root, copy, symlinks=True, ignore=ignored)  # the passes are a root
        roots.append(copy)
    return roots


def test_every_source_is_covered_and_any_change_shows(tmp_path, monkeypatch):
    package, passes = roots = _copy(tmp_path)
    base = source_digest(roots)
    assert base == source_digest(identity._roots())

    def uuid_of_copy() -> str:
        monkeypatch.setattr(identity, "_roots", lambda: roots)
        identity.package_digest.cache_clear()
        return ExpandOps().uuid()

    try:
        uuid = uuid_of_copy()
        for source in ("ops/polynomial.py", "ops/kernels/cayley.py", "compile/backend.py"):
            path = package / source
            original = path.read_text()
            path.write_text(original + "\n# changed\n")
            assert uuid_of_copy() != uuid, source
            path.write_text(original)
        assert uuid_of_copy() == uuid
        new_pass = passes / "another_pass.py"
        new_pass.write_text("")
        assert uuid_of_copy() != uuid
        new_pass.rename(passes / "renamed_pass.py")
        renamed = uuid_of_copy()
        assert renamed != uuid
    finally:
        identity.package_digest.cache_clear()
