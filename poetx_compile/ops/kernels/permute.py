"""Triton kernel of `permute_columns`: the row lies in shared memory while it is permuted.

A gather of single 2-byte columns from global memory runs at a sixth of the copy bandwidth: every
lane of a load touches a cache line of its own. Here rows are read and written in order and only
shared memory is indexed at random. Two rows of 2-byte elements travel as one row of 4-byte words,
which halves the random accesses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import ceil_div, known, launch, power_of_two


@triton.jit
def permute_columns_kernel(
    x,  # [tokens, WIDTH], 2- or 4-byte elements
    index,  # int64 [WIDTH]
    out,  # like x
    tokens,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two >= WIDTH
    STEPS: tl.constexpr,  # of one row, or of two 2-byte rows
    PAIRED: tl.constexpr,
):
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    source = tl.load(index + columns, mask=inside, other=0).to(tl.int32)
    rows_a_step: tl.constexpr = 2 if PAIRED else 1
    first = tl.program_id(0).to(tl.int64) * (STEPS * rows_a_step)
    for step in range(STEPS):
        row = first + step * rows_a_step
        here = inside & (row < tokens)
        at = row * WIDTH + columns
        if PAIRED:
            second = inside & (row + 1 < tokens)
            low = tl.load(x + at, mask=here).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            high = tl.load(x + at + WIDTH, mask=second).to(tl.int16, bitcast=True).to(tl.int32)
            word = tl.gather(low | (high << 16), source, 0)
            low = word.to(tl.int16).to(out.dtype.element_ty, bitcast=True)
            high = (word >> 16).to(tl.int16).to(out.dtype.element_ty, bitcast=True)
            tl.store(out + at, low, mask=here)
            tl.store(out + at + WIDTH, high, mask=second)
        else:
            word = tl.gather(tl.load(x + at, mask=here), source, 0)
            tl.store(out + at, word, mask=here)


def permute_columns(x: Tensor, pair: Tensor, inverse: bool) -> Tensor:
    """`ops.permute_columns` of 2- or 4-byte elements, rows of at most `MAX_PERMUTE_WIDTH`."""
    paired = x.element_size() == 2
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    tokens = x.numel() // width
    padded = power_of_two(width, 32, 1 << 30)
    # The index (8 bytes a column) is read once a program; with many rows it is worth a loop.
    steps = max(1, min(8, known(tokens, 8192) // 2048))
    launch(
        permute_columns_kernel,
        ceil_div(tokens, steps * (2 if paired else 1)),
        x,
        pair.select(0, 1 if inverse else 0),
        out,
        tokens,
        WIDTH=width,
        PADDED=padded,
        STEPS=steps,
        PAIRED=paired,
        num_warps=power_of_two(padded // 1024, 1, 16),  # 32 elements a thread
        num_stages=1,
    )
    return out
