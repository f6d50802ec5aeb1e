"""The Triton kernels compiled for a GPU that is not there: what they need of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from poetx_compile.ops import OPS, kernels
from tests.helpers.compiled import (
    A100,
    ADA,
    BLACKWELL,
    CONSUMER_BLACKWELL,
    HOPPER,
    compile_for,
    stack_bytes,
)
from tests.helpers.kernel_cases import (
    BF16,
    CASES,
    launches,
    meta,
    needs_triton,
    pair,
    rounded,
    skew,
)

pytestmark = needs_triton

SHARED_MEMORY = HOPPER.shared_memory

# Bytes a thread spills, as measured with the ptxas of each triton; all other kernels spill none.
_ROTATION = ("cayley_neumann, low precision, b 256", "rotation_kernel")
_DELTA = ("delta, b 256", "rotation_kernel")
_TAILS = ("fold both, b 192 and 128, tails", "fold_both_kernel")
# 64 elements a thread, twice: a few of them leave the registers.
_WIDEST = {("permute, widest", "permute_columns_kernel"): 144}
# Outside of its products, for a second program on a multiprocessor.
_PRODUCTS = ("orthogonalize, b 1024", "tiles_kernel")
SPILLED: dict[str, dict[tuple[str, str], int]] = {
    "3.6": _WIDEST | {_PRODUCTS: 88},
    "3.7": _WIDEST | {_ROTATION: 80, _DELTA: 88, _TAILS: 8, _PRODUCTS: 104},
    "3.8": _WIDEST | {_ROTATION: 80, _DELTA: 88, _TAILS: 8, _PRODUCTS: 64},
    "3.9": _WIDEST
    | {_ROTATION: 88, _DELTA: 88, _TAILS: 40, _PRODUCTS: 40}
    | {("fold bf16", "fold_both_kernel"): 96}
    | {("fold both, single columns, fp16", "fold_both_kernel"): 88},
}


@pytest.fixture
def compiled_launches(monkeypatch) -> list[Any]:
    """Every launch is compiled for compute capability 9.0 instead; gives the list of results."""
    return compile_for(monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_kernel_compiles_fits_and_spills_what_is_recorded(case, compiled_launches, tmp_path):
    import triton

    op, args = CASES[case]
    OPS[op].kernel.load()(*args)
    assert compiled_launches
    spilled = {}
    for kernel in compiled_launches:
        assert kernel.metadata.shared <= SHARED_MEMORY
        if stack := stack_bytes(kernel.asm["cubin"], tmp_path):
            spilled[case, kernel.metadata.name] = stack
    version = ".".join(triton.__version__.split(".")[:2])
    assert version in SPILLED, f"measure what spills with triton {version}, and record it"
    assert spilled == {key: n for key, n in SPILLED[version].items() if key[0] == case}


def test_spills_are_recorded_of_cases_that_exist():
    assert {case for spilled in SPILLED.values() for case, _ in spilled} <= set(CASES)


@pytest.mark.parametrize(
    ("dtype", "n", "m", "b", "chunk"),
    [
        (BF16, 512, 1024, 256, 64),
        (BF16, 2048, 4096, 1024, 16),
        (BF16, 99, 200, 77, 1),
        (torch.float32, 512, 1024, 256, 64),
    ],
)
def test_a_weight_is_turned_in_two_launches(dtype, n, m, b, chunk, compiled_launches, tmp_path):
    from poetx_compile.ops.kernels.turn_weight import turn_by_deltas

    deltas = [meta(size // b, b, b, dtype=dtype) for size in (m, n)]
    apply = torch.empty((), dtype=torch.int32, device="meta")
    given = *deltas, pair(m // chunk), pair(n // chunk), 5, 3, 1, apply
    turn_by_deltas(meta(n, m, dtype=dtype), *given)
    kernels = [k for k in compiled_launches if "permute" not in k.metadata.name]
    assert [k.metadata.name for k in kernels] == ["turn_rows_kernel", "turn_columns_kernel"]
    for kernel in kernels:
        assert kernel.metadata.shared <= SHARED_MEMORY
        assert kernel.asm["ttgir"].count("ttng.warp_group_dot ") == (1 if dtype == BF16 else 3)
        if chunk > 1:  # single columns need registers for their addresses
            assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0
            assert re.search(r"st\.global\S*\.v4", kernel.asm["ptx"])


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.int8])
def test_a_step_of_momenta_is_one_launch(dtype, compiled_launches, tmp_path):
    from poetx_compile.ops.kernels.muon import muon_steps
    from poetx_compile.ops.muon_step import Part

    b, blocks, parts = 256, 16, 9
    one = meta(blocks, b * (b - 1) // 2)
    scale = meta(blocks, 128) if dtype == torch.int8 else None
    some = [Part(one, one.to(dtype), scale)] * parts
    muon_steps(some, parts - 1, b, 0.95, 0.02, 2**63 - 1, 7)
    names = [kernel.metadata.name for kernel in compiled_launches]
    assert names == ["momentum_kernel", "unpack_kernel", "tiles_kernel", "pack_kernel"]
    momentum, *_, pack = compiled_launches
    assert stack_bytes(momentum.asm["cubin"], tmp_path) == 0
    assert re.search(r"ld\.global\S*\.v4", momentum.asm["ptx"])
    assert stack_bytes(pack.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_int8_is_rounded_again_in_one_launch(dtype, compiled_launches, tmp_path):
    step = torch.empty((), dtype=torch.int64, device="meta")
    stored = meta(1000, 512, dtype=torch.int8), meta(1000, 8, dtype=dtype)
    OPS["requantize_"].kernel.load()(*stored, meta(1000, 512), step, 5, 3)
    (rounding,) = compiled_launches
    assert stack_bytes(rounding.asm["cubin"], tmp_path) == 0
    assert re.search(r"ld\.global\S*\.v4", rounding.asm["ptx"])


@pytest.mark.parametrize(("b_in", "b_out"), [(256, 256), (128, 192)])
def test_blocks_of_middle_size_are_turned_in_one_launch(b_in, b_out, compiled_launches):
    from poetx_compile.ops.kernels import turn_layers

    weight, perms = meta(1024, 2048, dtype=BF16), (pair(32), pair(16))
    steps = [meta(size // b, b * (b - 1) // 2) for size, b in ((2048, b_in), (1024, b_out))]
    turn_layers.turn_weight_(weight, *steps, *perms, b_in, b_out, 3, 5, 3, 1, None, None)
    turn = compiled_launches[-1]
    assert turn.metadata.name == "turn_panels_kernel"
    assert turn.metadata.shared <= SHARED_MEMORY
    assert turn.asm["ttgir"].count("ttng.warp_group_dot ") == 2
    assert re.search(r"st\.global\S*\.v4", turn.asm["ptx"])


@pytest.mark.parametrize(
    ("dtype", "b", "chunk", "kind"),
    [(BF16, 256, 64, "resident"), (BF16, 1024, 64, "tiled"), (torch.float32, 256, 64, "tiled")],
)
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_one_side_is_turned_in_one_launch(side, dtype, b, chunk, kind, compiled_launches, tmp_path):
    from poetx_compile.ops.kernels import turn_layers

    weight = meta(2048, 2048, dtype=dtype)
    steps = [meta(2 * (side == name), b * (b - 1) // 2) for name in ("columns", "rows")]
    perms = pair(2048 // chunk), pair(2048 // chunk)
    apply = torch.empty((), dtype=torch.int32, device="meta")
    turn_layers.turn_weight_(weight, *steps, *perms, b, b, 3, 5, 3, 1, apply, None)
    turn = compiled_launches[-1]
    assert turn.metadata.name == f"turn_{side}_{kind}_kernel"
    assert turn.metadata.shared <= SHARED_MEMORY
    assert turn.asm["ttgir"].count("ttng.warp_group_dot ") == (1 if dtype == BF16 else 3)
    # The bits of 64x256 elements beside their sums do not fit; tiles that do are slower.
    assert stack_bytes(turn.asm["cubin"], tmp_path) <= (
        512 if (dtype, kind) == (BF16, "tiled") else 0
    )
    assert re.search(r"st\.global\S*\.v4", turn.asm["ptx"])
    assert "cp.async.cg.shared.global" in turn.asm["ptx"]


@pytest.mark.parametrize("b", [320, 1024])
def test_large_deltas_are_products_of_two_byte_operands(b, compiled_launches, tmp_path):
    from poetx_compile.ops.kernels.cayley import delta

    assert delta(skew(b), b, BF16, 2).dtype == BF16
    names = [kernel.metadata.name for kernel in compiled_launches]
    assert names == ["unpack_kernel", "square_kernel", "horner_step_kernel"]
    for kernel in compiled_launches:
        assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0
    for kernel in compiled_launches[1:]:
        assert kernel.asm["ttgir"].count("ttng.warp_group_dot ") == 1


@pytest.mark.parametrize("b", [2, 33, 77, 256])
def test_low_precision_kernels_need_the_shared_memory_they_ask_for(b, compiled_launches):
    from poetx_compile.ops.kernels.low_precision import LowPrecisionTiling

    OPS["cayley_neumann"].kernel.load()(skew(b), b, 3, True)
    OPS["cayley_neumann_backward"].kernel.load()(meta(4, b, b), skew(b), b, 3, True)
    tangent = OPS["rotation_tangent_backward"].kernel.load()
    tangent(meta(4, b, b), skew(b), b, 3, True, 2)
    assert len(compiled_launches) == 2 + 4 + 4
    # Rows of a few bytes are padded; a kernel of any size starts with a kilobyte.
    limit = max(LowPrecisionTiling(b).shared_bytes(), 4096)
    assert max(kernel.metadata.shared for kernel in compiled_launches) <= limit


@pytest.mark.parametrize(
    ("b", "order", "capacity"),
    [(257, 3, SHARED_MEMORY), (256, 2, SHARED_MEMORY), (256, 3, 99 * 1024)],
)
def test_where_low_precision_kernels_do_not_fit_the_precise_ones_run(
    b, order, capacity, compiled_launches, monkeypatch
):
    from poetx_compile.ops.kernels import low_precision

    monkeypatch.setattr(low_precision, "shared_memory", lambda: capacity)
    monkeypatch.setattr(kernels, "_triton_runs_on", lambda index: True)
    OPS["cayley_neumann"].kernel.load()(skew(b), b, order, True)
    names = [kernel.metadata.name for kernel in compiled_launches]
    assert names[:2] == ["unpack_kernel", "square_kernel"]
    with FakeTensorMode():
        grad, packed = (
            torch.empty(4, b, b, device="cuda"),
            torch.empty(skew(b).shape, device="cuda"),
        )
    assert not OPS["rotation_tangent_backward"].kernel.applies(grad, packed, b, order, True, 0)
    assert not OPS["rotation_delta"].kernel.applies(packed, b, order, BF16, 0)


def test_chain_of_products_keeps_all_warps_busy(compiled_launches):
    # 64 rows are four warps' share: the other four take half of the columns.
    OPS["cayley_neumann"].kernel.load()(skew(256), 256, 3, True)
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
    OPS["rotate_blocks"].kernel.load()(x, rotation, None, None, False)
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
        OPS[op].kernel.load()(*args)
    gathered, *rest = [k.asm["ptx"] for k in compiled_launches if "delta" not in k.metadata.name]
    assert not re.findall(r"(?:ld|st)\.global\S*\.b16", gathered)
    for plain in rest:
        vectors = [len(re.findall(r"cp\.async\.\S+.*0x10", ptx)) for ptx in (gathered, plain)]
        assert vectors[0] == vectors[1] > 0
    if op in ("rotate_blocks", "permute_columns"):
        assert re.search(r"st\.global\S*\.v4", gathered)


def test_stacked_products_share_one_loop(compiled_launches):
    x, wide = meta(512, 512, dtype=BF16), meta(512, 1024, dtype=BF16)
    OPS["stacked_block_products"].kernel.load()(x, x, wide, wide, 2, 4, 256, None, pair(64))
    (kernel,) = compiled_launches
    assert kernel.asm["ttgir"].count("ttng.warp_group_dot ") == 1


@pytest.mark.parametrize(
    ("target", "case", "kernel"),
    [
        (A100, "delta, b 256", "rotation_kernel"),
        (A100, "tangent, b 77", "conjugate_right_kernel"),
        (A100, "turn rows bf16, b 320, chunks", "turn_rows_tiled_kernel"),
        (A100, "skew products bf16, b 320", "block_product_kernel"),
        (BLACKWELL, "rotate bf16", "rotate_resident_kernel"),
        (BLACKWELL, "turn rows bf16, b 256, chunks", "turn_rows_resident_kernel"),
        (CONSUMER_BLACKWELL, "rotate bf16", "rotate_kernel"),
        (CONSUMER_BLACKWELL, "product bf16", "block_product_kernel"),
        (CONSUMER_BLACKWELL, "turn both sides bf16, b 256, chunks", "turn_rows_kernel"),
    ],
)
def test_another_gpu_gets_tiles_that_fit_it(target, case, kernel, monkeypatch, tmp_path):
    compiled = compile_for(monkeypatch, target, kernel)
    launches()[case]()
    assert compiled
    for one in compiled:
        assert one.metadata.shared <= target.shared_memory
        assert stack_bytes(one.asm["cubin"], tmp_path) == 0


def test_where_a_block_or_row_fits_into_no_shared_memory_the_reference_runs(monkeypatch):
    cases = "tangent, b 256", "permute, widest"
    for target, takes in ((HOPPER, True), (A100, True), (ADA, False)):
        compile_for(monkeypatch, target)
        taken = [OPS[op].kernel.takes(*args) for op, args in (CASES[case] for case in cases)]
        assert taken == [takes, takes]
    assert OPS["permute_columns"].kernel.takes(meta(8, 16384), pair(16384), False)


@pytest.mark.parametrize(("target", "tile"), [(HOPPER, 256), (A100, 256), (ADA, 128)])
def test_less_shared_memory_makes_tiles_of_products_narrower(target, tile, monkeypatch):
    from poetx_compile.ops.kernels.block_product import plan

    compile_for(monkeypatch, target)
    assert plan(8192, 4096, 16, 256, True).tile_n == tile


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
    OPS["cayley_neumann"].kernel.load()(skew(64), 64, 3)
    _, square, polynomial = compiled_launches
    for kernel in (square, polynomial):
        products = kernel.asm["ttgir"].count("ttng.warp_group_dot ")
        assert products == 3 * 1, kernel.asm["ttgir"]


def both_sides(width: int, b_in: int, b_out: int) -> tuple[Any, ...]:
    """Arguments of `fold_weight` with rotations on both sides."""
    deltas = rounded(width // b_in, b_in), rounded(512 // b_out, b_out)
    perm_in = pair(width // 16) if width % 16 == 0 else None
    return (meta(512, width, dtype=BF16), *deltas, perm_in, pair(512), BF16)


@pytest.mark.parametrize("b", [72, 128, 256])
def test_fold_of_both_sides_is_one_launch_that_fits(b, compiled_launches):
    from poetx_compile.ops.kernels.fold_both import FoldTiling

    OPS["fold_weight"].kernel.load()(*both_sides(512, b, 256))
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
    OPS["fold_weight"].kernel.load()(*both_sides(width, b_in, b_out))
    names = [kernel.metadata.name for kernel in compiled_launches]
    assert "fold_both_kernel" not in names
    assert any(name.startswith("rotate") for name in names)
