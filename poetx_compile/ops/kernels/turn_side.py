"""Triton kernels that turn weights in place from one side, several weights in one launch.

A weight stays in its natural order. Of rows any order is as good as another; columns are gathered
in runs, or permuted by a pass of their own. Random bits follow the permuted order, so that they are
those of every other kernel: ``row_pair`` and ``column_pair`` say both ways what is where.

*Resident*, bf16 and 64 < b ≤ 256: a block of R − I stays in shared memory while the weight streams
by, read once and written once.

*Tiled*, all others: a program takes whole blocks, by tiles of the result. Where a block has more
than one they go through a scratch until all of it has been read; a program uses its scratch again
for each of its blocks, so that it stays in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from poetx_compile.ops.kernels.layers import first_block_of, layer_of
from poetx_compile.ops.kernels.permute import source_columns
from poetx_compile.ops.kernels.rounding import COUNTERS, group_bits, matrix_bits, stochastic_bf16
from poetx_compile.ops.kernels.turn_panels import natural_rows


@triton.jit
def bits_of_natural_columns(
    rows, start, width, inverse, seed_low, seed_high, step, number, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The bits of permuted `rows` and of TILE columns in their natural order, from `start` on."""
    if CHUNK % 8 == 0:
        firsts = start + 8 * tl.arange(0, TILE // 8)
        groups = natural_rows(inverse, firsts, firsts < width, CHUNK).to(tl.int32) // 8
        bits = group_bits(rows, groups, seed_low, seed_high, step, number)
    else:
        columns = start + tl.arange(0, TILE)
        columns = natural_rows(inverse, columns, columns < width, CHUNK).to(tl.int32)
        bits = matrix_bits(rows, columns, seed_low, seed_high, step, number, False)
    return bits


@triton.jit
def places_of_steps(
    index, first, B: tl.constexpr, CHUNK: tl.constexpr, TILE_K: tl.constexpr, STEPS: tl.constexpr
):
    """Where the steps of a sum over a block begin in natural order; each lies in one chunk."""
    at = first + TILE_K * tl.arange(0, STEPS)
    chunk = tl.load(index + at // CHUNK, mask=at < first + B, other=0)
    return chunk.to(tl.int32) * (CHUNK // TILE_K) + at % CHUNK // TILE_K


@triton.jit
def place_of_step(places, start, TILE_K: tl.constexpr, STEPS: tl.constexpr):
    """One of them, from registers: memory would keep the loads of a step waiting."""
    return tl.sum(tl.where(tl.arange(0, STEPS) == start // TILE_K, places, 0)) * TILE_K


@triton.jit(do_not_specialize=["blocks", "layers", "splits", *COUNTERS])
def turn_columns_resident_kernel(
    weight,  # [rows, width], 2-byte elements; of the first layer
    delta,  # [all blocks, B, B], like weight
    row_pair,  # int64 [2, rows / ROW_CHUNK]
    column_pair,  # int64 [2, width / CHUNK]
    table,  # int64 [6, layers]: `layers.table_of`
    apply,  # int32: nothing is written where it is zero; HAS_APPLY = False: not read
    rows,
    width,
    blocks,  # of a layer
    layers,
    splits,  # of the rows
    rows_a_split,  # a multiple of TILE
    seed_low,  # all of these are 32 bits
    seed_high,
    step,
    B: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two >= B
    ROW_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
    HAS_APPLY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """W = W + W delta^T on a block of columns, of a split of the rows."""
    if HAS_APPLY and tl.load(apply) == 0:
        return
    program = tl.program_id(0)
    block = program % blocks
    split = program // blocks % splits
    index = program // (blocks * splits)
    weight, row_pair, column_pair, number = layer_of(
        table, layers, index, weight, row_pair, column_pair
    )
    first_block = first_block_of(table, layers, index, 0)
    ns = tl.arange(0, PADDED)
    there = ns < B
    columns = block * B + ns
    source = source_columns(column_pair, columns, there, CHUNK, RUN)[None, :]
    stored = there[:, None] & there[None, :]
    delta += (first_block + block) * (B * B)
    right = tl.trans(tl.load(delta + ns[:, None] * B + ns[None, :], mask=stored, other=0.0))
    last = tl.minimum((split + 1) * rows_a_split, rows)
    for start in range(split * rows_a_split, last, TILE):
        row = start + tl.arange(0, TILE)
        inside = (row < last)[:, None] & there[None, :]
        at = weight + (row.to(tl.int64) * width)[:, None] + source
        tile = tl.load(at, mask=inside, other=0.0)
        total = tile.to(tl.float32) + tl.dot(tile, right)
        if STOCHASTIC:
            row = natural_rows(row_pair + rows // ROW_CHUNK, row, row < last, ROW_CHUNK)
            bits = matrix_bits(
                row.to(tl.int32), columns, seed_low, seed_high, step, number, B % 8 == 0
            )
            tl.store(at, stochastic_bf16(total, bits), mask=inside)
        else:
            tl.store(at, total.to(weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks", "layers", "splits", *COUNTERS])
def turn_rows_resident_kernel(
    weight,  # all of these as in `turn_columns_resident_kernel`
    delta,
    row_pair,
    column_pair,
    table,
    apply,
    rows,
    width,
    blocks,
    layers,
    splits,  # of the columns
    columns_a_split,  # a multiple of TILE
    seed_low,
    seed_high,
    step,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    ROW_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
    HAS_APPLY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """W = W + delta W on a block of rows, of a split of the columns."""
    if HAS_APPLY and tl.load(apply) == 0:
        return
    program = tl.program_id(0)
    block = program % blocks
    split = program // blocks % splits
    index = program // (blocks * splits)
    weight, row_pair, column_pair, number = layer_of(
        table, layers, index, weight, row_pair, column_pair
    )
    first_block = first_block_of(table, layers, index, 1)
    ks = tl.arange(0, PADDED)
    there = ks < B
    row = block * B + ks
    weight += (natural_rows(row_pair, row, there, ROW_CHUNK) * width)[:, None]
    stored = there[:, None] & there[None, :]
    delta += (first_block + block) * (B * B)
    left = tl.load(delta + ks[:, None] * B + ks[None, :], mask=stored, other=0.0)
    last = tl.minimum((split + 1) * columns_a_split, width)
    for start in range(split * columns_a_split, last, TILE):
        columns = start + tl.arange(0, TILE)
        inside = there[:, None] & (columns < last)[None, :]
        at = weight + columns[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
        total = tile.to(tl.float32) + tl.dot(left, tile)
        if STOCHASTIC:
            bits = bits_of_natural_columns(
                row, start, width, column_pair + width // CHUNK, seed_low, seed_high, step,
                number, CHUNK, TILE,
            )  # fmt: skip
            tl.store(at, stochastic_bf16(total, bits), mask=inside)
        else:
            tl.store(at, total.to(tile.dtype), mask=inside)


@triton.jit(do_not_specialize=["blocks", "layers", "programs", *COUNTERS])
def turn_columns_tiled_kernel(
    weight,  # [rows, width]; the first of these as in `turn_columns_resident_kernel`
    delta,
    row_pair,
    column_pair,
    table,
    apply,
    saved,  # [programs, TILES, TILE_M, TILE_N], like weight; TILES = 1: not used
    rows,
    width,
    blocks,
    layers,
    programs,
    seed_low,
    seed_high,
    step,
    B: tl.constexpr,
    ROW_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
    TILES: tl.constexpr,  # of a block
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    STEPS: tl.constexpr,  # of a sum, in a power of two
    IN_CHUNKS: tl.constexpr,  # whether each lies in one chunk of the permutation
    HAS_APPLY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W = W + W delta^T by panels of rows, whole blocks of columns."""
    if HAS_APPLY and tl.load(apply) == 0:
        return
    program = tl.program_id(0)
    local = tl.arange(0, TILE_M)
    within = tl.arange(0, TILE_N)
    within_step = tl.arange(0, TILE_K)
    in_tile = local[:, None] * TILE_N + within[None, :]
    # Places of 32 bits that are the same in every step, as in `block_product_kernel`.
    at_row = (local * width)[:, None]
    streamed = at_row + within_step[None, :]
    saved += program.to(tl.int64) * (TILES * TILE_M * TILE_N)
    panels = tl.cdiv(rows, TILE_M)
    # Neighbouring programs share rows: what they read of a row is one piece of memory.
    for item in range(program, layers * panels * blocks, programs):
        block = item % blocks
        index = item // (blocks * panels)
        out, own_rows, own_columns, number = layer_of(
            table, layers, index, weight, row_pair, column_pair
        )
        first_block = first_block_of(table, layers, index, 0)
        matrix = delta + (first_block + block) * (B * B)
        first_row = item // blocks % panels * TILE_M
        row = first_row + local
        row_there = row < rows
        out += first_row.to(tl.int64) * width
        if IN_CHUNKS:
            places = places_of_steps(own_columns, block * B, B, CHUNK, TILE_K, STEPS)
        for tile in range(TILES):
            ns = tile * TILE_N + within
            there = ns < B
            columns = block * B + ns
            source = source_columns(own_columns, columns, there, CHUNK, RUN)
            inside = row_there[:, None] & there[None, :]
            at = at_row + source[None, :]
            total = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
            if IN_CHUNKS:
                for start in tl.range(0, B, TILE_K, num_stages=STAGES):
                    first = place_of_step(places, start, TILE_K, STEPS)
                    left = tl.load(out + first + streamed, mask=row_there[:, None], other=0.0)
                    right = matrix + start + (ns[:, None] * B + within_step[None, :])
                    right = tl.load(right, mask=there[:, None], other=0.0)
                    total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
            else:
                for start in tl.range(0, B, TILE_K, num_stages=STAGES):
                    ks = start + within_step
                    read = row_there[:, None] & (ks < B)[None, :]
                    stream = source_columns(own_columns, block * B + ks, ks < B, CHUNK, RUN)
                    left = tl.load(out + (at_row + stream[None, :]), mask=read, other=0.0)
                    stored = there[:, None] & (ks < B)[None, :]
                    right = matrix + (ns[:, None] * B + ks[None, :])
                    right = tl.load(right, mask=stored, other=0.0)
                    total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
            if STOCHASTIC:
                permuted = natural_rows(own_rows + rows // ROW_CHUNK, row, row_there, ROW_CHUNK)
                bits = matrix_bits(
                    permuted.to(tl.int32), columns, seed_low, seed_high, step, number, B % 8 == 0
                )
                result = stochastic_bf16(total, bits)
            else:
                result = total.to(weight.dtype.element_ty)
            if TILES == 1:
                tl.debug_barrier()  # all have read the block
                tl.store(out + at, result, mask=inside)
            else:
                tl.store(saved + tile * (TILE_M * TILE_N) + in_tile, result)
        if TILES > 1:
            tl.debug_barrier()  # what other threads have saved; and all have read the block by now
            for tile in range(TILES):
                ns = tile * TILE_N + within
                there = ns < B
                source = source_columns(own_columns, block * B + ns, there, CHUNK, RUN)
                inside = row_there[:, None] & there[None, :]
                result = tl.load(saved + tile * (TILE_M * TILE_N) + in_tile)
                tl.store(out + (at_row + source[None, :]), result, mask=inside)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["blocks", "layers", "programs", *COUNTERS])
def turn_rows_tiled_kernel(
    weight,  # all of these as in `turn_columns_tiled_kernel`
    delta,
    row_pair,
    column_pair,
    table,
    apply,
    saved,
    rows,
    width,
    blocks,
    layers,
    programs,
    seed_low,
    seed_high,
    step,
    B: tl.constexpr,
    ROW_CHUNK: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
    TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    STEPS: tl.constexpr,  # of a sum, in a power of two
    IN_CHUNKS: tl.constexpr,  # whether each lies in one chunk of the permutation
    HAS_APPLY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W = W + delta W by panels of columns, whole blocks of rows."""
    if HAS_APPLY and tl.load(apply) == 0:
        return
    program = tl.program_id(0)
    local = tl.arange(0, TILE_M)
    within = tl.arange(0, TILE_N)
    within_step = tl.arange(0, TILE_K)
    in_tile = local[:, None] * TILE_N + within[None, :]
    streamed = (within_step * width)[:, None] + within[None, :]
    saved += program.to(tl.int64) * (TILES * TILE_M * TILE_N)
    panels = tl.cdiv(width, TILE_N)
    for item in range(program, layers * panels * blocks, programs):
        first_column = item % panels * TILE_N
        block = item // panels % blocks
        index = item // (blocks * panels)
        out, own_rows, own_columns, number = layer_of(
            table, layers, index, weight, row_pair, column_pair
        )
        first_block = first_block_of(table, layers, index, 1)
        matrix = delta + (first_block + block) * (B * B)
        column_there = first_column + within < width
        out += first_column
        if IN_CHUNKS:
            places = places_of_steps(own_rows, block * B, B, ROW_CHUNK, TILE_K, STEPS)
        for tile in range(TILES):
            ms = tile * TILE_M + local
            there = ms < B
            row = block * B + ms
            at = (natural_rows(own_rows, row, there, ROW_CHUNK) * width)[:, None]
            at = out + at + within[None, :]
            inside = there[:, None] & column_there[None, :]
            total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if IN_CHUNKS:
                for start in tl.range(0, B, TILE_K, num_stages=STAGES):
                    first = place_of_step(places, start, TILE_K, STEPS)
                    left = matrix + start + (ms[:, None] * B + within_step[None, :])
                    left = tl.load(left, mask=there[:, None], other=0.0)
                    right = out + first.to(tl.int64) * width + streamed
                    right = tl.load(right, mask=column_there[None, :], other=0.0)
                    total = tl.dot(left, right, total, input_precision=PRECISION)
            else:
                for start in tl.range(0, B, TILE_K, num_stages=STAGES):
                    ks = start + within_step
                    stored = there[:, None] & (ks < B)[None, :]
                    left = matrix + (ms[:, None] * B + ks[None, :])
                    left = tl.load(left, mask=stored, other=0.0)
                    stream = natural_rows(own_rows, block * B + ks, ks < B, ROW_CHUNK) * width
                    read = (ks < B)[:, None] & column_there[None, :]
                    right = tl.load(out + stream[:, None] + within[None, :], mask=read, other=0.0)
                    total = tl.dot(left, right, total, input_precision=PRECISION)
            if STOCHASTIC:
                bits = bits_of_natural_columns(
                    row, first_column, width, own_columns + width // CHUNK, seed_low, seed_high,
                    step, number, CHUNK, TILE_N,
                )  # fmt: skip
                result = stochastic_bf16(total, bits)
            else:
                result = total.to(weight.dtype.element_ty)
            if TILES == 1:
                tl.debug_barrier()  # all have read the block
                tl.store(at, result, mask=inside)
            else:
                tl.store(saved + tile * (TILE_M * TILE_N) + in_tile, result)
        if TILES > 1:
            tl.debug_barrier()  # as for columns
            for tile in range(TILES):
                ms = tile * TILE_M + local
                there = ms < B
                at = natural_rows(own_rows, block * B + ms, there, ROW_CHUNK) * width
                inside = there[:, None] & column_there[None, :]
                result = tl.load(saved + tile * (TILE_M * TILE_N) + in_tile)
                tl.store(out + at[:, None] + within[None, :], result, mask=inside)
            tl.debug_barrier()
