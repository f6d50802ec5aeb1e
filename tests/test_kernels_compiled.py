"""The Triton kernels compiled for a GPU that is not there: resources, and Inductor's nodes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from poetx_compile.lowerings import ExpandOps
from poetx_compile.ops import kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

# Shared memory a program may use on compute capability 9.0, in bytes.
SHARED_MEMORY = 227 * 1024

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def skew(b: int) -> torch.Tensor:
    return meta(4, b * (b - 1) // 2)


def pair(width: int) -> torch.Tensor:
    return meta(2, width, dtype=torch.int64)


BF16 = torch.bfloat16
CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "cayley forward, b 256": ("cayley_neumann", (skew(256), 256, 3)),
    "cayley backward, b 256": ("cayley_neumann_backward", (meta(4, 256, 256), skew(256), 256, 3)),
    "cayley backward, b 2": ("cayley_neumann_backward", (meta(4, 2, 2), skew(2), 2, 3)),
    "rotate bf16": (
        "rotate_blocks",
        (meta(512, 4096, dtype=BF16), meta(16, 256, 256), None, None, True),
    ),
    "rotate fp32, odd": ("rotate_blocks", (meta(99, 100), meta(3, 33, 33), None, None, True)),
    "product bf16": (
        "block_product",
        (meta(512, 4096, dtype=BF16), meta(512, 4096, dtype=BF16), 16, 256, None, None),
    ),
    "product fp32": ("block_product", (meta(512, 128), meta(512, 128), 2, 64, None, None)),
    "permute, widest": ("permute_columns", (meta(4096, 32768, dtype=BF16), pair(32768), False)),
    "permute fp32, odd": ("permute_columns", (meta(4096, 77), pair(77), False)),
}


@pytest.fixture
def compiled_launches(monkeypatch, tmp_path) -> list[Any]:
    """Every launch is compiled for compute capability 9.0 instead; gives the list of results."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from poetx_compile.ops.kernels import block_product, cayley, permute, rotate

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    results: list[Any] = []

    def compile_launch(
        kernel: Any, programs: int, *args: Any, num_warps: int, num_stages: int, **constants: Any
    ) -> None:
        assert programs > 0
        signature = dict.fromkeys(constants, "constexpr")
        aligned: dict[tuple[int], Any] = {}
        for position, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = TYPES[value.dtype] if is_tensor else "i32"
            if is_tensor or value % 16 == 0:
                aligned[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        results.append(triton.compile(source, GPUTarget("cuda", 90, 32), options))

    for module in (block_product, cayley, permute, rotate):
        monkeypatch.setattr(module, "launch", compile_launch)
    return results


@pytest.mark.parametrize("case", CASES)
def test_kernel_compiles_and_fits(case, compiled_launches):
    op, args = CASES[case]
    kernels.implementation(op)(*args)
    assert compiled_launches
    for kernel in compiled_launches:
        assert kernel.metadata.shared <= SHARED_MEMORY
        assert "cubin" in kernel.asm


def test_precision_of_fp32_products_is_three_tf32_products(compiled_launches):
    kernels.implementation("cayley_neumann")(skew(64), 64, 3)
    square, polynomial = compiled_launches
    for kernel in (square, polynomial):
        products = kernel.asm["ttgir"].count("ttng.warp_group_dot ")
        assert products == 3 * 1, kernel.asm["ttgir"]


class OfflineDriver:
    """What Triton asks a driver when it only compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def offline_driver(monkeypatch) -> Iterator[None]:
    from triton.runtime import driver

    monkeypatch.setattr(kernels, "_triton_runs_on", lambda index: True)
    before = driver._active
    driver.set_active(OfflineDriver())
    yield
    driver._active = before


def rotated_layer(x: torch.Tensor, packed: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
    rotation = torch.ops.poetx.cayley_neumann(packed, 32, 3)
    return torch.ops.poetx.rotate_blocks(x, rotation, gather, None, False)


def on_fake_gpu(mode: FakeTensorMode) -> list[torch.Tensor]:
    with mode:
        return [
            torch.empty(8, 64, 100, device="cuda", dtype=torch.bfloat16),
            torch.empty(3, 32 * 31 // 2, device="cuda"),
            torch.empty(2, 100, device="cuda", dtype=torch.int64),
        ]


def test_ops_become_launches_that_write_their_outputs_alone(offline_driver):
    mode = FakeTensorMode()
    inputs = on_fake_gpu(mode)
    with mode:
        gm = make_fx(rotated_layer)(*inputs)
    ExpandOps()(gm.graph)
    gm.graph.lint()
    assert "poetx" not in str(gm.graph)
    launches = gm.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.triton_kernel_wrapper_functional
    )
    # Two for the rotation; permute, round G - I, rotate.
    assert len(launches) == 5
    assert all(node.kwargs["tensors_to_clone"] == ["out"] for node in launches)
    (result,) = gm.graph.output_node().all_input_nodes
    assert result.meta["val"].shape == (8, 64, 100)
    assert result.meta["val"].dtype == torch.bfloat16


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
    ExpandOps()(gm.graph)
    assert "poetx.cayley_neumann" in str(gm.graph)
    assert "poetx.rotate_blocks" in str(gm.graph)
    assert "the op stays a call" in caplog.text
