"""The Triton kernels on a GPU: against the references in fp64, and as Inductor launches them."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from benchmarks.tolerances import ORTHOGONALIZED
from poetx_compile import ops
from poetx_compile.compile.lowerings import ExpandOps, compile_inner, early, register
from poetx_compile.ops import OPS
from poetx_compile.ops.block_product import block_product_reference
from poetx_compile.ops.cayley import cayley_neumann_backward_reference, cayley_neumann_reference
from poetx_compile.ops.fold import fold_weight_reference
from poetx_compile.ops.kernels.common import MAX_PERMUTE_WIDTH
from poetx_compile.ops.orthogonalize import orthogonalize_skew_reference
from poetx_compile.ops.packing import pack, unpack
from poetx_compile.ops.permute import permute_columns_reference
from poetx_compile.ops.rotate import rotate_blocks_reference
from poetx_compile.ops.rotation_delta import minus_identity, rotation_delta_reference
from poetx_compile.ops.skew_block_products import skew_block_products_reference
from poetx_compile.ops.stacked_block_products import stacked_block_products_reference
from poetx_compile.ops.tangent import rotation_tangent_backward_reference
from poetx_compile.ops.turn_weight import Turn, turn_weight_reference, turn_weights_
from tests.helpers.tolerances import assert_close, relative_error

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN: an unwritten entry shows (cuBLAS is not at issue: warn only)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pair(width: int, chunk: int = 1) -> Tensor:
    permutation = torch.randperm(width // chunk, device=DEVICE)
    return torch.stack([permutation, permutation.argsort()])


def pairs(width: int, kind: str | None) -> tuple[Tensor | None, Tensor | None]:
    """A gather and a scatter, by single columns or by the largest chunks up to 16."""
    if kind is None:
        return None, None
    chunk = math.gcd(width, 16)
    gather, scatter = {"columns": (1, 1), "chunks": (chunk, chunk), "mixed": (1, chunk)}[kind]
    return pair(width, gather), pair(width, scatter)


def skew(blocks: int, b: int, angle: float = 0.25) -> Tensor:
    """Packed blocks whose spectral norm is about `angle`."""
    return angle / (2 * b**0.5) * torch.randn(blocks, b * (b - 1) // 2, device=DEVICE)


def near_identity(blocks: int, b: int) -> Tensor:
    return cayley_neumann_reference(skew(blocks, b).double(), b, 3).float()


def delta(blocks: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    eye = torch.eye(b, device=DEVICE)
    return (near_identity(blocks, b) - eye).to(dtype)


def wide(*args: Any) -> list[Any]:
    """The arguments in fp64, where they are floating point tensors."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def check(op: str, reference: Callable[..., Tensor], *args: Any) -> Tensor:
    assert OPS[op].kernel.applies(*args), "no kernel runs: the comparison would prove nothing"
    actual = getattr(torch.ops.poetx, op)(*args)
    assert actual.is_contiguous()
    assert_close(actual, reference(*wide(*args)), what=op)
    return actual


@pytest.mark.parametrize("b", [2, 3, 16, 33, 64, 77, 128, 256, 512])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 7])
def test_cayley_neumann(b, order, poisoned):
    packed = skew(3, b)
    rotation = check("cayley_neumann", cayley_neumann_reference, packed, b, order, False)
    # The part that is not the identity keeps its relative precision.
    expected = cayley_neumann_reference(packed.double(), b, order)
    eye = torch.eye(b, device=DEVICE)
    assert_close(rotation - eye, expected - eye.double(), torch.float32)


def test_cayley_neumann_of_zero_is_exactly_the_identity(poisoned):
    rotation = torch.ops.poetx.cayley_neumann(torch.zeros(2, 77 * 38, device=DEVICE), 77, 3)
    assert torch.equal(rotation, torch.eye(77, device=DEVICE).expand(2, 77, 77))


@pytest.mark.parametrize("b", [2, 3, 16, 33, 64, 77, 128, 256, 512])
def test_cayley_neumann_backward(b, poisoned):
    grad = torch.randn(3, b, b, device=DEVICE)
    reference = cayley_neumann_backward_reference
    check("cayley_neumann_backward", reference, grad, skew(3, b), b, 3, False)
    check("cayley_neumann_backward", reference, grad.mT, skew(3, b), b, 3, False)


def test_cayley_neumann_backward_of_another_order_runs_the_reference():
    packed, grad = skew(2, 16), torch.randn(2, 16, 16, device=DEVICE)
    assert not OPS["cayley_neumann_backward"].kernel.applies(grad, packed, 16, 4, False)
    actual = torch.ops.poetx.cayley_neumann_backward(grad, packed, 16, 4)
    assert_close(actual, cayley_neumann_backward_reference(*wide(grad, packed), 16, 4))


LOW_PRECISION_BLOCKS = [2, 3, 16, 33, 64, 77, 128, 192, 256]


@pytest.mark.parametrize("b", LOW_PRECISION_BLOCKS)
def test_low_precision_cayley_neumann(b, poisoned):
    packed = skew(3, b)
    args = (packed, b, 3, True)
    assert OPS["cayley_neumann"].kernel.applies(*args)
    # Better than what rounds the part that is not the identity, be it to fp16.
    eye = torch.eye(b, device=DEVICE)
    expected = cayley_neumann_reference(packed.double(), b, 3) - eye.double()
    assert_close(torch.ops.poetx.cayley_neumann(*args) - eye, expected, torch.float16)


def test_low_precision_cayley_neumann_of_zero_is_exactly_the_identity(poisoned):
    rotation = torch.ops.poetx.cayley_neumann(torch.zeros(2, 77 * 38, device=DEVICE), 77, 3, True)
    assert torch.equal(rotation, torch.eye(77, device=DEVICE).expand(2, 77, 77))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])  # bf16 has the range of fp32
@pytest.mark.parametrize("b", LOW_PRECISION_BLOCKS)
def test_low_precision_cayley_neumann_backward(b, scale, poisoned):
    grad, packed = scale * torch.randn(3, b, b, device=DEVICE).mT, skew(3, b)
    actual = torch.ops.poetx.cayley_neumann_backward(grad, packed, b, 3, True)
    expected = cayley_neumann_backward_reference(*wide(grad, packed), b, 3)
    assert_close(actual, expected, torch.float16)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("b", LOW_PRECISION_BLOCKS)
def test_low_precision_rotation_tangent_backward(b, scale, poisoned):
    for flipped in (0, 2):
        args = (scale * torch.randn(3, b, b, device=DEVICE).mT, skew(3, b), b, 3, True, flipped)
        assert OPS["rotation_tangent_backward"].kernel.applies(*args)
        actual = torch.ops.poetx.rotation_tangent_backward(*args)
        assert actual.is_contiguous()
        assert_close(actual, rotation_tangent_backward_reference(*wide(*args)), torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b", LOW_PRECISION_BLOCKS)
def test_rotation_delta(b, dtype, poisoned):
    packed = skew(3, b)
    for flipped in (0, 2, 3):
        args = (packed, b, 3, dtype, flipped)
        assert OPS["rotation_delta"].kernel.applies(*args)
        expected = rotation_delta_reference(packed.double(), b, 3, torch.float64, flipped)
        assert_close(torch.ops.poetx.rotation_delta(*args), expected, dtype)


def test_rotation_delta_without_a_kernel_of_its_own_is_that_of_the_rotations():
    for b, order, dtype in (
        (512, 3, torch.bfloat16),
        (64, 2, torch.bfloat16),
        (64, 3, torch.float),
    ):
        packed = skew(2, b)
        assert not OPS["rotation_delta"].kernel.applies(packed, b, order, dtype, 1)
        actual = torch.ops.poetx.rotation_delta(packed, b, order, dtype, 1)
        expected = rotation_delta_reference(packed.double(), b, order, torch.float64, 1)
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize("skew_part", [0.0, 0.1, 1.0])
def test_low_precision_tangent_of_a_mostly_symmetric_gradient(skew_part):
    # Every plane at the limit of the angle guard, the worst case of the truncated series.
    b, angle = 256, 0.25
    q = torch.randn(3, b, b, device=DEVICE, dtype=torch.float64)
    u, _, v = torch.linalg.svd(q - q.mT)
    packed = pack(angle * (u @ v)).float()
    p = torch.randn(3, b, b, device=DEVICE)
    args = (p + p.mT + skew_part * (p - p.mT), packed, b, 3, True)
    actual = torch.ops.poetx.rotation_tangent_backward(*args)
    expected = rotation_tangent_backward_reference(*wide(*args))
    assert_close(actual, expected, torch.bfloat16)


def test_tangent_without_a_kernel_runs_the_reference():
    grad, packed = torch.randn(2, 16, 16, device=DEVICE), skew(2, 16)
    for order, narrow in ((3, False), (4, True), (None, True)):
        args = (grad, packed, 16, order, narrow, 0)
        assert not OPS["rotation_tangent_backward"].kernel.applies(*args)
        actual = torch.ops.poetx.rotation_tangent_backward(*args)
        assert_close(actual, rotation_tangent_backward_reference(*wide(*args)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "b"),
    [
        ((130, 512), 256),
        ((2, 65, 384), 64),
        ((7, 100), 33),  # a tail of one column
        ((300, 1000), 300),  # a tail wider than a tile
        ((5, 6), 2),
        ((1, 77), 77),
        ((4096, 1536), 128),
        ((200, 496), 192),  # padded to 256; a tail
        ((130, 1104), 512),
        ((70, 515), 256),  # whole blocks, unaligned rows
    ],
)
@pytest.mark.parametrize("permuted", [None, "columns", "chunks", "mixed"])
def test_rotate_blocks(dtype, shape, b, permuted, poisoned):
    width = shape[-1]
    x = torch.randn(shape, device=DEVICE).to(dtype)
    rotation = near_identity(width // b, b)
    gather, scatter = pairs(width, permuted)
    for transpose in (False, True):
        check("rotate_blocks", rotate_blocks_reference, x, rotation, gather, scatter, transpose)
        if dtype != torch.float32:  # the bits of what rounds by itself
            delta = minus_identity(rotation).to(dtype)
            actual = torch.ops.poetx.rotate_by_delta(x, delta, gather, scatter, transpose)
            expected = torch.ops.poetx.rotate_blocks(x, rotation, gather, scatter, transpose)
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rotate_blocks_by_the_identity_is_exact(dtype):
    x = torch.randn(70, 100, device=DEVICE).to(dtype)
    identity = torch.eye(32, device=DEVICE).repeat(3, 1, 1)
    assert torch.equal(torch.ops.poetx.rotate_blocks(x, identity, None, None, True), x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rotate_blocks_copies_all_that_is_behind_the_blocks(dtype, poisoned):
    x = torch.randn(70, 2048, device=DEVICE).to(dtype)
    for gather, scatter in (pairs(2048, None), pairs(2048, "chunks")):
        args = (x, near_identity(2, 256), gather, scatter, False)
        check("rotate_blocks", rotate_blocks_reference, *args)


def test_rotate_blocks_takes_strided_arguments():
    x = torch.randn(64, 50, device=DEVICE, dtype=torch.bfloat16).T
    rotation = near_identity(2, 32).mT
    check("rotate_blocks", rotate_blocks_reference, x, rotation, None, None, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "b_in", "b_out"),
    [
        ((512, 768), 256, 256),
        ((2048, 5376), 256, 256),  # several tiles a program
        ((1000, 496), 192, 128),  # tails
        ((264, 144), 72, 256),
        ((130, 100), 33, 65),  # one side after the other
        ((1100, 1040), 256, 512),
    ],
)
@pytest.mark.parametrize("permuted", [None, "columns", "chunks"])
def test_fold_weight(dtype, shape, b_in, b_out, permuted, poisoned):
    deltas = delta(shape[1] // b_in, b_in, dtype), delta(shape[0] // b_out, b_out, dtype)
    orders = [pairs(width, permuted)[0] for width in reversed(shape)]
    weight = torch.randn(shape, device=DEVICE).to(dtype)
    for stored, sides in ((dtype, (0, 1)), (torch.float32, (0, 1)), (dtype, (0,)), (dtype, (1,))):
        given = [given[i] if i in sides else None for given in (deltas, orders) for i in (0, 1)]
        args = (weight.to(stored), *given)
        assert OPS["fold_weight"].kernel.applies(*args, dtype)
        actual = torch.ops.poetx.fold_weight(*args, dtype)
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert_close(actual, fold_weight_reference(*wide(*args), torch.float64), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fold_of_what_is_behind_the_blocks_of_both_sides_is_exact(dtype, poisoned):
    weight = torch.randn(700, 1040, device=DEVICE).to(dtype)
    deltas = delta(1, 256, dtype), delta(1, 128, dtype)
    actual = torch.ops.poetx.fold_weight(weight, *deltas, None, None, dtype)
    assert torch.equal(actual[128:, 256:], weight[128:, 256:])


@pytest.mark.parametrize("dtypes", [*((d, d) for d in FLOATS), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize(
    ("shape", "b"),
    [
        ((130, 512), 256),
        ((3, 700, 100), 33),
        ((5, 6), 2),
        ((8192, 768), 128),
        ((2049, 2048), 256),
        ((1000, 1104), 512),
        ((200, 496), 192),
    ],
)
@pytest.mark.parametrize("permuted", [None, "columns", "chunks", "mixed"])
def test_block_product(dtypes, shape, b, permuted, poisoned):
    x, y = (torch.randn(shape, device=DEVICE).to(dtype) for dtype in dtypes)
    width = shape[-1]
    args = (x, y, width // b, b, *pairs(width, permuted))
    first = check("block_product", block_product_reference, *args)
    assert first.dtype == torch.float32
    assert torch.equal(first, torch.ops.poetx.block_product(*args)), "not deterministic"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("leading", "widths", "b"),
    [
        ((2049,), (2048, 512), 256),
        ((130,), (512, 2048), 256),
        ((3, 700), (100, 67), 33),
        ((5,), (6, 4), 2),
        ((8192,), (768, 384), 128),
        ((1000,), (1104, 2096), 512),
        ((200,), (496, 512), 192),
        ((70,), (515, 256), 256),
    ],
)
@pytest.mark.parametrize("kinds", [(None, None), ("columns", "chunks"), ("chunks", "chunks")])
def test_stacked_block_products(dtype, leading, widths, b, kinds, poisoned):
    operands = [torch.randn(*leading, widths[i], device=DEVICE).to(dtype) for i in (0, 0, 1, 1)]
    gathers = [pairs(width, kind)[0] for width, kind in zip(widths, kinds, strict=True)]
    args = (*operands, *(width // b for width in widths), b, *gathers)
    first = check("stacked_block_products", stacked_block_products_reference, *args)
    again = torch.ops.poetx.stacked_block_products(*args)
    assert torch.equal(first, again), "not deterministic"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("tokens", "widths", "b"),
    [
        (33, (77, 154), 77),
        (999, (640, 1296), 320),
        (8192, (1024, 2048), 512),
        (70, (1024, 1040), 1024),
    ],
)
@pytest.mark.parametrize("kinds", [(None, "columns"), ("chunks", "chunks")])
def test_skew_block_products(dtype, tokens, widths, b, kinds, poisoned):
    x, y, x2, y2 = (torch.randn(tokens, widths[i], device=DEVICE).to(dtype) for i in (0, 0, 1, 1))
    gathers = [pairs(width, kind)[0] for width, kind in zip(widths, kinds, strict=True)]
    first = x, y, widths[0] // b, b, gathers[0]
    check("skew_block_products", skew_block_products_reference, *first, None, None, 0, None)
    args = *first, x2, y2, widths[1] // b, gathers[1]
    made = check("skew_block_products", skew_block_products_reference, *args)
    again = torch.ops.poetx.skew_block_products(*args)
    assert torch.equal(made, again), "not deterministic"


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32])
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        *((shape, 1) for shape in ((1, 2), (3, 5, 77), (9001, 128), (65, 14336), (3, 32768))),
        ((3, 5, 76), 4),
        ((9001, 1032), 8),
        ((3, 40000), 16),
        ((65, 14336), 112),
        ((5, 96), 96),
    ],
)
def test_permute_columns(dtype, shape, chunk, poisoned):
    x = (100 * torch.randn(shape, device=DEVICE)).to(dtype)
    order = pair(shape[-1], chunk)
    for inverse in (False, True):
        assert OPS["permute_columns"].kernel.applies(x, order, inverse)
        actual = torch.ops.poetx.permute_columns(x, order, inverse)
        assert torch.equal(actual, permute_columns_reference(x, order, inverse))


def test_where_no_kernel_applies_the_reference_runs():
    order = pair(MAX_PERMUTE_WIDTH + 1)
    x = torch.randn(2, MAX_PERMUTE_WIDTH + 1, device=DEVICE)
    assert not OPS["permute_columns"].kernel.applies(x, order, False)
    assert torch.equal(torch.ops.poetx.permute_columns(x, order), x[:, order[0]])
    x = torch.randn(3, 8, device=DEVICE, dtype=torch.float64)
    rotation = near_identity(2, 4).double()
    assert not OPS["rotate_blocks"].kernel.applies(x, rotation, None, None, False)
    actual = torch.ops.poetx.rotate_blocks(x, rotation)
    assert_close(actual, rotate_blocks_reference(x.cpu(), rotation.cpu(), None, None, False))


def test_empty_batches():
    x = torch.randn(0, 3, 8, device=DEVICE)
    order = pair(8)
    assert torch.ops.poetx.permute_columns(x, order).shape == (0, 3, 8)
    assert torch.ops.poetx.rotate_blocks(x, near_identity(2, 4), order).shape == (0, 3, 8)
    product = torch.ops.poetx.block_product(x, x, 2, 4)
    assert torch.equal(product, torch.zeros(2, 4, 4, device=DEVICE))
    assert torch.ops.poetx.cayley_neumann(skew(0, 4), 4, 3).shape == (0, 4, 4)


def layer(x: Tensor, packed: Tensor, gather: Tensor, scatter: Tensor, b: int) -> Tensor:
    rotation = ops.cayley_neumann(packed, b, 3)
    y = ops.rotate_blocks(x, rotation, gather, None)
    y = ops.rotate_blocks(y.sin(), rotation, None, scatter, True)
    return ops.permute_columns(y, gather, True)


def with_gradients(function: Callable[..., Tensor], *inputs: Any) -> list[Tensor]:
    out = function(*inputs)
    wanted = [i for i in inputs if isinstance(i, Tensor) and i.requires_grad]
    weights = torch.linspace(0.5, 1.5, out.numel(), device=out.device).view_as(out)
    return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), wanted)]


def inputs_of(
    dtype: torch.dtype, tokens: int, width: int, b: int, kind: str = "columns"
) -> tuple[Any, ...]:
    x = torch.randn(2, tokens, width, device=DEVICE).to(dtype).requires_grad_()
    packed = skew(width // b, b).requires_grad_()
    return x, packed, *pairs(width, kind), b


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("width", "b"), [(256, 64), (100, 33)])
def test_gradients_in_eager(dtype, width, b):
    inputs = inputs_of(dtype, 40, width, b)
    double = [
        i.detach().double().requires_grad_() if isinstance(i, Tensor) and i.requires_grad else i
        for i in inputs
    ]
    for actual, expected in zip(
        with_gradients(layer, *inputs), with_gradients(layer, *double), strict=True
    ):
        assert_close(actual, expected, dtype)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        register()
        patches = {"post_grad_custom_pre_pass": ExpandOps("gpu")}
        return compile_fx(gm, inputs, compile_inner, config_patches=patches)

    return torch.compile(function, backend=backend, fullgraph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "b", "kind"), [(256, 64, "columns"), (256, 64, "chunks"), (100, 33, "columns")]
)
def test_inductor_launches_the_kernels_itself(dtype, width, b, kind):
    from torch._inductor.utils import run_and_get_code

    inputs = inputs_of(dtype, 40, width, b, kind)
    actual, codes = run_and_get_code(with_gradients, compiled(layer), *inputs)
    for got, expected in zip(actual, with_gradients(layer, *inputs), strict=True):
        assert_close(got, expected, dtype)
    forward, backward = codes
    # Comments name the ops that the code came from.
    assert not re.findall(r"^[^#\n]*torch\.ops\.poetx\.", forward + backward, re.MULTILINE)
    for kernel in ("unpack", "square", "horner_step"):
        assert len(re.findall(rf"{kernel}_kernel_\d+\.run\(", forward)) == 1
    assert len(re.findall(r"unpack_and_split_kernel_\d+\.run\(", backward)) == 1
    assert len(re.findall(r"backward_product_kernel_\d+\.run\(", backward)) == 3


@inductor_config.patch(compile_threads=4)  # one where tests run side by side
def test_kernels_are_on_their_way_when_the_module_asks_for_them(inductor_cache):
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.warm_pool()
    deadline = time.monotonic() + 120
    while not AsyncCompile.use_process_pool() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert AsyncCompile.use_process_pool(), "no workers after two minutes"
    counters.clear()
    with_gradients(compiled(layer), *inputs_of(torch.bfloat16, 72, 256, 64))
    asked = counters["inductor"]["async_compile_cache_miss"]  # it counts all of them
    assert counters["inductor"]["async_compile_cache_hit"] == asked / 2 > 0


@inductor_config.patch(compile_threads=4)
def test_threads_compile_while_there_are_no_workers(inductor_cache, monkeypatch):
    from torch._inductor.async_compile import AsyncCompile

    compiled_by = []
    in_a_thread = early._in_a_thread

    def noted(name, source):
        in_a_thread(name, source)
        compiled_by.append(threading.current_thread().name)

    monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda cls: False))
    monkeypatch.setattr(early, "_in_a_thread", noted)
    counters.clear()
    inputs = inputs_of(torch.bfloat16, 88, 256, 64)
    found = with_gradients(compiled(layer), *inputs)
    for got, expected in zip(found, with_gradients(layer, *inputs), strict=True):
        assert_close(got, expected, torch.bfloat16)
    assert len(compiled_by) == counters["inductor"]["async_compile_cache_miss"] > 0
    assert all(name.startswith("poetx-early") for name in compiled_by)


def test_dynamic_number_of_tokens_compiles_once():
    width, b = 192, 64
    counters.clear()
    fast = compiled(layer)
    for tokens in (40, 41, 3000):
        inputs = inputs_of(torch.bfloat16, tokens, width, b)
        torch._dynamo.mark_dynamic(inputs[0], 1)
        actual = with_gradients(fast, *inputs)
        for got, expected in zip(actual, with_gradients(layer, *inputs), strict=True):
            assert_close(got, expected, torch.bfloat16)
    assert counters["stats"]["unique_graphs"] == 1


def test_kernels_run_inside_cuda_graphs():
    width, b = 128, 32
    x, packed, gather, scatter, _ = (i for i in inputs_of(torch.bfloat16, 16, width, b))
    out = layer(x, packed, gather, scatter, b)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = layer(x, packed, gather, scatter, b)
    graph.replay()
    assert torch.equal(captured, out)


SIZES = [2, 3, 5, 16, 33, 64, 77, 128, 192, 256, 320, 384, 512, 768, 1024]


@pytest.mark.parametrize("b", SIZES)
def test_orthogonalize_skew(b, poisoned):
    """The steps in fp64, but for rounding."""
    # Of few planes, some have a value where the steps are steep: on average they are as good.
    packed = torch.randn(300 if b < 64 else 5, b * (b - 1) // 2, device=DEVICE)
    assert OPS["orthogonalize_skew"].kernel.applies(packed, b)
    actual = torch.ops.poetx.orthogonalize_skew(packed, b)
    expected = orthogonalize_skew_reference(packed.double(), b)
    assert relative_error(actual, expected) < ORTHOGONALIZED
    assert torch.equal(actual, torch.ops.poetx.orthogonalize_skew(packed, b)), "not deterministic"
    assert not torch.ops.poetx.orthogonalize_skew(torch.zeros_like(packed), b).any()
    packed[1, 0] = math.nan
    broken = torch.ops.poetx.orthogonalize_skew(packed, b)
    assert not broken[1].isfinite().any()
    assert torch.equal(broken[2:], actual[2:])


@pytest.mark.parametrize("b", [b for b in SIZES if b > 16])
def test_products_of_orthogonalisation(b, poisoned):
    """Every element of every product: ptxas has dropped some (docs/decisions.md)."""
    from poetx_compile.ops.kernels import orthogonalize as kernels

    blocks, coefficients = 9, (1.5, -0.75, 0.5)
    packed = torch.randn(blocks, b * (b - 1) // 2, device=DEVICE)
    matrices = kernels._unpacked(packed, b, kernels.tiling_of(b), torch.bfloat16)
    x = matrices[0].double()
    assert_close(x[:, :b, :b], unpack(packed.double(), b), torch.bfloat16)
    assert not x[:, b:].any()
    assert not x[:, :, b:].any()
    norm = torch.linalg.vector_norm(packed, dim=1)
    kernels._products(matrices, norm, kernels.tiling_of(b), [coefficients])
    alpha, beta, gamma = coefficients
    x /= (norm.double() * 2**0.5)[:, None, None]
    square = x @ x.mT
    bound = kernels.BOUND * (torch.linalg.matrix_norm(square) * 0.5**0.5).sqrt()[:, None, None]
    square, x = square / bound**2, x / bound
    polynomial = beta * square + gamma * square @ square
    for actual, expected, what in (
        (matrices[2].double(), polynomial, "polynomial"),
        (matrices[1].double(), alpha * x + polynomial @ x, "result"),
    ):
        error = (actual - expected).abs() / expected.abs().amax((1, 2), keepdim=True)
        assert error.max() < 0.02, f"{what}: {error.max()} at {(error == error.max()).nonzero()}"
        assert_close(actual, expected, torch.bfloat16, what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("n", "m", "b_out", "b_in", "chunk"),
    [
        (520, 1040, 256, 256, 8),
        (1040, 1536, 512, 512, 16),
        (1024, 2080, 512, 1024, 16),
        (999, 515, 77, 33, 1),
        (768, 768, 192, 768, 64),
    ],
)
def test_turn_weight(dtype, n, m, b_out, b_in, chunk, poisoned):
    """Beside the same step in fp64: rounding is as large as a step, at random, and averages out."""
    weight = torch.randn(n, m, device=DEVICE).to(dtype)
    steps = skew(m // b_in, b_in, 0.02), skew(n // b_out, b_out, 0.02)
    chunks = [chunk if size % chunk == 0 else 1 for size in (m, n)]
    args = *steps, *map(pair, (m, n), chunks), b_in, b_out, 3, 2**63 - 5, 17, 4
    assert OPS["turn_weight_"].kernel.applies(weight, *args, None, None)
    target, turned = weight.double(), weight.clone()
    torch.ops.poetx.turn_weight_(target, *wide(*args))
    torch.ops.poetx.turn_weight_(turned, *args, torch.tensor(1.0, device=DEVICE))
    again = weight.clone()
    torch.ops.poetx.turn_weight_(again, *args)
    assert torch.equal(again, turned), "other bits"
    moved, expected = turned.double() - weight.double(), target - weight.double()
    if dtype == torch.float32:
        assert_close(moved, expected, dtype)
    else:
        gap = 2.0**-7 * target.abs() + 1e-2 * expected.std()
        assert ((turned.double() - target).abs() <= gap).all()
        along = (moved * expected).sum() / expected.square().sum()
        assert abs(along - 1) < 5e-3, "a step is not what it should be on average"
        # The bits are those of the reference, so that most entries are rounded alike.
        plain = weight.clone()
        turn_weight_reference(plain, *args)
        assert (plain == turned).float().mean() > 0.9
    torch.ops.poetx.turn_weight_(again, *args, torch.tensor(0, device=DEVICE))
    assert torch.equal(again, turned), "written where apply is zero"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("n", "m", "b", "chunk"),
    [
        (520, 1040, 256, 8),
        (1040, 1536, 512, 16),
        (1088, 2112, 512, 64),
        (704, 1344, 320, 64),
        (2080, 1024, 1024, 16),
        (2112, 3136, 1024, 64),
        (999, 515, 77, 1),
    ],
)
@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_turn_weights(dtype, n, m, b, chunk, side, poisoned):
    """Three layers in one call, beside each alone in fp64, and with the reference's bits."""
    chunks = [chunk if size % chunk == 0 else 1 for size in (m, n)]
    turns = []
    for layer in (5, 2, 9):
        weight = torch.randn(n, m, device=DEVICE).to(dtype)
        steps = skew(m // b * (side != "out"), b, 0.02), skew(n // b * (side != "in"), b, 0.02)
        scale = torch.tensor(1.003, device=DEVICE) if layer == 2 else None
        turns.append(Turn(weight, *steps, *map(pair, (m, n), chunks), b, b, 3, layer, scale))
    before = [turn.weight.clone() for turn in turns]
    versions = [turn.weight._version for turn in turns]
    turn_weights_(turns, 2**63 - 5, 17, torch.tensor(0, device=DEVICE))
    assert all(map(torch.equal, before, [turn.weight for turn in turns])), "apply is zero"
    turn_weights_(turns, 2**63 - 5, 17)
    assert all(turn.weight._version > old for turn, old in zip(turns, versions, strict=True))
    for turn, old in zip(turns, before, strict=True):
        given = *turn[1:8], 2**63 - 5, 17, turn.layer, None, turn.scale
        target, plain = old.double(), old.clone()
        turn_weight_reference(target, *wide(*given))
        moved, expected = turn.weight.double() - old.double(), target - old.double()
        if dtype == torch.float32:
            assert_close(moved, expected, dtype)
            continue
        along = (moved * expected).sum() / expected.square().sum()
        assert abs(along - 1) < 5e-3, "a step is not what it should be on average"
        turn_weight_reference(plain, *given)
        assert (plain == turn.weight).float().mean() > 0.9, "other bits"
