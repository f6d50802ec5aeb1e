"""One definition says all there is to know of an op."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from poetx_compile import ops
from poetx_compile.ops import OPS, kernels
from poetx_compile.ops.registry import define

KERNELS = {name: op.kernel for name, op in OPS.items() if op.kernel is not None}


def test_every_op_is_in_the_registry() -> None:
    assert set(ops.__all__) - {"OPS", "rotations"} <= set(OPS)
    for name in OPS:
        assert hasattr(torch.ops.poetx, name)


@pytest.mark.parametrize("op", KERNELS)
def test_a_kernel_takes_the_arguments_of_its_op(op: str) -> None:
    """As far as the file says; no Triton is needed to read it."""
    module, function = KERNELS[op].host.split(".")
    source = (Path(kernels.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    (host,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
    expected = list(inspect.signature(OPS[op].reference).parameters)
    assert [a.arg for a in host.args.args] == expected
    assert len(inspect.signature(KERNELS[op].takes).parameters) == len(expected)


@pytest.fixture
def seen() -> Iterator[list[tuple[bool, bool]]]:
    """Defines ``poetx::repeated``; gives what its check saw: the flags, defaults among them."""
    found: list[tuple[bool, bool]] = []

    def reference(x: Tensor, once: bool, twice: bool = True) -> Tensor:
        return torch.cat([x, x]) if twice else x

    def fake(x, once, twice):
        return x.new_empty(2 * len(x) if twice else len(x))

    def check(x, once, twice):
        torch._check(x.dim() == 1, lambda: "poetx: x must be a vector")
        found.append((once, twice))

    define("repeated", reference, check=check, fake=fake, drawn="weight")
    yield found
    del OPS["repeated"]


def test_an_op_is_what_its_definition_says(seen: list[tuple[bool, bool]]) -> None:
    op = torch.ops.poetx.repeated
    assert str(op.default._schema) == (
        "poetx::repeated(Tensor x, bool once, bool twice=True) -> Tensor"
    )
    x = torch.randn(3)
    assert op(x, False).shape == op(x, once=False).shape == op(x.to("meta"), False).shape == (6,)
    assert seen == [(False, True)] * 3
    with pytest.raises(RuntimeError, match="must be a vector"):
        op(x[None], False)
    assert OPS["repeated"].drawn == "weight"


def test_no_op_returns_its_input(seen: list[tuple[bool, bool]]) -> None:
    x = torch.randn(3)
    out = torch.ops.poetx.repeated(x, False, False)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()
    strided = torch.randn(3, 2)[:, 0]
    assert torch.ops.poetx.repeated(strided, False, False).is_contiguous()
