"""Triton kernel of `turn_weight_` that turns both sides of several weights in one launch, in place.

A program takes whole blocks, which nobody else reads or writes, one block of the permuted weight at
a time, and goes through it by panels of rows, as wide as the block::

    U = S + L S             summed in registers, in fp32; rounded as an operand alone
    W = U + U Rᵀ            on top of it: U itself is never rounded

As an operand of the second product U goes through a scratch, since the tensor cores take steps of a
sum from shared memory; and so do the results, until all rows of the block have been read. A program
uses its scratch again for each of its blocks, so that it stays in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import (
    MULTIPROCESSORS,
    chunk_length,
    is_fused,
    launch,
    power_of_two,
    run_length,
    shared_memory,
)
from poetx_compile.ops.kernels.layers import first_block_of, layer_of
from poetx_compile.ops.kernels.permute import chunk_columns
from poetx_compile.ops.kernels.rounding import COUNTERS, matrix_bits, signed, stochastic_bf16


@triton.jit
def natural_rows(index, rows, inside, CHUNK: tl.constexpr):
    """Where `rows` lie under one row of a permutation pair, as 64-bit numbers."""
    chunk = tl.load(index + rows // CHUNK, mask=inside, other=0)
    return chunk * CHUNK + rows % CHUNK


_COUNTS = "blocks_left", "blocks_right", "column_blocks", "items", "layers", "programs"


@triton.jit(do_not_specialize=[*_COUNTS, *COUNTERS])
def turn_panels_kernel(
    weight,  # [rows, width], 2-byte elements, read and written; of the first layer
    left_deltas,  # [all blocks, B_LEFT, B_LEFT], like the weight
    right_deltas,  # [all blocks, B_RIGHT, B_RIGHT]
    row_pair,  # int64 [2, rows / ROW_CHUNK]; of the first layer
    column_pair,  # int64 [2, width / CHUNK]; of the first layer
    table,  # int64 [6, layers]: `layers.table_of`
    apply,  # int32: nothing is written where it is zero; HAS_APPLY = False: not read
    operand_out,  # [programs, PANEL, PADDED], like the weight: scratch
    saved_out,  # [programs, PANELS, PANEL, PADDED], like the weight: scratch
    rows,
    width,
    blocks_left,  # of a layer
    blocks_right,
    column_blocks,  # with those behind the last one that is rotated
    items,  # of a layer: column_blocks times the blocks of rows, the same way
    layers,
    programs,
    seed_low,  # all of these are 32 bits
    seed_high,
    step,
    B_LEFT: tl.constexpr,
    B_RIGHT: tl.constexpr,
    ROW_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two >= B_RIGHT
    PANEL: tl.constexpr,
    PANELS: tl.constexpr,  # of a block of rows
    TILE_K: tl.constexpr,
    ROW_STAGES: tl.constexpr,  # of the first product: half of them wait for the rows' numbers
    HAS_APPLY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """W = (I + left_delta) W (I + right_delta)^T by blocks, in permuted coordinates, in place."""
    if HAS_APPLY and tl.load(apply) == 0:
        return
    program = tl.program_id(0)
    ns = tl.arange(0, PADDED)
    local = tl.arange(0, PANEL)
    operand_out += program * (PANEL * PADDED)
    saved_out += program.to(tl.int64) * (PANELS * PANEL * PADDED)
    in_panel = local[:, None] * PADDED + ns[None, :]
    for place in range(program, layers * items, programs):
        index, item = place // items, place % items
        out, row_index, gather, number = layer_of(
            table, layers, index, weight, row_pair, column_pair
        )
        left_delta = left_deltas + first_block_of(table, layers, index, 1) * (B_LEFT * B_LEFT)
        right_delta = right_deltas + first_block_of(table, layers, index, 0) * (B_RIGHT * B_RIGHT)
        # Neighbouring programs share rows: what they read of a row is one piece of memory.
        block, row_block = item % column_blocks, item // column_blocks
        columns = block * B_RIGHT + ns
        there = (ns < B_RIGHT) & (columns < width)
        chunk = tl.load(gather + columns // CHUNK, mask=there, other=0)
        source = chunk_columns(chunk, columns, CHUNK, RUN)
        left_block = left_delta + row_block.to(tl.int64) * (B_LEFT * B_LEFT)
        right_block = right_delta + block.to(tl.int64) * (B_RIGHT * B_RIGHT)
        for panel in range(PANELS):
            ms = panel * PANEL + local
            row = row_block * B_LEFT + ms
            row_there = (ms < B_LEFT) & (row < rows)
            at = (natural_rows(row_index, row, row_there, ROW_CHUNK) * width)[:, None]
            inside = row_there[:, None] & there[None, :]
            total = tl.load(out + at + source[None, :], mask=inside, other=0.0).to(tl.float32)
            end = tl.where(row_block < blocks_left, B_LEFT, 0)
            for start in tl.range(0, end, TILE_K, num_stages=ROW_STAGES):
                ks = start + tl.arange(0, TILE_K)
                turned = (ms < B_LEFT)[:, None] & (ks < B_LEFT)[None, :]
                left = left_block + ms[:, None] * B_LEFT + ks[None, :]
                left = tl.load(left, mask=turned, other=0.0)
                stream = natural_rows(row_index, row_block * B_LEFT + ks, ks < B_LEFT, ROW_CHUNK)
                read = (ks < B_LEFT)[:, None] & there[None, :]
                stream = out + (stream * width)[:, None] + source[None, :]
                total = tl.dot(left, tl.load(stream, mask=read, other=0.0), total)
            tl.debug_barrier()  # the panel before has been read
            tl.store(operand_out + in_panel, total.to(weight.dtype.element_ty))
            tl.debug_barrier()
            for start in range(0, tl.where(block < blocks_right, B_RIGHT, 0), TILE_K):
                ks = start + tl.arange(0, TILE_K)
                left = tl.load(operand_out + local[:, None] * PADDED + ks[None, :])
                turned = (ns < B_RIGHT)[:, None] & (ks < B_RIGHT)[None, :]
                right = right_block + ns[:, None] * B_RIGHT + ks[None, :]
                right = tl.load(right, mask=turned, other=0.0)
                total = tl.dot(left, tl.trans(right), total)
            if STOCHASTIC:
                bits = matrix_bits(
                    row, columns, seed_low, seed_high, step, number, B_RIGHT % 8 == 0
                )
                result = stochastic_bf16(total, bits)
            else:
                result = total.to(weight.dtype.element_ty)
            tl.store(saved_out + panel * (PANEL * PADDED) + in_panel, result)
        tl.debug_barrier()  # what other threads have saved; and all have read the block by now
        for panel in range(PANELS):
            ms = panel * PANEL + local
            row = row_block * B_LEFT + ms
            row_there = (ms < B_LEFT) & (row < rows)
            at = (natural_rows(row_index, row, row_there, ROW_CHUNK) * width)[:, None]
            inside = row_there[:, None] & there[None, :]
            result = tl.load(saved_out + panel * (PANEL * PADDED) + in_panel)
            tl.store(out + at + source[None, :], result, mask=inside)
        tl.debug_barrier()


PANEL, TILE_K, WARPS, STAGES = 128, 64, 8, 3
"""Rows of a panel, a step of the sums, warps, steps in flight: a panel of 256 columns has 128 KiB
of sums, half of the registers."""


def fits(weight: Tensor, delta_in: Tensor, delta_out: Tensor, perm_in: Tensor) -> bool:
    """Whether the kernel takes these: aligned blocks of up to 256 columns, columns in runs."""
    width, sizes = weight.shape[1], (delta_in.shape[1], delta_out.shape[1])
    if weight.dtype != torch.bfloat16 or not (delta_in.shape[0] and delta_out.shape[0]):
        return False
    aligned = width % 16 == 0 and all(b % 8 == 0 for b in sizes)
    middle = all(64 < b <= 256 for b in sizes)
    streaming = 2 * STAGES * (PANEL + power_of_two(sizes[0], 128, 256)) * TILE_K
    return (
        aligned and middle and is_fused(perm_in, width, sizes[0]) and streaming <= shared_memory()
    )


def turn_panels(
    weight: Tensor,
    delta_in: Tensor,
    delta_out: Tensor,
    perm_in: Tensor,
    perm_out: Tensor,
    table: Tensor,
    blocks: tuple[int, int],
    seed: int,
    step: int,
    apply: Tensor | None,
) -> None:
    """`turn_weight.turn_by_deltas` of several weights of one kind, where it `fits`.

    Args:
        weight, perm_in, perm_out: of the first layer.
        delta_in, delta_out: of all layers.
        table: of `layers.table_of`.
        blocks: of the inputs and of the outputs of a layer.
        seed, step, apply: those of the op.
    """
    rows, width = weight.shape
    b_right, b_left = delta_in.shape[1], delta_out.shape[1]
    padded = power_of_two(b_right, 128, 256)
    column_blocks, row_blocks = -(-width // b_right), -(-rows // b_left)
    items, layers = column_blocks * row_blocks, len(table) // 6
    programs = min(layers * items, MULTIPROCESSORS)
    panels = -(-b_left // PANEL)
    launch(
        turn_panels_kernel,
        programs,
        *(weight, delta_out, delta_in, perm_out, perm_in, table),
        table if apply is None else apply.to(torch.int32),
        weight.new_empty(programs, PANEL, padded),
        weight.new_empty(programs, panels, PANEL, padded),
        *(rows, width, blocks[1], blocks[0], column_blocks, items, layers, programs),
        *(signed(seed), signed(seed >> 32), signed(step)),
        B_LEFT=b_left,
        B_RIGHT=b_right,
        ROW_CHUNK=chunk_length(perm_out, rows),
        CHUNK=chunk_length(perm_in, width),
        RUN=run_length(width, b_right, perm_in),
        PADDED=padded,
        PANEL=PANEL,
        PANELS=panels,
        TILE_K=TILE_K,
        ROW_STAGES=2 * STAGES - 1,
        HAS_APPLY=apply is not None,
        STOCHASTIC=weight.dtype == torch.bfloat16,
        num_warps=WARPS,
        num_stages=STAGES,
    )
