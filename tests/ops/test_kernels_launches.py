"""The Triton kernels as launches that Inductor compiles, for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from poetx_compile.compile.lowerings import ExpandOps
from poetx_compile.compile.lowerings.trace import RESULT, arguments, trace_launches, written_by
from poetx_compile.ops import OPS, kernels
from tests.helpers.kernel_cases import BF16, CASES, needs_triton

pytestmark = needs_triton


class OfflineDriver:
    """What Triton asks a driver when it only compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def offline_driver(monkeypatch) -> Iterator[None]:
    from torch._inductor import decomposition
    from triton.runtime import driver

    monkeypatch.setattr(kernels, "_triton_runs_on", lambda index: True)
    # It indexes, for which even fake tensors need a build of torch with CUDA.
    table = dict(decomposition.select_decomp_table())
    table.pop(torch.ops.aten.index_select.default, None)
    monkeypatch.setattr(decomposition, "select_decomp_table", lambda: table)
    before = driver._active
    driver.set_active(OfflineDriver())
    yield
    driver._active = before


def written(gm: torch.fx.GraphModule) -> list[list[str] | None]:
    """What each launch writes that the ops of a graph become; ``None`` for an op that stays."""
    ExpandOps()(gm.graph)
    gm.graph.lint()
    found: list[list[str] | None] = []
    for node in gm.graph.nodes:
        name = str(node.target).removeprefix("poetx.").removesuffix(".default")
        if name in OPS and (kernel := OPS[name].kernel):
            values = map_arg(arguments(node), lambda n: n.meta["val"])
            launches = trace_launches(kernel, values)
            result = launches and launches.meta[RESULT].meta["val"]
            assert result is None or (result.shape, result.dtype, result.stride()) == (
                node.meta["val"].shape,
                node.meta["val"].dtype,
                node.meta["val"].stride(),
            )
            found += [None] if launches is None else written_by(launches)
    return found


@pytest.mark.parametrize("case", [c for c, (op, args) in CASES.items() if OPS[op].expands(*args)])
def test_kernels_write_what_is_called_out_and_nothing_else(case, offline_driver):
    op, args = CASES[case]
    mode = FakeTensorMode()
    with mode:
        fake = [
            torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, torch.Tensor) else a
            for a in args
        ]
    traced = trace_launches(OPS[op].kernel, tuple(fake))
    assert traced is not None
    for names in written_by(traced):
        assert names
        assert all(name == "out" or name.endswith("_out") for name in names)


def rotated_layer(x: torch.Tensor, packed: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
    rotation = torch.ops.poetx.cayley_neumann(packed, 32, 3)
    return torch.ops.poetx.rotate_blocks(x, rotation, gather, None, False)


def on_fake_gpu(mode: FakeTensorMode, chunk: int = 1) -> list[torch.Tensor]:
    with mode:
        return [
            torch.empty(8, 64, 112, device="cuda", dtype=torch.bfloat16),
            torch.empty(3, 32 * 31 // 2, device="cuda"),
            torch.empty(2, 112 // chunk, device="cuda", dtype=torch.int64),
        ]


@pytest.mark.parametrize("chunk", [1, 16])
def test_ops_become_launches_that_write_their_outputs_alone(offline_driver, chunk):
    mode = FakeTensorMode()
    inputs = on_fake_gpu(mode, chunk)
    with mode:
        gm = make_fx(rotated_layer)(*inputs)
    # Three for the rotation; permute (single columns alone), rotate. To round G - I is pointwise.
    assert written(gm) == [["out"], ["p_out", "h_out"], *[["out"]] * (3 if chunk == 1 else 2)]


def test_low_precision_tangents_become_launches(offline_driver):
    op = torch.ops.poetx.rotation_tangent_backward
    mode = FakeTensorMode()
    with mode:
        packed = torch.empty(3, 32 * 31 // 2, device="cuda")
        grad = torch.empty(3, 32, 32, device="cuda")
        gm = make_fx(lambda *given: op(*given, 32, 3, True))(grad, packed)
    kernel = [["q_out", "s_out", "a_out"], ["f_out", "h_out", "t_out"], ["d_out", "v_out"], ["out"]]
    assert written(gm) == kernel
    # All others are the reference. (It indexes, for which even fake tensors need a build of torch
    # with CUDA: how it is expanded is tested on the CPU.)
    assert OPS["rotation_tangent_backward"].kernel.applies(grad, packed, 32, 3, True, 0)
    assert not OPS["rotation_tangent_backward"].kernel.applies(grad, packed, 32, 3, False, 0)


@pytest.mark.parametrize("chunk", [1, 16])
def test_fold_of_both_sides_becomes_launches(chunk, offline_driver):
    mode = FakeTensorMode()
    with mode:
        weight = torch.empty(256, 512, device="cuda", dtype=BF16)
        deltas = [torch.empty(blocks, 128, 128, device="cuda", dtype=BF16) for blocks in (4, 2)]
        perms = [
            torch.empty(2, width // chunk, device="cuda", dtype=torch.int64) for width in (512, 256)
        ]
        gm = make_fx(torch.ops.poetx.fold_weight)(weight, *deltas, *perms, BF16)
    # Single columns are permuted afterwards.
    assert written(gm) == [["out"]] * (2 if chunk == 1 else 1)


def test_chunks_are_gathered_inside_the_launch_of_the_product(offline_driver):
    def product(x: torch.Tensor, packed: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
        y = torch.ops.poetx.permute_columns(x, gather, True)
        return torch.ops.poetx.block_product(x, y, 3, 32, gather, gather)

    mode = FakeTensorMode()
    inputs = on_fake_gpu(mode, chunk=16)
    with mode:
        gm = make_fx(product)(*inputs)
    assert written(gm) == [["out"], ["out"]]


def test_both_products_of_a_folded_layer_are_one_launch(offline_driver):
    def products(x: torch.Tensor, packed: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
        stack = torch.ops.poetx.stacked_block_products(x, x, x, x, 3, 2, 32, gather, None)
        second = stack.narrow(0, 3, 2)  # indexing would need a build of torch with CUDA
        return second - stack.narrow(0, 0, 2)

    mode = FakeTensorMode()
    inputs = on_fake_gpu(mode, chunk=16)
    with mode:
        gm = make_fx(products)(*inputs)
    assert written(gm) == [["out"]]


def test_op_stays_a_call_where_written_arguments_are_unknown(offline_driver, caplog):
    from triton.runtime import driver

    mode = FakeTensorMode()
    inputs = on_fake_gpu(mode)
    with mode:
        gm = make_fx(rotated_layer)(*inputs)

    class Broken:
        def get_current_target(self) -> Any:
            raise RuntimeError("no target")

    driver.set_active(Broken())
    assert written(gm) == [None, None]
    assert "the op stays a call" in caplog.text
