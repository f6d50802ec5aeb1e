"""Arguments of the Triton kernels: every kind of launch, compiled by several test modules."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from poetx_compile.ops import OPS

# Not where it is merely not installed: the `test` extra brings it.
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux alone")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def skew(b: int) -> torch.Tensor:
    return meta(4, b * (b - 1) // 2)


def pair(width: int) -> torch.Tensor:
    return meta(2, width, dtype=torch.int64)


BF16 = torch.bfloat16


def rounded(blocks: int, b: int) -> torch.Tensor:
    return meta(blocks, b, b, dtype=BF16)


def stacked(widths: tuple[int, int], b: int, chunk: int | None) -> tuple[Any, ...]:
    """Arguments of `stacked_block_products`."""
    operands = [meta(512, widths[i], dtype=BF16) for i in (0, 0, 1, 1)]
    gathers = [chunk and pair(width // chunk) for width in widths]
    return *operands, *(width // b for width in widths), b, *gathers


def skewed(widths: tuple[int, int], b: int, chunk: int | None) -> tuple[Any, ...]:
    """Arguments of `skew_block_products`, of two products."""
    x, y, x2, y2, blocks, blocks2, _, gather, gather2 = stacked(widths, b, chunk)
    return x, y, blocks, b, gather, x2, y2, blocks2, gather2


CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "cayley forward, b 256": ("cayley_neumann", (skew(256), 256, 3, False)),
    "cayley backward, b 256": (
        "cayley_neumann_backward",
        (meta(4, 256, 256), skew(256), 256, 3, False),
    ),
    "cayley forward, b 77": ("cayley_neumann", (skew(77), 77, 3, False)),
    "cayley backward, b 77": ("cayley_neumann_backward", (meta(4, 77, 77), skew(77), 77, 3, False)),
    "cayley backward, b 2": ("cayley_neumann_backward", (meta(4, 2, 2), skew(2), 2, 3, False)),
    **{
        f"{op}, low precision, b {b}": (op, (*grad, skew(b), b, 3, True))
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
    **{
        f"rotate by delta, b {b}": (
            "rotate_by_delta",
            (meta(512, 1024, dtype=BF16), rounded(1024 // b, b), chunks, chunks, transpose),
        )
        for b, chunks, transpose in ((256, pair(64), True), (512, None, True), (77, None, False))
    },
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
    **{
        f"skew products bf16, b {b}": ("skew_block_products", skewed((b * 2, b * 4), b, chunk))
        for b, chunk in ((1024, 64), (512, 16), (320, None))
    },
    "skew products fp32, one side": (
        "skew_block_products",
        (meta(512, 77), meta(512, 77), 1, 77, pair(77), None, None, 0, None),
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
        (meta(1000, 496), rounded(2, 192), rounded(7, 128), pair(62), None, BF16),
    ),
    "fold both, b 128 and 248, tails": (
        "fold_weight",
        (meta(1000, 528, dtype=BF16), rounded(4, 128), rounded(4, 248), None, None, BF16),
    ),
    "fold one after the other, odd": (
        "fold_weight",
        (meta(99, 200, dtype=BF16), rounded(2, 77), rounded(1, 77), None, pair(99), BF16),
    ),
    "fold rows with a tail, b 192": (
        "fold_weight",
        (meta(496, 512, dtype=BF16), None, rounded(2, 192), None, pair(496), BF16),
    ),
    "fold columns, b 192": (
        "fold_weight",
        (meta(512, 496, dtype=BF16), rounded(2, 192), None, pair(62), None, BF16),
    ),
    "fold columns, odd": (
        "fold_weight",
        (meta(512, 499, dtype=BF16), rounded(6, 77), None, pair(499), None, BF16),
    ),
    **{f"delta, b {b}": ("rotation_delta", (skew(b), b, 3, BF16, 2)) for b in (2, 77, 256)},
    **{f"orthogonalize, b {b}": ("orthogonalize_skew", (skew(b), b)) for b in (2, 77, 320, 1024)},
    "permute, widest": ("permute_columns", (meta(4096, 32768, dtype=BF16), pair(32768), False)),
    "permute, chunks": ("permute_columns", (meta(4096, 53248, dtype=BF16), pair(3328), False)),
    "permute fp32, chunks of 8": ("permute_columns", (meta(4096, 1032), pair(129), True)),
    "permute fp32, odd": ("permute_columns", (meta(4096, 77), pair(77), False)),
}


def momenta(b: int, dtype: torch.dtype) -> None:
    """A step of two parts of eight blocks, of which one turns."""
    from poetx_compile.ops.kernels.muon import muon_steps
    from poetx_compile.ops.muon_step import Part

    planes = meta(8, b * (b - 1) // 2)
    scale = meta(8, 128) if dtype == torch.int8 else None
    muon_steps([Part(planes, planes.to(dtype), scale)] * 2, 1, b, 0.95, 0.02, 3, 7)


def turn(dtype: torch.dtype, b: int, chunk: int, blocks: tuple[int, int]) -> None:
    """A weight of two blocks a side, turned by so many of them."""
    from poetx_compile.ops.kernels.turn_layers import turn_weight_

    steps = [meta(count, b * (b - 1) // 2) for count in blocks]
    perms = [pair(2 * b // chunk)] * 2
    apply = torch.empty((), dtype=torch.int32, device="meta")
    turn_weight_(meta(2 * b, 2 * b, dtype=dtype), *steps, *perms, b, b, 3, 5, 3, 1, apply, None)


def requantize(dtype: torch.dtype) -> None:
    step = torch.empty((), dtype=torch.int64, device="meta")
    stored = meta(1024, 512, dtype=torch.int8), meta(1024, 8, dtype=dtype)
    OPS["requantize_"].kernel.load()(*stored, meta(1024, 512), step, 5, 3)


def of_case(case: str) -> None:
    """Those of `CASES` that a kernel takes on the device that is asked."""
    op, args = CASES[case]
    if OPS[op].kernel.takes(*args):
        OPS[op].kernel.load()(*args)


def launches() -> dict[str, Callable[[], None]]:
    """Every kind of launch: of the ops, and of what optimisers call."""
    found: dict[str, Callable[[], None]] = {case: lambda c=case: of_case(c) for case in CASES}
    dtypes = {"fp32": torch.float32, "bf16": BF16, "int8": torch.int8}
    for name, dtype in dtypes.items():
        found[f"momenta {name}"] = lambda dtype=dtype: momenta(64, dtype)
    sides = {"both sides": (2, 2), "columns": (2, 0), "rows": (0, 2)}
    aligned = (64, 16), (128, 16), (256, 16), (320, 16), (512, 64), (1024, 64)
    sizes = *aligned, (77, 1), (256, 1), (1024, 1)
    for (side, blocks), (b, chunk), name in itertools.product(
        sides.items(), sizes, ("bf16", "fp32")
    ):
        given = dtypes[name], b, chunk, blocks
        chunks = "" if chunk == 1 else ", chunks"
        found[f"turn {side} {name}, b {b}{chunks}"] = lambda given=given: turn(*given)
    for name in ("bf16", "fp32"):
        found[f"requantize {name}"] = lambda dtype=dtypes[name]: requantize(dtype)
    return found
