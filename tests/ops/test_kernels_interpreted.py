"""The Triton kernels' arithmetic on the CPU, in Triton's interpreter.

It is chosen when Triton is imported, hence a process of its own. It multiplies bf16 as raw
16-bit integers, so that products are tested in fp32 and fp16 here and in bf16 on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.kernel_cases import needs_triton

pytestmark = needs_triton

PRELUDE = """
import functools
import torch
import triton.language
import triton.runtime.interpreter as interpreter

# NumPy 2.4 no longer turns an array of one element into an index.
patch = interpreter._patch_lang_tensor
def patched(tensor, scope):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
interpreter._patch_lang_tensor = patched

# Half of the time: whether integers overflow. Where it matters, results differ.
object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
# A third: a function that a kernel calls finds Triton patched already, but for what is
# called in Triton's own modules; and a dtype does not change.
patched_for = set()
def call(self, *given, **named):
    if (module := self.fn.__module__) not in patched_for:
        patched_for.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*given, **named)
interpreter.InterpretedFunction.__call__ = call
numpy_type = interpreter._get_np_dtype
of_values = functools.cache(numpy_type)
def looked_up(dtype):
    one = dtype.scalar
    return numpy_type(one) if isinstance(one, triton.language.pointer_type) else of_values(one)
interpreter._get_np_dtype = looked_up

# Triton 3.9 refuses the masks it makes of a condition on a scalar: they hold integers.
def boolean(mask):
    mask.data = mask.data.astype(bool)
    return mask

builder = interpreter.InterpreterBuilder
load, store = builder.create_masked_load, builder.create_masked_store
builder.create_masked_load = lambda self, at, mask, *rest: load(self, at, boolean(mask), *rest)
builder.create_masked_store = lambda self, at, value, mask, *rest: (
    store(self, at, value, boolean(mask), *rest)
)

from importlib import import_module
from poetx_compile.ops import OPS
from tests.helpers.tolerances import assert_close

torch.manual_seed(0)
torch.use_deterministic_algorithms(True)  # empty memory is NaN: an unwritten entry shows
torch.utils.deterministic.fill_uninitialized_memory = True

def reference(op, module):
    name = op.removesuffix("_") + "_reference"
    return getattr(import_module("poetx_compile.ops." + module), name)

def check(op, module, *args, dtype=None):
    actual, expected = OPS[op].kernel.load()(*args), reference(op, module)(*args)
    assert actual.dtype == expected.dtype and actual.is_contiguous()
    assert_close(actual, expected, dtype, what=f"{op} {[getattr(a, 'shape', a) for a in args]}")

def pair(width):
    permutation = torch.randperm(width)
    return torch.stack([permutation, permutation.argsort()])

def skew(blocks, b):
    return 0.3 / b**0.5 * torch.randn(blocks, b * (b - 1) // 2)
"""

CASES = {
    "cayley": """
for b, orders in ((2, (1, 3)), (5, (1, 2, 3, 4, 5, 6)), (33, (3,))):
    for order in orders:
        check("cayley_neumann", "cayley", skew(2, b), b, order)
for b in (2, 7, 33):
    check("cayley_neumann_backward", "cayley", torch.randn(2, b, b), skew(2, b), b, 3)
# More than one tile of 64 a side.
check("cayley_neumann_backward", "cayley", torch.randn(1, 70, 70), skew(1, 70), 70, 3)
# No matrix of a batch may read its neighbour; a strided gradient is taken as it is.
check("cayley_neumann_backward", "cayley", torch.randn(3, 6, 6).mT, skew(3, 6), 6, 3)
""",
    "cayley_low_precision": """
from poetx_compile.ops.kernels import cayley_low_precision, tangent
from poetx_compile.ops.kernels.low_precision import LowPrecisionTiling

# fp32 operands show the algebra; fp16 operands, in place of bf16, that nothing else is rounded.
small = {"panel": 32, "tile": 64, "tile_k": 32}
for b, sizes in ((2, {}), (5, {}), (33, {}), (70, {}), (70, small)):
    for operands, angle in ((torch.float32, 0.03), (torch.float16, 0.25)):
        # Spectral norms of about `angle`; at 0.03 the truncated series are exact to fp32.
        packed, grad = angle / 0.6 * skew(2, b), torch.randn(2, b, b)
        given = {"tiling": LowPrecisionTiling(b, **sizes), "operands": operands}

        def compare(host, module, *args, less=0.0):
            wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
            expected = reference(host.__name__, module)(*wide) - less
            accepted = args[:-1] if host.__name__.startswith("cayley") else args
            assert_close(host(*accepted, **given) - less, expected, operands, host.__name__)

        compare(cayley_low_precision.cayley_neumann, "cayley", packed, b, 3, less=torch.eye(b))
        compare(cayley_low_precision.cayley_neumann_backward, "cayley", grad, packed, b, 3)
        for flipped in (0, 1):
            compare(tangent.rotation_tangent_backward, "tangent", grad, packed, b, 3, True, flipped)
            exact = reference("rotation_delta", "rotation_delta")
            expected = exact(packed.double(), b, 3, torch.float64, flipped)
            delta = cayley_low_precision.rotation_delta(packed, b, 3, operands, flipped, **given)
            assert delta.dtype == operands
            assert_close(delta, expected, operands, "rotation_delta")
""",
    "rotate": """
for dtype in (torch.float32, torch.float16):
    for tokens, width, b in ((7, 10, 3), (130, 64, 32), (3, 73, 33), (70, 160, 72)):
        x = torch.randn(tokens, width).to(dtype)
        rotation = torch.eye(b) + 0.1 * torch.randn(width // b, b, b)
        for transpose in (False, True):
            check("rotate_blocks", "rotate", x, rotation, None, None, transpose)
        check("rotate_blocks", "rotate", x, rotation, pair(width), pair(width), True)
x = torch.randn(4, 9, 2).mT  # strided, with a leading dimension
check("rotate_blocks", "rotate", x, torch.randn(2, 3, 3).mT, None, None, False)
# Gathered and scattered in chunks: inside the product, or (last two) where the runs are too short.
sizes = ((70, 160, 72, 20), (5, 256, 64, 16), (65, 272, 256, 17),
         (9, 144, 48, 3), (9, 96, 32, 24), (9, 96, 30, 6))
for i, (tokens, width, b, chunks) in enumerate(sizes):
    x = torch.randn(tokens, width)
    rotation = torch.eye(b) + 0.1 * torch.randn(width // b, b, b)
    others = (None, pair(chunks)), (pair(chunks), None), (pair(chunks), pair(width))
    for j, (gather, scatter) in enumerate(((pair(chunks), pair(chunks)), others[i % 3])):
        given = x if (i + j) % 2 else x.half()
        check("rotate_blocks", "rotate", given, rotation, gather, scatter, True)
for dtype in (torch.float32, torch.float16):
    # More than a tile of columns behind the blocks.
    x, rotation = torch.randn(5, 400).to(dtype), torch.randn(1, 72, 72)
    check("rotate_blocks", "rotate", x, rotation, pair(25), pair(25), False)
    check("rotate_blocks", "rotate", x, rotation, None, None, False)
delta = (0.1 * torch.randn(2, 72, 72)).half()
for transpose in (False, True):
    check("rotate_by_delta", "rotate", x, delta, pair(25), None, transpose)
identity = torch.eye(8).expand(2, 8, 8)
x = torch.randn(5, 20).half()
assert torch.equal(OPS["rotate_blocks"].kernel.load()(x, identity, None, None, False), x)
""",
    "fold": """
for rows, width, b in ((160, 64, 72), (256, 96, 128), (7, 10, 3), (200, 66, 65)):
    for stored in (torch.float16, torch.float32):
        weight = torch.randn(rows, width).to(stored)
        sides = [(0.1 * torch.randn(size // b, b, b)).half() for size in (width, rows)]
        pairs = pair(width), pair(rows)
        if width >= b:
            check("fold_weight", "fold", weight, *sides, *pairs, torch.float16)
            check("fold_weight", "fold", weight, sides[0], None, pairs[0], None, torch.float16)
        check("fold_weight", "fold", weight, None, sides[1], None, pairs[1], torch.float16)
delta = (0.1 * torch.randn(2, 72, 72)).half()  # rows in chunks of 8, and a tail
for order in (None, pair(20)):
    args = (torch.randn(160, 64).half(), None, delta, None, order, torch.float16)
    check("fold_weight", "fold", *args)
weight = torch.randn(200, 32)  # more than a block of rows behind the last one that is rotated
check("fold_weight", "fold", weight, None, delta[:1], None, pair(200), torch.float16)
# Columns alone, G - I in shared memory and not.
for width, b in ((160, 72), (96, 33), (200, 66)):
    sides = (0.1 * torch.randn(width // b, b, b)).half(), None
    check("fold_weight", "fold", torch.randn(70, width), *sides, pair(width), None, torch.float16)
""",
    "fold_both": """
from poetx_compile.ops.kernels.fold_both import FoldTiling, column_splits, fits, fold_both

def small(blocks, b):
    return (0.1 * torch.randn(blocks, b, b)).half()

# Tails on both sides; two tiles a block; blocks of two sizes; more than a block of either tail.
for rows, width, left, right in (
    (160, 176, (2, 72), (2, 72)),
    (200, 208, (1, 192), (1, 192)),
    (264, 144, (1, 256), (2, 72)),
    (250, 400, (1, 80), (1, 128)),
):
    weight = torch.randn(rows, width).half()
    deltas = small(*right), small(*left).mT
    assert fits(weight, *deltas)
    orders = ((pair(width // 8), pair(rows // 2)), (pair(width), pair(rows)),
              (pair(width // 16), None))
    for perm_in, perm_out in orders:
        check("fold_weight", "fold", weight, *deltas, perm_in, perm_out, torch.float16)
    check("fold_weight", "fold", weight.float(), *deltas, None, None, torch.float16)
    narrower = fold_both(weight, *deltas, None, None, tiling=FoldTiling(64, 64, 2))
    assert_close(narrower, fold_both(weight, *deltas, None, None))
# One rounding: without a rotation to the left, that of the product of the rounded matrices.
weight, delta, zero = torch.randn(144, 80).half(), small(1, 80), torch.zeros(2, 72, 72).half()
once = (weight.double() @ (torch.eye(80) + delta[0].double()).T).half()
actual = fold_both(weight, delta, zero, None, None)
assert (actual != once).float().mean() < 0.01  # sums in fp32 next to a tie
assert torch.equal(fold_both(weight, zero[:1], zero, None, None), weight)
sizes = (8, 16, 132), (16, 32, 132), (132, 1, 132)
assert [column_splits(*given) for given in sizes] == [16, 8, 1]
""",
    "requantize": """
from poetx_compile.ops.dequantize import dequantize_reference, quantize
for dtype in (torch.float16, torch.float32):
    for match in (True, False):
        weight, scale = quantize(torch.randn(70, 100), dtype)
        values = dequantize_reference(weight, scale, torch.float32)
        values[:9] += 0.05 * torch.randn(9, 100)
        scale = scale if match else torch.full_like(scale, torch.nan)
        made = []
        for run in (reference("requantize_", "requantize"), OPS["requantize_"].kernel.load()):
            given = weight.clone(), scale.clone()
            run(*given, values, torch.tensor(3), 2**63 + 5, 4)
            made += given
        assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3]), (dtype, match)
        assert torch.equal(made[0][9:], weight[9:]) or not match
""",
    "block_product": """
for dtype in (torch.float32, torch.float16):
    for tokens, width, b in ((7, 10, 3), (70, 64, 32), (3, 73, 33)):
        x, y = torch.randn(2, tokens, width).to(dtype)
        check("block_product", "block_product", x, y, width // b, b, None, pair(width))
    for tokens, width, b, chunks in ((70, 160, 72, 20), (5, 272, 256, 17), (9, 96, 32, 24)):
        x, y = torch.randn(2, tokens, width).to(dtype)
        gathers = pair(chunks if dtype == torch.float16 else width), pair(chunks)
        check("block_product", "block_product", x, y, width // b, b, *gathers)
from poetx_compile.ops.kernels import block_product
assert block_product.plan(4200, 8, 2, 4, False).splits > 1
block_product.plan = lambda *_: block_product.Plan(16, 16, 32, 4, 3, 2)
x, y = torch.randn(70, 8), torch.randn(70, 8).half()  # two dtypes, two splits
check("block_product", "block_product", x, y, 2, 4, pair(8), None)
""",
    "stacked_block_products": """
from poetx_compile.ops.kernels.block_product import Operands, Plan, planned_block_products

def stacked(tokens, widths, b, gathers, dtype):
    operands = [torch.randn(tokens, widths[i]).to(dtype) for i in (0, 0, 1, 1)]
    return *operands, *(width // b for width in widths), b, *gathers

for dtype in (torch.float32, torch.float16):
    for tokens, widths, b in ((7, (10, 7), 3), (70, (32, 96), 32), (3, (73, 33), 33)):
        for gathers in ((None, None), (pair(widths[0]), pair(widths[1]))):
            args = stacked(tokens, widths, b, gathers, dtype)
            check("stacked_block_products", "stacked_block_products", *args)
    # Gathered in the kernel: on both sides, by two lengths of chunks, on one side alone.
    for tokens, widths, b, chunks in ((70, (160, 72), 72, (20, 9)), (5, (256, 272), 256, (8, 17)),
                                      (9, (96, 64), 32, (24, None)), (9, (64, 96), 32, (None, 6))):
        gathers = [c and pair(c) for c in chunks]
        args = stacked(tokens, widths, b, gathers, dtype)
        check("stacked_block_products", "stacked_block_products", *args)
# Partial sums: the last split is short, or empty.
x1, y1, x2, y2, *_, gather1, gather2 = args = stacked(
    70, (64, 96), 32, (pair(4), pair(6)), torch.float16
)
products = [Operands(x1, y1, 2, gather1, gather1), Operands(x2, y2, 3, gather2, gather2)]
expected = reference("stacked_block_products", "stacked_block_products")(*args)
for splits in (2, 3, 5):
    actual = planned_block_products(products, 32, Plan(16, 32, 16, 4, 3, splits))
    assert_close(actual.sum(0), expected, what=f"{splits} splits")
""",
    "skew_block_products": """
for dtype in (torch.float32, torch.float16):
    for tokens, widths, b in ((7, (10, 7), 2), (70, (35, 70), 35), (3, (73, 65), 64)):
        x, y = torch.randn(2, tokens, widths[0]).to(dtype)
        first = x, y, widths[0] // b, b, pair(widths[0])
        check("skew_block_products", "skew_block_products", *first, None, None, 0, None)
        x2, y2 = torch.randn(2, tokens, widths[1]).to(dtype)
        second = x2, y2, widths[1] // b, None
        check("skew_block_products", "skew_block_products", *first, *second)
# Partial sums of two splits, gathered in the kernel.
from poetx_compile.ops.kernels.block_product import plan
assert plan(4200, 8, 2, 4, False, True).splits > 1
x, y = torch.randn(2, 4200, 16)
check("skew_block_products", "skew_block_products", x, y, 2, 8, pair(2), None, None, 0, None)
""",
    "orthogonalize": """
from poetx_compile.ops.kernels.orthogonalize import Tiling, orthogonalize_skew
from poetx_compile.ops.newton_schulz import newton_schulz
from poetx_compile.ops.packing import pack, unpack

# In one program each; by tiles: of several programs, with padding. The slopes of the steps that are
# used would enlarge the errors of fp32.
tiles = {"tiling": Tiling(16, 16, 1, 1, 3, None)}
for b, given in ((2, {}), (5, {}), (33, {}), (70, {}), (20, tiles)):
    packed = 3 * skew(2, b)
    packed[1] *= b > 2  # a block of zeros stays
    given["coefficients"] = (1.9, -1.2, 0.3), (1.5, -0.75, 0.25)
    wide = unpack(packed.double(), b)
    norm = torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(1e-30)
    expected = pack(newton_schulz(wide / norm, given["coefficients"]))
    actual = orthogonalize_skew(packed, b, operands=torch.float32, **given)
    assert_close(actual, expected, torch.float32, f"b = {b}")
""",
    "muon_steps": """
from poetx_compile.ops.kernels.muon import muon_steps
from poetx_compile.ops.kernels.orthogonalize import Tiling
from poetx_compile.ops.muon_step import Part
from poetx_compile.optim import momentum as stored

# Some turn, the last one's momentum alone moves; groups of 256 with a tail; by tiles and as whole
# blocks; tensors that lie apart by multiples of 16 elements, and by others.
for dtype, b, counts, tiling in (
    (torch.float32, 8, (2, 1, 3), None),
    (torch.bfloat16, 24, (1, 1), Tiling(16, 16, 1, 1, 2, None)),
    (torch.int8, 24, (1,) * 4, None),
):
    packed = b * (b - 1) // 2
    drawn = [torch.randn(1 + 2 * n * packed)[1:].view(2, n, packed) for n in counts]
    gradients = [g[0] if dtype == torch.float32 else g[0].bfloat16() for g in drawn]
    batch = [(i, slice(0, n)) for i, n in enumerate(counts)]
    states, expected = [], []
    for both in (states, expected):
        for gradient in gradients:
            both.append({})
            stored.create(both[-1], gradient.float(), dtype)
        noise = stored.rounding_noise(packed, 1, 2, gradient.device)
        stored.store(both, batch, torch.cat([g[1] for g in drawn]), noise)
    keys = stored.BUFFER, stored.SCALE
    parts = [Part(g, *map(s.get, keys)) for g, s in zip(gradients, states)]
    given = b, 0.9, 0.1, 5, 2**40
    steps = muon_steps(parts, len(counts) - 1, *given, tiling=tiling, operands=torch.float32)
    gradient = torch.cat(gradients).float()
    m = stored.read(expected, batch, torch.float32).lerp_(gradient, 1 - 0.9)
    stored.store(expected, batch, m, stored.rounding_noise(packed, 5, 2**40, m.device))
    for actual, wanted in zip(states, expected):
        for key in wanted:  # of what is rounded the same, but for sums in another order
            assert_close(actual[key].float(), wanted[key].float(), torch.float32, key)
    direction = reference("orthogonalize_skew", "orthogonalize")(gradient.lerp(m, 0.9).double(), b)
    assert len(steps) == sum(counts[:-1])
    wanted = -0.1 * direction[: len(steps)]
    assert_close(steps, wanted, torch.bfloat16, str(dtype))  # the steps are steep
    before = [s[stored.BUFFER].clone() for s in states]
    assert not len(muon_steps(parts, 0, b, 0.9, 0.1, 5, 3, operands=torch.float32))
    assert not torch.equal(states[0][stored.BUFFER], before[0])  # momenta alone

# The optimiser with it, beside the one without, in both forms.
import contextlib
import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from poetx_compile.ops import kernels
from poetx_compile.optim import muon
from tests.helpers.rotations import skews as rotations_of

def trainer(interval):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.Linear(33, 9))
    config = poetx.POETXConfig(block_size=8, merge_interval=interval, max_angle=None)
    optimizer = poetx.POETXMuon(model, config=config, turn_every=2, momentum_dtype="int8")
    return model, rotations_of(model), optimizer

def trained(model, rotations, optimizer):
    torch.manual_seed(1)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        for p in rotations:
            p.grad = torch.randn_like(p)
        optimizer.step()
    moved = [p.detach() - s for p, s in zip(model.parameters(), start)]
    weights = [stored_weight(m).detach() for _, m, _ in prepared_linears(model)]
    return moved, weights, [optimizer.state[p] for p in rotations]

expected = [trained(*trainer(interval)) for interval in (1000, 1)]
trainers = [trainer(interval) for interval in (1000, 1)]
calls, host = [], muon.muon_steps
muon.muon_steps = lambda *given: calls.append(given) or host(*given)
kernels._DEVICE_TYPE, kernels._triton_runs_on = "cpu", lambda index: True
torch.cuda.device, torch.cuda.current_device = contextlib.nullcontext, lambda: 0
muon_steps.__kwdefaults__["operands"] = torch.float32
for one, (moved, weights, states) in zip(trainers, expected):
    calls.clear()
    actual = trained(*one)
    assert len(calls) == 2
    for a, e in zip(actual[0] + actual[1], moved + weights):
        assert (a - e).norm() <= 0.01 * e.norm()
    for state, wanted in zip(actual[2], states):
        for key in keys:
            assert_close(state[key].float(), wanted[key].float(), torch.float32, key)
""",
    "turn_weight": """
import triton
import triton.language as tl
from poetx_compile.ops.kernels import rounding, turn_layers, turn_side
from poetx_compile.ops.turn_weight import Turn, rotate_weight
from poetx_compile.ops import random

def turned(weight, b_in, b_out, perm_in, perm_out, apply=None, scale=None):
    (n, m), given = weight.shape, (b_in, b_out, 3, 5, 2, 1)
    steps = skew(m // b_in, b_in) / 20, skew(n // b_out, b_out) / 20
    actual, expected = weight.clone(), weight.double()
    turn_layers.turn_weight_(actual, *steps, perm_in, perm_out, *given, apply, scale)
    wide = [s.double() for s in steps]
    given = *given, apply, None if scale is None else scale.double()
    reference("turn_weight", "turn_weight")(expected, *wide, perm_in, perm_out, *given)
    assert_close(actual - weight, expected - weight, what="what a step adds")

for n, m, b_in, b_out in ((7, 10, 3, 2), (75, 66, 33, 70), (130, 20, 4, 65)):
    turned(torch.randn(n, m), b_in, b_out, pair(m), pair(n))
turned(torch.randn(96, 144), 72, 80, pair(18), pair(6))  # chunks: in the kernels
turned(torch.randn(96, 128), 64, 96, pair(8), pair(96), torch.tensor(1.0), torch.tensor(1.01))
# Two layers, from one side in one launch, and what a step adds to them. fp16 in place of bf16.
def together(n, m, b_out, b_in, chunks, sides):
    made, before, expected = [], [], []
    stacks = []
    for size, b, turns in ((m, b_in, "in" in sides), (n, b_out, "out" in sides)):
        blocks = size // b if turns else 0
        stacks.append((0.4 / b**0.5 * torch.randn(1 + 2 * blocks, b, b).half(), blocks))
    wanted = "in" in sides, "out" in sides
    for layer in range(2):
        weight, perms = torch.randn(n, m).half(), (pair(m // chunks[0]), pair(n // chunks[1]))
        of_sides = [turn_layers.Side(s, 1 + layer * blocks, blocks) for s, blocks in stacks]
        columns, rows = (
            (p[0][:, None] * c + torch.arange(c)).flatten() for p, c in zip(perms, chunks)
        )
        delta_in, delta_out = (s.deltas.double() for s in of_sides)
        old = weight.double()[rows][:, columns]
        expected.append(rotate_weight(old, delta_in, delta_out.mT) - old)
        turn = Turn(weight, None, None, *perms, b_in, b_out, 3, layer)
        turning = (side if turns else None for side, turns in zip(of_sides, wanted))
        made.append(turn_layers.Layer(turn, *turning))
        before.append((old, rows, columns))
    if sides == "in out":
        turn_layers.turn_panels.fits = lambda *_: True
    turn_layers._turn_alike(made, 5, 2, None)
    for layer, change, (old, rows, columns) in zip(made, expected, before):
        after = layer.turn.weight.double()[rows][:, columns]
        assert_close(after - old, change, torch.float16, f"{sides}, {n}x{m}")

# Both sides in one launch: one panel of rows and two, tails, columns in chunks.
together(300, 160, 136, 72, (8, 4), "in out")
together(80, 288, 72, 136, (8, 4), "in out")
# Resident blocks; tiles; blocks of several tiles, single columns and rows.
for sides in ("in", "out"):
    together(300, 160, 136, 72, (8, 4), sides)
    together(80, 66, 33, 30, (2, 1), sides)
    together(600, 640, 300, 320, (16, 4), sides)
    together(650, 700, 320, 320, (10, 10), sides)
    together(640, 704, 320, 320, (64, 64), sides)  # a step of a sum in a chunk
    together(290, 10, 280, 5, (1, 1), sides)
    together(10, 290, 5, 280, (1, 1), sides)

weight = torch.randn(4, 6)
given = skew(2, 3), skew(2, 2), pair(6), pair(4), 3, 2, 3, 5, 2, 1
still = weight.clone()
turn_layers.turn_weight_(still, *given, torch.tensor(0), None)
assert torch.equal(still, weight)

@triton.jit
def rounding_kernel(x, out, low, high, B: tl.constexpr, GROUPED: tl.constexpr):
    rows, columns = 3 + tl.arange(0, 16), 16 + tl.arange(0, 32)
    bits = rounding.matrix_bits(rows, columns, low, high, 9, 4, GROUPED)
    at = rows[:, None] * B + columns[None, :]
    tl.store(out + at, rounding.stochastic_bf16(tl.load(x + at), bits))

x = torch.randn(19, 48)
x[5, 17:20] = torch.tensor([float("inf"), -float("inf"), float("nan")])
seed = 2**63 + 12345
bits = random.matrix_bits(19, 48, seed, 9, 4, x.device)
expected = random.round_stochastically(x, torch.bfloat16, bits)[3:, 16:]
for grouped in (True, False):
    out = torch.zeros(19, 48, dtype=torch.bfloat16)
    words = rounding.signed(seed), rounding.signed(seed >> 32)
    rounding_kernel[(1,)](x, out, *words, B=48, GROUPED=grouped)
    assert torch.equal(out[3:, 16:].nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))

@triton.jit
def natural_kernel(out, order, low, high, CHUNK: tl.constexpr):
    rows, columns = tl.arange(0, 16), 16 + tl.arange(0, 32)
    found = turn_side.bits_of_natural_columns(
        rows, 16, 48, order + 48 // CHUNK, low, high, 9, 4, CHUNK, 32
    )
    tl.store(out + rows[:, None] * 48 + columns[None, :], found)

for chunk in (8, 2):
    order = pair(48 // chunk)
    out = torch.zeros(16, 48, dtype=torch.int32)
    natural_kernel[(1,)](out, order, *words, CHUNK=chunk)
    where = (order[1][:, None] * chunk + torch.arange(chunk)).flatten()
    assert torch.equal(out[:, 16:].long(), bits[:16, where][:, 16:])
""",
    "permute": """
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
    for shape in ((1, 2), (5, 3, 77), (4, 64), (3, 2, 1)):
        x = (100 * torch.randn(shape)).to(dtype)
        for inverse in (False, True):
            args = (x, pair(shape[-1]), inverse)
            actual = OPS["permute_columns"].kernel.load()(*args)
            assert torch.equal(actual, reference("permute_columns", "permute")(*args))
for dtype in (torch.float32, torch.bfloat16):
    sizes = ((5, 96, 6), (300, 48, 1), (3, 40000, 2500), (9, 24, 3), (9, 24, 12))
    for tokens, width, chunks in sizes:
        x, order = torch.randn(tokens, width).to(dtype), pair(chunks)
        for inverse in (False, True):
            actual = OPS["permute_columns"].kernel.load()(x, order, inverse)
            assert torch.equal(actual, reference("permute_columns", "permute")(x, order, inverse))
special = torch.tensor([[float("inf"), -0.0, float("nan"), -float("inf")]] * 3).bfloat16()
order = pair(4)
actual = OPS["permute_columns"].kernel.load()(special, order, False)
assert torch.equal(actual.view(torch.int16), special.view(torch.int16)[:, order[0]])
""",
}


SERVER = """
import json, os, sys, traceback
for line in sys.stdin:  # a case each
    if child := os.fork():
        print(os.waitpid(child, 0)[1], flush=True)
        continue
    try:
        exec(json.loads(line))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Runs a script in a fork of one process that has imported all; gives what it failed with."""
    log = tmp_path_factory.mktemp("interpreter") / "stderr"
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + SERVER],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def run(script: str) -> str:
        before = log.stat().st_size
        print(json.dumps(script), file=server.stdin, flush=True)
        return "" if server.stdout.readline() == "0\n" else log.read_text()[before:] or "no answer"

    with server:
        yield run


@pytest.mark.parametrize("kernel", CASES)
def test_kernel_equals_reference(kernel: str, interpreter: Callable[[str], str]) -> None:
    assert interpreter(CASES[kernel]) == ""


def test_a_script_that_fails_is_told(interpreter: Callable[[str], str]) -> None:
    assert "relative error" in interpreter("assert_close(torch.ones(2), torch.zeros(2))")
