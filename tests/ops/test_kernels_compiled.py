"""The Triton kernels compiled for a GPU that is not there: resources, and Inductor's nodes."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from poetx_compile.compile.lowerings import ExpandOps
from poetx_compile.compile.lowerings.trace import RESULT, arguments, trace_launches, written_by
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


def narrow(blocks: int, b: int) -> torch.Tensor:
    return meta(blocks, b, b, dtype=BF16)


def stacked(widths: tuple[int, int], b: int, chunk: int | None) -> tuple[Any, ...]:
    """Arguments of `stacked_block_products`."""
    operands = [meta(512, widths[i], dtype=BF16) for i in (0, 0, 1, 1)]
    gathers = [chunk and pair(width // chunk) for width in widths]
    return *operands, *(width // b for width in widths), b, *gathers


CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "cayley forward, b 256": ("cayley_neumann", (skew(256), 256, 3)),
    "cayley backward, b 256": ("cayley_neumann_backward", (meta(4, 256, 256), skew(256), 256, 3)),
    "cayley forward, b 77": ("cayley_neumann", (skew(77), 77, 3)),
    "cayley backward, b 77": ("cayley_neumann_backward", (meta(4, 77, 77), skew(77), 77, 3)),
    "cayley backward, b 2": ("cayley_neumann_backward", (meta(4, 2, 2), skew(2), 2, 3)),
    **{
        f"{op}, narrow, b {b}": (op, (*grad, skew(b), b, 3, True))
        for b in (2, 77, 256)
        for op, grad in (
            ("cayley_neumann", ()),
            ("cayley_neumann_backward", (meta(4, b, b),)),
        )
    },
    **{
        f"tangent, b {b}": ("rotation_tangent_backward", (meta(4, b, b), skew(b), b, 3, True, 2))
        for b in (2, 77, 256)
    },
    "rotate bf16": (
        "rotate_blocks",
        (meta(512, 4096, dtype=BF16), meta(16, 256, 256), None, None, True),
    ),
    "rotate bf16, b 192 and a tail": (
        "rotate_blocks",
        (meta(512, 496, dtype=BF16), meta(2, 192, 192), None, None, False),
    ),
    "rotate bf16, b 512": (
        "rotate_blocks",
        (meta(512, 1104, dtype=BF16), meta(2, 512, 512), None, None, True),
    ),
    "rotate bf16, b 512, odd width": (
        "rotate_blocks",
        (meta(512, 1101, dtype=BF16), meta(2, 512, 512), None, None, True),
    ),
    "rotate bf16, odd": (
        "rotate_blocks",
        (meta(99, 200, dtype=BF16), meta(2, 77, 77), None, None, True),
    ),
    "rotate bf16, chunks": (
        "rotate_blocks",
        (meta(512, 4096, dtype=BF16), meta(16, 256, 256), pair(256), pair(256), True),
    ),
    "rotate bf16, b 192, chunks and a tail": (
        "rotate_blocks",
        (meta(512, 496, dtype=BF16), meta(2, 192, 192), pair(31), pair(31), False),
    ),
    "rotate bf16, b 512, chunks": (
        "rotate_blocks",
        (meta(512, 1104, dtype=BF16), meta(2, 512, 512), pair(69), pair(69), True),
    ),
    "rotate bf16, chunks of 8, odd width": (
        "rotate_blocks",
        (meta(512, 1032, dtype=BF16), meta(4, 256, 256), pair(129), pair(129), False),
    ),
    "rotate fp32, chunks": (
        "rotate_blocks",
        (meta(99, 512), meta(2, 256, 256), pair(32), pair(32), True),
    ),
    "rotate fp32": ("rotate_blocks", (meta(99, 512), meta(2, 256, 256), None, None, True)),
    "rotate fp32, odd": ("rotate_blocks", (meta(99, 100), meta(3, 33, 33), None, None, True)),
    "product bf16": (
        "block_product",
        (meta(512, 4096, dtype=BF16), meta(512, 4096, dtype=BF16), 16, 256, None, None),
    ),
    "product bf16, chunks": (
        "block_product",
        (meta(512, 496, dtype=BF16), meta(512, 496, dtype=BF16), 2, 192, pair(31), pair(31)),
    ),
    "product bf16, b 128": (
        "block_product",
        (meta(512, 512, dtype=BF16), meta(512, 512, dtype=BF16), 4, 128, None, pair(32)),
    ),
    "product bf16, odd": (
        "block_product",
        (meta(512, 1101, dtype=BF16), meta(512, 1101, dtype=BF16), 4, 256, None, None),
    ),
    "product fp32, chunks": (
        "block_product",
        (meta(512, 512), meta(512, 512, dtype=BF16), 2, 256, pair(32), pair(32)),
    ),
    "product fp32": ("block_product", (meta(512, 128), meta(512, 128), 2, 64, None, None)),
    "stacked products bf16": ("stacked_block_products", stacked((4096, 1024), 256, None)),
    "stacked products bf16, chunks": ("stacked_block_products", stacked((1024, 4096), 256, 16)),
    "stacked products bf16, b 192": ("stacked_block_products", stacked((496, 1008), 192, 16)),
    "stacked products bf16, odd": ("stacked_block_products", stacked((1101, 515), 256, None)),
    "stacked products fp32, chunks": (
        "stacked_block_products",
        (*[meta(512, 512)] * 2, *[meta(512, 256)] * 2, 2, 1, 256, pair(32), pair(16)),
    ),
    "fold bf16": (
        "fold_weight",
        (
            meta(1024, 512, dtype=BF16),
            meta(2, 256, 256, dtype=BF16),
            meta(4, 256, 256, dtype=BF16),
            pair(32),
            pair(64),
            BF16,
        ),
    ),
    "fold both, single columns, fp16": (
        "fold_weight",
        (
            meta(512, 1024, dtype=torch.float16),
            meta(4, 256, 256, dtype=torch.float16),
            meta(2, 256, 256, dtype=torch.float16),
            pair(1024),
            pair(512),
            torch.float16,
        ),
    ),
    "fold both, b 192 and 128, tails": (
        "fold_weight",
        (meta(1000, 496), narrow(2, 192), narrow(7, 128), pair(62), None, BF16),
    ),
    "fold both, b 128 and 248, tails": (
        "fold_weight",
        (meta(1000, 528, dtype=BF16), narrow(4, 128), narrow(4, 248), None, None, BF16),
    ),
    "fold one after the other, odd": (
        "fold_weight",
        (meta(99, 200, dtype=BF16), narrow(2, 77), narrow(1, 77), None, pair(99), BF16),
    ),
    "fold rows with a tail, b 192": (
        "fold_weight",
        (meta(496, 512, dtype=BF16), None, narrow(2, 192), None, pair(496), BF16),
    ),
    "fold columns, b 192": (
        "fold_weight",
        (meta(512, 496, dtype=BF16), narrow(2, 192), None, pair(62), None, BF16),
    ),
    "fold columns, odd": (
        "fold_weight",
        (meta(512, 499, dtype=BF16), narrow(6, 77), None, pair(499), None, BF16),
    ),
    **{f"delta, b {b}": ("rotation_delta", (skew(b), b, 3, BF16, 2)) for b in (2, 77, 256)},
    "permute, widest": ("permute_columns", (meta(4096, 32768, dtype=BF16), pair(32768), False)),
    "permute, chunks": ("permute_columns", (meta(4096, 53248, dtype=BF16), pair(3328), False)),
    "permute fp32, chunks of 8": ("permute_columns", (meta(4096, 1032), pair(129), True)),
    "permute fp32, odd": ("permute_columns", (meta(4096, 77), pair(77), False)),
}

# 64 elements a thread, twice: a few of them leave the registers.
SPILLING = {"permute, widest"}


@pytest.fixture
def compiled_launches(monkeypatch, tmp_path) -> list[Any]:
    """Every launch is compiled for compute capability 9.0 instead; gives the list of results."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from poetx_compile.ops.kernels import (
        block_product,
        cayley,
        cayley_narrow,
        fold,
        fold_both,
        permute,
        rotate,
        tangent,
    )

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

    modules = (block_product, cayley, cayley_narrow, fold, fold_both, permute, rotate, tangent)
    for module in modules:
        monkeypatch.setattr(module, "launch", compile_launch)
    return results


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of stack a thread uses: registers that did not fit."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", report)[0])


@pytest.mark.parametrize("case", CASES)
def test_kernel_compiles_and_fits(case, compiled_launches, tmp_path):
    op, args = CASES[case]
    kernels.implementation(op)(*args)
    assert compiled_launches
    for kernel in compiled_launches:
        assert kernel.metadata.shared <= SHARED_MEMORY
        stack = stack_bytes(kernel.asm["cubin"], tmp_path)
        assert stack == 0 or case in SPILLING, f"{kernel.metadata.name} spills {stack} bytes"


@pytest.mark.parametrize("b", [2, 33, 77, 256])
def test_narrow_kernels_need_the_shared_memory_they_ask_for(b, compiled_launches):
    from poetx_compile.ops.kernels.narrow import NarrowTiling

    kernels.implementation("cayley_neumann")(skew(b), b, 3, True)
    kernels.implementation("cayley_neumann_backward")(meta(4, b, b), skew(b), b, 3, True)
    tangent = kernels.implementation("rotation_tangent_backward")
    tangent(meta(4, b, b), skew(b), b, 3, True, 2)
    assert len(compiled_launches) == 2 + 4 + 4
    # Rows of a few bytes are padded; a kernel of any size starts with a kilobyte.
    limit = max(NarrowTiling(b).shared_bytes(), 4096)
    assert max(kernel.metadata.shared for kernel in compiled_launches) <= limit


@pytest.mark.parametrize(
    ("b", "order", "capacity"),
    [(257, 3, SHARED_MEMORY), (256, 2, SHARED_MEMORY), (256, 3, 99 * 1024)],
)
def test_where_narrow_kernels_do_not_fit_the_precise_ones_run(
    b, order, capacity, compiled_launches, monkeypatch
):
    from poetx_compile.ops.kernels import narrow

    monkeypatch.setattr(narrow, "shared_memory", lambda: capacity)
    monkeypatch.setattr(kernels, "_triton_runs_on", lambda index: True)
    kernels.implementation("cayley_neumann")(skew(b), b, order, True)
    names = [kernel.metadata.name for kernel in compiled_launches]
    assert names[:2] == ["unpack_kernel", "square_kernel"]
    with FakeTensorMode():
        grad, packed = (
            torch.empty(4, b, b, device="cuda"),
            torch.empty(skew(b).shape, device="cuda"),
        )
    assert not kernels.applies("rotation_tangent_backward", grad, packed, b, order, True)
    assert not kernels.applies("rotation_delta", packed, b, order, BF16, 0)


def test_chain_of_products_keeps_all_warps_busy(compiled_launches):
    # 64 rows are four warps' share: the other four take half of the columns.
    kernels.implementation("cayley_neumann")(skew(256), 256, 3, True)
    assembly = compiled_launches[1].asm["ttgir"]
    assert "warpsPerCTA = [4, 2]" in assembly
    assert assembly.count("ttng.warp_group_dot ") == 1  # in a loop


@pytest.mark.parametrize(
    ("b", "capacity", "name"),
    [
        (256, SHARED_MEMORY, "rotate_resident_kernel"),
        (256, 163 * 1024, "rotate_kernel"),  # compute capability 8.0
        (128, 99 * 1024, "rotate_resident_kernel"),  # 8.6, 8.9, 12.0
        (128, 64 * 1024, "rotate_kernel"),
    ],
)
def test_rotation_takes_the_kernel_that_fits(b, capacity, name, compiled_launches, monkeypatch):
    from poetx_compile.ops.kernels import rotate

    monkeypatch.setattr(rotate, "shared_memory", lambda: capacity)
    x, rotation = meta(512, 512, dtype=BF16), meta(512 // b, b, b)
    kernels.implementation("rotate_blocks")(x, rotation, None, None, False)
    last = compiled_launches[-1].metadata
    assert last.name == name
    # `rotate_kernel` on less than 99 KiB would be Triton's error to report: compiled for 9.0 here.
    assert last.shared <= max(capacity, 99 * 1024)


@pytest.mark.parametrize(
    "op", ["rotate_blocks", "block_product", "stacked_block_products", "permute_columns"]
)
@pytest.mark.parametrize("chunk", [8, 16])
def test_chunks_travel_as_whole_vectors(op, chunk, compiled_launches):
    x, pairs = meta(512, 1024, dtype=BF16), [pair(1024 // chunk)] * 2
    arguments: dict[str, list[tuple[Any, ...]]] = {
        "rotate_blocks": [(x, meta(4, 256, 256), *given, False) for given in (pairs, (None, None))],
        "block_product": [(x, x, 4, 256, *given) for given in (pairs, (None, None))],
        "stacked_block_products": [
            (x, x, x, x, 4, 4, 256, *given) for given in (pairs, (None, None))
        ],
        "permute_columns": [(x, pairs[0], False)],
    }
    for args in arguments[op]:
        kernels.implementation(op)(*args)
    gathered, *rest = [k.asm["ptx"] for k in compiled_launches if "delta" not in k.metadata.name]
    assert not re.findall(r"(?:ld|st)\.global\S*\.b16", gathered)
    for plain in rest:
        vectors = [len(re.findall(r"cp\.async\.\S+.*0x10", ptx)) for ptx in (gathered, plain)]
        assert vectors[0] == vectors[1] > 0
    if op in ("rotate_blocks", "permute_columns"):
        assert re.search(r"st\.global\S*\.v4", gathered)


def test_stacked_products_share_one_loop(compiled_launches):
    x, wide = meta(512, 512, dtype=BF16), meta(512, 1024, dtype=BF16)
    kernels.implementation("stacked_block_products")(x, x, wide, wide, 2, 4, 256, None, pair(64))
    (kernel,) = compiled_launches
    assert kernel.asm["ttgir"].count("ttng.warp_group_dot ") == 1


def test_a_device_with_less_shared_memory_gets_narrower_tiles(compiled_launches, monkeypatch):
    from poetx_compile.ops.kernels import block_product

    x = meta(8192, 4096, dtype=BF16)
    for capacity, tile in ((SHARED_MEMORY, 256), (163 * 1024, 256), (99 * 1024, 128)):
        monkeypatch.setattr(block_product, "shared_memory", lambda capacity=capacity: capacity)
        assert block_product.plan(8192, 4096, 16, 256, True).tile_n == tile
        kernels.implementation("block_product")(x, x, 16, 256, None, None)
        assert compiled_launches[-1].metadata.shared <= capacity


@pytest.mark.parametrize(
    ("tokens", "blocks", "tile", "splits"),
    [
        (2048, 16, (64, 128), 1),
        (2048, 32, (128, 128), 1),
        (2048, 56, (128, 256), 1),
        (8192, 16, (128, 256), 4),
        (8192, 32, (128, 256), 2),
        (8192, 56, (128, 256), 1),
    ],
)
def test_products_of_few_tokens_fill_the_device_without_splits(tokens, blocks, tile, splits):
    from poetx_compile.ops.kernels.block_product import plan

    division = plan(tokens, 4096, blocks, 256, True)
    assert (division[:2], division.splits) == (tile, splits)


def test_precision_of_fp32_products_is_three_tf32_products(compiled_launches):
    kernels.implementation("cayley_neumann")(skew(64), 64, 3)
    _, square, polynomial = compiled_launches
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


def written(gm: torch.fx.GraphModule) -> list[list[str] | None]:
    """What each launch writes that the ops of a graph become; ``None`` for an op that stays."""
    ExpandOps()(gm.graph)
    gm.graph.lint()
    found: list[list[str] | None] = []
    for node in gm.graph.nodes:
        name = str(node.target).removeprefix("poetx.").removesuffix(".default")
        if name in kernels.OPS:
            values = map_arg(arguments(node), lambda n: n.meta["val"])
            launches = trace_launches(name, values)
            result = launches and launches.meta[RESULT].meta["val"]
            assert result is None or (result.shape, result.dtype, result.stride()) == (
                node.meta["val"].shape,
                node.meta["val"].dtype,
                node.meta["val"].stride(),
            )
            found += [None] if launches is None else written_by(launches)
    return found


@pytest.mark.parametrize("case", CASES)
def test_kernels_write_what_is_called_out_and_nothing_else(case, offline_driver):
    op, args = CASES[case]
    mode = FakeTensorMode()
    with mode:
        fake = [
            torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, torch.Tensor) else a
            for a in args
        ]
    traced = trace_launches(op, tuple(fake))
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
    # Three for the rotation; permute (single columns alone), round G - I, rotate.
    assert written(gm) == [["out"], ["p_out", "h_out"], *[["out"]] * (4 if chunk == 1 else 3)]


def tangent_gradient(packed: torch.Tensor, grad: torch.Tensor, narrow: bool) -> torch.Tensor:
    return torch.ops.poetx.rotation_tangent_backward(grad, packed, 32, 3, narrow)


@pytest.mark.parametrize("narrow", [False, True])
def test_narrow_tangents_become_launches(narrow, offline_driver):
    mode = FakeTensorMode()
    with mode:
        packed = torch.empty(3, 32 * 31 // 2, device="cuda")
        grad = torch.empty(3, 32, 32, device="cuda")
        gm = make_fx(tangent_gradient)(packed, grad, narrow)
    kernel = [["q_out", "s_out", "a_out"], ["f_out", "h_out", "t_out"], ["d_out", "v_out"], ["out"]]
    assert written(gm) == (kernel if narrow else [])  # the reference elsewhere
    assert ("poetx" in str(gm.graph)) == narrow


def both_sides(width: int, b_in: int, b_out: int) -> tuple[Any, ...]:
    """Arguments of `fold_weight` with rotations on both sides."""
    deltas = narrow(width // b_in, b_in), narrow(512 // b_out, b_out)
    perm_in = pair(width // 16) if width % 16 == 0 else None
    return (meta(512, width, dtype=BF16), *deltas, perm_in, pair(512), BF16)


@pytest.mark.parametrize("b", [72, 128, 256])
def test_fold_of_both_sides_is_one_launch_that_fits(b, compiled_launches):
    from poetx_compile.ops.kernels.fold_both import FoldTiling

    kernels.implementation("fold_weight")(*both_sides(512, b, 256))
    (fold,) = compiled_launches
    assert fold.metadata.name == "fold_both_kernel"
    assert fold.metadata.shared <= FoldTiling().shared_bytes(b)
    assert fold.asm["ttgir"].count("ttng.warp_group_dot ") == 2  # one in the loop, one behind it
    assert re.search(r"st\.global\S*\.v4", fold.asm["ptx"])


@pytest.mark.parametrize(
    ("width", "b_in", "b_out", "capacity"),
    [
        (512, 256, 256, 163 * 1024),  # compute capability 8.0
        (512, 64, 256, SHARED_MEMORY),
        (1024, 256, 512, SHARED_MEMORY),
        (520, 256, 256, SHARED_MEMORY),
        (512, 100, 256, SHARED_MEMORY),
    ],
)
def test_sides_that_do_not_fit_are_folded_one_after_the_other(
    width, b_in, b_out, capacity, compiled_launches, monkeypatch
):
    from poetx_compile.ops.kernels import fold, fold_both, rotate

    for module in (fold, fold_both, rotate):
        monkeypatch.setattr(module, "shared_memory", lambda: capacity)
    kernels.implementation("fold_weight")(*both_sides(width, b_in, b_out))
    names = [kernel.metadata.name for kernel in compiled_launches]
    assert "fold_both_kernel" not in names
    assert any(name.startswith("rotate") for name in names)


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
        return stack[3:] - stack[:2]

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
