"""Triton kernels of `block_product` and its like: blocks of ``Xᵀ Y``.

There are only d·b values to compute, each a sum over all tokens, so that tiles of a block alone may
not fill the device. Then the tokens are split, and the partial sums are added by one reduction in a
fixed order. No atomics: two runs give the same bits. The blocks of a second product fill the same
grid: fewer splits, and one launch where there would be two. Where only the skew parts are wanted,
a kernel of its own adds the partial sums of a tile and of its mirror image and writes them packed.

x and y are read from memory once, but from the L2 cache once for every tile of a block: by half as
many, twice as wide tiles (128×256 in 8 warps, half the registers of a multiprocessor) three
quarters of the bytes. With few tokens what counts is the reduction: smaller tiles fill the device
without splits. Columns are gathered as in `rotate`: inside the product where they come in runs, by
`permute.permute_columns` beforehand where they do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx_compile.ops.kernels.common import (
    MULTIPROCESSORS,
    ceil_div,
    chunk_length,
    input_precision,
    is_fused,
    known,
    launch,
    operands_in_registers,
    power_of_two,
    row_or,
    run_length,
    shared_memory,
)
from poetx_compile.ops.kernels.permute import permute_columns, source_columns
from poetx_compile.ops.kernels.tiles import (
    above_diagonal,
    masked_tile,
    packed_index,
    position,
)

_MAX_SPLITS = 32
_TILE_T = 64
"""Tokens of a step of 2-byte operands."""
_ALONE = 0.8
"""How long a multiprocessor takes for its bytes where others idle, as a part of its usual time."""
_REDUCTION = 192 * 1024
"""What adding the partial sums costs beside reading them, one more launch that writes the result
again: the bytes that a multiprocessor reads in 4 µs."""
_TILES = ((128, 256), (128, 128), (64, 128))
"""Of 2-byte operands, the widest first: each reads more bytes for a product than the one before."""


@triton.jit
def in_runs(source, columns, RUN: tl.constexpr):
    """`source` itself, of `columns` in aligned runs of RUN: said again behind a branch.

    What is said of a branch's result the compiler forgets; an operation of its own keeps it.
    """
    source = source // RUN * RUN + columns % RUN
    return tl.max_contiguous(tl.multiple_of(source, RUN), RUN)


@triton.jit
def block_product_kernel(
    x,  # [tokens, width]
    y,  # [tokens, width]
    gather_x,  # int64 [width / CHUNK_X]; CHUNK_X = 0: not read
    gather_y,  # int64 [width / CHUNK_Y]; CHUNK_Y = 0: not read
    x2,  # [tokens, width2], of the second product; STACKED = False: not read
    y2,  # [tokens, width2]
    gather_x2,  # int64 [width2 / CHUNK_X2]; CHUNK_X2 = 0: not read
    gather_y2,  # int64 [width2 / CHUNK_Y2]; CHUNK_Y2 = 0: not read
    out,  # f32[splits, blocks, B, B]
    tokens,
    width,
    width2,
    blocks,  # of both products
    blocks_of_first,
    tokens_a_split,  # a multiple of TILE_T
    B: tl.constexpr,
    CHUNK_X: tl.constexpr,
    CHUNK_Y: tl.constexpr,
    CHUNK_X2: tl.constexpr,
    CHUNK_Y2: tl.constexpr,
    RUN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_T: tl.constexpr,
    STACKED: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[split, block] = X_block^T Y_block of the gathered columns, over the tokens of a split.

    The first blocks are those of x and y, the others those of x2 and y2.
    """
    tiles_m: tl.constexpr = (B + TILE_M - 1) // TILE_M
    tiles_n: tl.constexpr = (B + TILE_N - 1) // TILE_N
    # The tiles of a block side by side: the second finds its columns in the L2 cache.
    program = tl.program_id(0)
    tile = program % (tiles_m * tiles_n)
    block = (program // (tiles_m * tiles_n)) % blocks
    split = program // (tiles_m * tiles_n * blocks)
    rows = (tile // tiles_n) * TILE_M + tl.arange(0, TILE_M)
    columns = (tile % tiles_n) * TILE_N + tl.arange(0, TILE_N)
    # A program chooses its operands here and has one loop: two would be twice the code.
    if STACKED and block >= blocks_of_first:
        x, y, stride = x2, y2, width2
        at = (block - blocks_of_first) * B
        source_x = source_columns(gather_x2, at + rows, rows < B, CHUNK_X2, RUN)
        source_y = source_columns(gather_y2, at + columns, columns < B, CHUNK_Y2, RUN)
    else:
        stride = width
        source_x = source_columns(gather_x, block * B + rows, rows < B, CHUNK_X, RUN)
        source_y = source_columns(gather_y, block * B + columns, columns < B, CHUNK_Y, RUN)
    if STACKED and RUN > 1:
        source_x = in_runs(source_x, rows, RUN)
        source_y = in_runs(source_y, columns, RUN)
    # Places of 32 bits, the same in every step, beside one address that moves on: addresses of
    # every row in every step took a fifth of the time.
    step = tl.arange(0, TILE_T)
    at_row = (step * stride)[:, None]
    in_x = at_row + source_x[None, :]
    in_y = at_row + source_y[None, :]
    first = split * tokens_a_split
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(0, tokens_a_split, TILE_T):
        there = (step < tokens - first - start)[:, None]
        moved = (first + start).to(tl.int64) * stride
        left = tl.load(x + moved + in_x, mask=there & (rows < B)[None, :], other=0.0)
        right = tl.load(y + moved + in_y, mask=there & (columns < B)[None, :], other=0.0)
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    base = (split * blocks + block).to(tl.int64) * (B * B)
    inside = (rows < B)[:, None] & (columns < B)[None, :]
    tl.store(out + base + rows[:, None] * B + columns[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["blocks", "splits"])
def skew_parts_kernel(
    partial,  # f32[splits, blocks, B, B]
    out,  # f32[blocks, B(B-1)/2]
    blocks,
    splits,
    B: tl.constexpr,
    N: tl.constexpr,  # B in whole tiles
    TILE: tl.constexpr,
):
    """out = 2 (P - P^T) above the diagonal, where P is the sum of the partial products."""
    block, row_tile, column_tile = position(N, TILE)
    if row_tile > column_tile:
        return
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    direct = tl.zeros((TILE, TILE), tl.float32)
    mirrored = tl.zeros((TILE, TILE), tl.float32)
    for split in range(splits):
        product = partial + (split * blocks + block) * (B * B)
        direct += masked_tile(product, rows, columns, B)
        mirrored += masked_tile(product, columns, rows, B)
    out += block * (B * (B - 1) // 2)
    stored = above_diagonal(rows, columns, B)
    result = 2 * (direct - tl.trans(mirrored))
    tl.store(out + packed_index(rows, columns, B), result, mask=stored)


class Plan(NamedTuple):
    """How a product is divided: a program has a tile of one block, and a split of the tokens."""

    tile_m: int
    """Columns of x in a tile."""
    tile_n: int
    """Columns of y in a tile."""
    tile_t: int
    """Tokens of a step."""
    warps: int
    stages: int
    splits: int


def plan(tokens: int, width: int, blocks: int, b: int, half: bool, skew: bool = False) -> Plan:
    """The division for `blocks` blocks of b columns of rows of `width`.

    A function of its arguments and of the device's shared memory, so that every run adds in the
    same order; the warps follow from its tensor cores.

    Args:
        width: of the rows of x and y; of two products, a common divisor.
        blocks: of all products.
        half: whether x and y are both of one 2-byte dtype.
        skew: whether the sums are read once more in any case.
    """
    if not half:
        tile = power_of_two(b, 16, 64)
        return Plan(tile, tile, 32, 4, 3, _splits(tokens, blocks, b, tile, tile, 4, skew)[1])
    # Loads of unaligned rows need registers for their addresses, which a larger tile would spill.
    aligned = b % 8 == 0 and width % 16 == 0
    capacity, in_registers = shared_memory(), operands_in_registers()

    def divided(tile_m: int, tile_n: int) -> tuple[float, Plan]:
        tile_m, tile_n = power_of_two(b, 16, tile_m), power_of_two(b, 16, tile_n)
        stages = 4 if 4 * _stage_bytes(tile_m, tile_n) < capacity else 3
        cost, splits = _splits(tokens, blocks, b, tile_m, tile_n, 2, skew)
        warps = 8 if tile_n == 256 or (in_registers and tile_m == 128) else 4
        return cost, Plan(tile_m, tile_n, _TILE_T, warps, stages, splits)

    shapes = _TILES if aligned else ((64, 64),)
    fitting = [divided(*shape) for shape in shapes if 3 * _stage_bytes(*shape) <= capacity]
    return min(fitting, key=lambda candidate: candidate[0])[1]


def _stage_bytes(tile_m: int, tile_n: int) -> int:
    """Shared memory of one step of 2-byte operands."""
    return 2 * _TILE_T * (tile_m + tile_n)


def _splits(
    tokens: int, blocks: int, b: int, tile_m: int, tile_n: int, size: int, skew: bool
) -> tuple[float, int]:
    """(cost, splits of the tokens): the fewest bytes in the way of the result.

    More splits fill the last wave of programs better, but each writes its partial sums, which one
    more launch reads again. What counts is the traffic of the busiest multiprocessor or, since all
    share the L2 cache, its mean, whichever lasts longer.

    Args:
        size: bytes of an element of x and y.
        skew: as for `plan`.
    """
    programs = blocks * -(-b // tile_m) * -(-b // tile_n)

    def cost(splits: int) -> float:
        read = tokens / splits * (tile_m + tile_n) * size
        written = tile_m * tile_n * 4
        mean = programs * splits / MULTIPROCESSORS
        traffic = max(mean, _ALONE * math.ceil(mean)) * (read + written)
        again = splits > 1 or skew
        added = splits * blocks * b * b * 4 / MULTIPROCESSORS + _REDUCTION if again else 0
        return traffic + added

    choices = range(1, min(_MAX_SPLITS, max(1, tokens // 64)) + 1)
    return min((cost(splits), splits) for splits in choices)


class Operands(NamedTuple):
    """One product ``Xᵀ Y``: contiguous x and y, gathered by the kernel."""

    x: Tensor
    y: Tensor
    blocks: int
    gather_x: Tensor | None
    gather_y: Tensor | None


def block_product(
    x: Tensor,
    y: Tensor,
    blocks: int,
    block_size: int,
    gather_x: Tensor | None,
    gather_y: Tensor | None,
) -> Tensor:
    """`ops.block_product` of fp32, bf16 or fp16 tensors; at least one block."""
    product = _operands(x, y, blocks, block_size, gather_x, gather_y)
    return _summed(_block_products([product], block_size))


def stacked_block_products(
    x1: Tensor,
    y1: Tensor,
    x2: Tensor,
    y2: Tensor,
    blocks1: int,
    blocks2: int,
    block_size: int,
    gather1: Tensor | None,
    gather2: Tensor | None,
) -> Tensor:
    """`ops.stacked_block_products` of fp32, bf16 or fp16; at least one block in either product."""
    products = [
        _operands(x1, y1, blocks1, block_size, gather1, gather1),
        _operands(x2, y2, blocks2, block_size, gather2, gather2),
    ]
    return _summed(_block_products(products, block_size))


def skew_block_products(
    x: Tensor,
    y: Tensor,
    blocks: int,
    block_size: int,
    gather: Tensor | None,
    x2: Tensor | None,
    y2: Tensor | None,
    blocks2: int,
    gather2: Tensor | None,
) -> Tensor:
    """`ops.skew_block_products` of fp32, bf16 or fp16; at least one block in either product."""
    products = [_operands(x, y, blocks, block_size, gather, gather)]
    if x2 is not None and y2 is not None:
        products.append(_operands(x2, y2, blocks2, block_size, gather2, gather2))
    return _skew_parts(_block_products(products, block_size, skew=True))


def _summed(partial: Tensor) -> Tensor:
    """The sums over the splits, if there are any: [blocks, b, b]."""
    return partial if partial.dim() == 3 else partial.sum(0)


def _skew_parts(partial: Tensor) -> Tensor:
    """Twice the skew parts of the sums over the splits, packed [blocks, b(b−1)/2]."""
    *splits, blocks, b, _ = partial.shape
    out = partial.new_empty(blocks, b * (b - 1) // 2)
    tile = power_of_two(b, 16, 32)
    tiles = -(-b // tile)
    launch(
        skew_parts_kernel,
        blocks * tiles * tiles,
        partial,
        out,
        blocks,
        splits[0] if splits else 1,
        B=b,
        N=tiles * tile,
        TILE=tile,
        num_warps=4,
        num_stages=2,
    )
    return out


def _operands(
    x: Tensor,
    y: Tensor,
    blocks: int,
    block_size: int,
    gather_x: Tensor | None,
    gather_y: Tensor | None,
) -> Operands:
    """The operands as the kernel takes them: what it cannot gather itself is gathered here."""
    width = x.shape[-1]
    if gather_x is not None and not is_fused(gather_x, width, block_size):
        x, gather_x = permute_columns(x, gather_x, False), None
    if gather_y is not None and not is_fused(gather_y, width, block_size):
        y, gather_y = permute_columns(y, gather_y, False), None
    return Operands(x.contiguous(), y.contiguous(), blocks, gather_x, gather_y)


def _block_products(products: Sequence[Operands], block_size: int, skew: bool = False) -> Tensor:
    """`planned_block_products` by the division that `plan` finds."""
    x, y = products[0][:2]
    half = x.dtype == y.dtype and x.element_size() == 2
    tokens = known(x.numel() // x.shape[-1], 8192)
    width = math.gcd(*(product.x.shape[-1] for product in products))
    blocks = sum(product.blocks for product in products)
    division = plan(tokens, width, blocks, block_size, half, skew)
    return planned_block_products(products, block_size, division)


def planned_block_products(products: Sequence[Operands], block_size: int, division: Plan) -> Tensor:
    """The blocks of one or two products of the same tokens by a given division, in one launch.

    Returns:
        f32[splits, blocks, b, b], partial sums, or f32[blocks, b, b] where there is one split.
    """
    first, second = products[0], products[-1]
    width, width2 = first.x.shape[-1], second.x.shape[-1]
    tokens = first.x.numel() // width
    blocks = sum(product.blocks for product in products)
    tile_m, tile_n, tile_t, warps, stages, splits = division
    tiles = -(-block_size // tile_m) * -(-block_size // tile_n)
    shape = (blocks, block_size, block_size)
    partial = first.x.new_empty(shape if splits == 1 else (splits, *shape), dtype=torch.float32)
    launch(
        block_product_kernel,
        splits * blocks * tiles,
        first.x,
        first.y,
        row_or(first.gather_x, 0, first.x),
        row_or(first.gather_y, 0, first.x),
        second.x,
        second.y,
        row_or(second.gather_x, 0, second.x),
        row_or(second.gather_y, 0, second.x),
        partial,
        tokens,
        width,
        width2,
        blocks,
        first.blocks,
        ceil_div(tokens, splits * tile_t) * tile_t,
        B=block_size,
        CHUNK_X=chunk_length(first.gather_x, width),
        CHUNK_Y=chunk_length(first.gather_y, width),
        CHUNK_X2=chunk_length(second.gather_x, width2),
        CHUNK_Y2=chunk_length(second.gather_y, width2),
        RUN=math.gcd(
            run_length(width, block_size, first.gather_x, first.gather_y),
            run_length(width2, block_size, second.gather_x, second.gather_y),
        ),
        TILE_M=tile_m,
        TILE_N=tile_n,
        TILE_T=tile_t,
        STACKED=len(products) == 2,
        WIDEN=first.x.dtype != first.y.dtype,
        PRECISION=input_precision(),
        num_warps=warps,
        num_stages=stages,
    )
    return partial
