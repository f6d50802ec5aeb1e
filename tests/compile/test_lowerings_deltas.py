"""Rotations of 2-byte activations are rounded once for all that are made together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from poetx_compile.compile.lowerings.deltas import round_together
from poetx_compile.ops.kernels import Kernel

B, TOKENS, WIDTH = 8, 5, 32
poetx = torch.ops.poetx


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels apply by their arguments, on whatever device."""
    monkeypatch.setattr(Kernel, "applies", lambda self, *args: self.takes(*args))


def rewritten(
    function: Callable[..., Any], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The ops behind the pass, whose graph gives the bits of the one before."""
    skew = 0.1 * torch.randn(6, B * (B - 1) // 2)
    gm = make_fx(function, tracing_mode="fake")(x, skew)
    round_together(gm.graph)
    gm.graph.lint()
    gm.recompile()
    monkeypatch.undo()  # the ops themselves run on the CPU
    for actual, expected in zip(gm(x, skew), function(x, skew), strict=True):
        assert torch.equal(actual, expected)
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            assert node.users
    names = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    return [name.removesuffix(".default") for name in names if name.startswith("poetx")]


def split(skew: Tensor, narrow: bool = True) -> tuple[Tensor, ...]:
    stack = poetx.cayley_neumann(skew, B, 3, narrow)
    return torch.ops.aten.split_with_sizes(stack, [4, 2])


def there_and_back(x: Tensor, skew: Tensor) -> list[Tensor]:
    first, second = split(skew)
    y = poetx.rotate_blocks(x, first)
    return [poetx.rotate_blocks(y, second, None, None, True)]


def both_with_the_stack(x: Tensor, skew: Tensor) -> list[Tensor]:
    first, second = split(skew)
    return [poetx.rotate_blocks(x, first), poetx.rotate_blocks(x, second), first]


def one_with_the_stack(x: Tensor, skew: Tensor) -> list[Tensor]:
    first, second = split(skew)
    return [poetx.rotate_blocks(x, first), second]


def exact(x: Tensor, skew: Tensor) -> list[Tensor]:
    first, _ = split(skew, False)
    return [poetx.rotate_blocks(x, first)]


def whole(x: Tensor, skew: Tensor) -> list[Tensor]:
    return [poetx.rotate_blocks(x[:, :WIDTH], poetx.cayley_neumann(skew[:4], B, 3, True))]


def of_two_dtypes(x: Tensor, skew: Tensor) -> list[Tensor]:
    first, second = split(skew)
    return [poetx.rotate_blocks(x, first), poetx.rotate_blocks(x.half(), second)]


STACK, DELTA = "poetx.cayley_neumann", "poetx.rotation_delta"
PRODUCT, ROUNDED = "poetx.rotate_blocks", "poetx.rotate_by_delta"


@pytest.mark.parametrize(
    ("function", "dtype", "expected"),
    [
        (there_and_back, torch.bfloat16, [DELTA, ROUNDED, ROUNDED]),
        (there_and_back, torch.float16, [DELTA, ROUNDED, ROUNDED]),
        (there_and_back, torch.float32, [STACK, PRODUCT, PRODUCT]),
        (both_with_the_stack, torch.bfloat16, [STACK, ROUNDED, ROUNDED]),
        (one_with_the_stack, torch.bfloat16, [STACK, PRODUCT]),
        (exact, torch.bfloat16, [STACK, ROUNDED]),
        (whole, torch.bfloat16, [DELTA, ROUNDED]),
        (of_two_dtypes, torch.bfloat16, [STACK, PRODUCT, PRODUCT]),
    ],
)
def test_what_rotates_alone_is_made_rounded(
    function: Callable[..., Any],
    dtype: torch.dtype,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(TOKENS, WIDTH).to(dtype)
    assert rewritten(function, x, monkeypatch) == expected


def test_nothing_changes_where_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "applies", lambda self, *args: False)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    assert rewritten(there_and_back, x, monkeypatch) == [STACK, PRODUCT, PRODUCT]
