"""Arguments of the Triton kernels: every kind of launch, compiled by several test modules."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

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
    "cayley forward, b 256": ("cayley_neumann", (skew(256), 256, 3)),
    "cayley backward, b 256": ("cayley_neumann_backward", (meta(4, 256, 256), skew(256), 256, 3)),
    "cayley forward, b 77": ("cayley_neumann", (skew(77), 77, 3)),
    "cayley backward, b 77": ("cayley_neumann_backward", (meta(4, 77, 77), skew(77), 77, 3)),
    "cayley backward, b 2": ("cayley_neumann_backward", (meta(4, 2, 2), skew(2), 2, 3)),
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
