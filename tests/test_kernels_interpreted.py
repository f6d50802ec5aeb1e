"""The Triton kernels' arithmetic on the CPU: Triton's interpreter in a process of its own.

The interpreter is chosen when Triton is imported, hence the subprocess. It multiplies bf16 as raw
16-bit integers, so that products are tested in fp32 and fp16 here and in bf16 on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

PRELUDE = """
import torch
import triton.runtime.interpreter as interpreter

# NumPy 2.4 no longer turns an array of one element into an index.
patch = interpreter._patch_lang_tensor
def patched(tensor, scope):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
interpreter._patch_lang_tensor = patched

from importlib import import_module
from poetx_compile.ops import kernels
from tests.tolerances import assert_close

torch.manual_seed(0)
torch.use_deterministic_algorithms(True)  # empty memory is NaN: an unwritten entry shows
torch.utils.deterministic.fill_uninitialized_memory = True

def reference(op, module):
    return getattr(import_module("poetx_compile.ops." + module), op + "_reference")

def check(op, module, *args, dtype=None):
    actual, expected = kernels.implementation(op)(*args), reference(op, module)(*args)
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
identity = torch.eye(8).expand(2, 8, 8)
x = torch.randn(5, 20).half()
assert torch.equal(kernels.implementation("rotate_blocks")(x, identity, None, None, False), x)
""",
    "block_product": """
for dtype in (torch.float32, torch.float16):
    for tokens, width, b in ((7, 10, 3), (70, 64, 32), (3, 73, 33)):
        x, y = torch.randn(2, tokens, width).to(dtype)
        check("block_product", "block_product", x, y, width // b, b, None, pair(width))
x, y = torch.randn(1100, 8), torch.randn(1100, 8).half()  # two splits, two dtypes
check("block_product", "block_product", x, y, 2, 4, pair(8), None)
""",
    "permute": """
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
    for shape in ((1, 2), (5, 3, 77), (4, 64), (3, 2, 1)):
        x = (100 * torch.randn(shape)).to(dtype)
        for inverse in (False, True):
            args = (x, pair(shape[-1]), inverse)
            actual = kernels.implementation("permute_columns")(*args)
            assert torch.equal(actual, reference("permute_columns", "permute")(*args))
special = torch.tensor([[float("inf"), -0.0, float("nan"), -float("inf")]] * 3).bfloat16()
order = pair(4)
actual = kernels.implementation("permute_columns")(special, order, False)
assert torch.equal(actual.view(torch.int16), special.view(torch.int16)[:, order[0]])
""",
}


@pytest.mark.parametrize("kernel", CASES)
def test_kernel_equals_reference(kernel):
    script = PRELUDE + CASES[kernel]
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
