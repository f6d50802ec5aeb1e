"""Where a kernel runs, and how often it is tuned: no Triton and no GPU is needed to tell."""

from __future__ import annotations

import ast
import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from poetx_compile import ops
from poetx_compile.ops import OPS, kernels
from poetx_compile.ops.kernels import common


def _arguments(op: str, device: str) -> tuple[Any, ...]:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    bf16 = torch.bfloat16
    x, skew, blocks = new(6, 64, dtype=bf16), new(2, 496), new(2, 32, 32)
    int8 = new(6, 64, dtype=torch.int8)
    pair, rows = (torch.arange(size, device=device).repeat(2, 1) for size in (64, 6))
    return {
        "cayley_neumann": (skew, 32, 3, False),
        "cayley_neumann_backward": (blocks, skew, 32, 3, False),
        "rotation_delta": (skew, 32, 3, bf16, 0),
        "rotation_tangent_backward": (blocks, skew, 32, 3, True, 0),
        "fold_weight": (x, blocks.to(bf16), None, None, None, bf16),
        "rotate_blocks": (x, blocks, None, None, False),
        "rotate_by_delta": (x, blocks.to(bf16), None, None, False),
        "block_product": (x, x, 2, 32, None, None),
        "stacked_block_products": (x, x, x, x, 2, 2, 32, None, None),
        "skew_block_products": (x, x, 2, 32, pair, x, x, 2, None),
        "orthogonalize_skew": (skew, 32),
        "turn_weight_": (x, skew, new(1, 15), pair, rows, 32, 6, 3, 0, 0, 0, None, None),
        "requantize_": (int8, new(6, 1), new(6, 64), new(dtype=torch.int64), 0, 0),
        "permute_columns": (x, pair, False),
    }[op]


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.kernel])
def test_the_device_of_the_tensors_decides_and_not_what_is_installed(op, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_triton_runs_on", lambda index: True)
    with FakeTensorMode():
        assert OPS[op].kernel.applies(*_arguments(op, "cuda:0"))

    def refused(*_: Any) -> Any:
        raise AssertionError("a kernel was loaded for tensors on the CPU")

    monkeypatch.setattr(kernels.Kernel, "load", refused)
    assert not OPS[op].kernel.applies(*_arguments(op, "cpu"))
    given = _arguments(op, "cpu")
    if op.endswith("_backward"):
        # Through autograd, as it is called.
        _, skew, b, order, narrow, *_ = given
        forward = getattr(ops, op.removesuffix("_backward"))
        forward(skew.requires_grad_(), b, order, narrow).sum().backward()
        assert skew.grad is not None
    else:
        result = getattr(torch.ops.poetx, op)(*given)
        assert (given[0] if op.endswith("_") else result).device.type == "cpu"


def test_the_device_of_the_tensors_is_asked_what_fits(monkeypatch) -> None:
    with FakeTensorMode():  # looks whether there is a GPU
        x = torch.empty(2, device="cuda:1")
    asked: list[Any] = []
    monkeypatch.setattr(kernels, "_triton_runs_on", lambda index: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = asked.append
    monkeypatch.setattr(torch.cuda, "device", lambda one: given(one) or contextlib.nullcontext())
    assert kernels.Kernel("", lambda x: asked == [x.device]).applies(x)


def test_no_kernel_is_autotuned(monkeypatch) -> None:
    """The first step compiles each kernel with one set of launch parameters."""
    callers = []
    for path in Path(common.__file__).parents[2].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", getattr(node, "id", None))
            if name in ("autotune", "heuristics", "autotune_select_algorithm"):
                callers.append((path.name, name))
    assert callers == [("common.py", "autotune")]

    def autotune(configs: list[Any], key: list[str]) -> Any:
        assert len(configs) == 1
        return lambda kernel: (kernel, configs[0])

    triton = SimpleNamespace(autotune=autotune, Config=lambda meta, **parameters: parameters)
    monkeypatch.setitem(sys.modules, "triton", triton)
    kernel = object()
    made = common._configured.__wrapped__(kernel, num_warps=4, num_stages=2)
    assert made == (kernel, {"num_warps": 4, "num_stages": 2})
