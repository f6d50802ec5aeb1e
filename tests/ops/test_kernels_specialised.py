"""Each kernel with integers of one: Triton makes such an argument a constant, a Python int."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch

from poetx_compile.ops import OPS, kernels
from tests.helpers.kernel_cases import BF16, CASES, meta, needs_triton, pair

pytestmark = needs_triton


def launch_everything() -> None:
    """Every kernel at least once: the ops of `CASES`, and what optimisers call."""
    from poetx_compile.ops.kernels import turn_layers
    from poetx_compile.ops.kernels.muon import muon_steps
    from poetx_compile.ops.kernels.turn_weight import turn_by_deltas
    from poetx_compile.ops.muon_step import Part

    for op, args in CASES.values():
        OPS[op].kernel.load()(*args)
    step = torch.empty((), dtype=torch.int64, device="meta")
    stored = meta(1024, 512, dtype=torch.int8), meta(1024, 8, dtype=BF16)
    OPS["requantize_"].kernel.load()(*stored, meta(1024, 512), step, 5, 3)
    for b in (256, 1024):
        planes, perm = meta(8, b * (b - 1) // 2), pair(64)
        scale = meta(8, 128)
        for dtype in (torch.float32, torch.int8):
            part = Part(planes, planes.to(dtype), scale if dtype == torch.int8 else None)
            muon_steps([part], 1, b, 0.95, 0.02, 3, 7)
        weight = meta(8 * b, 8 * b, dtype=BF16)
        deltas = [meta(8, b, b, dtype=BF16)] * 2
        turn_by_deltas(weight, *deltas, perm, perm, 5, 3, 1, None)
        for sides in ((planes, planes), (planes, planes[:0]), (planes[:0], planes)):
            turn_layers.turn_weight_(weight, *sides, perm, perm, b, b, 3, 5, 3, 1, None)


def defined() -> set[str]:
    """Names of the kernels in `ops/kernels`: what is launched, not what they call."""
    names: set[str] = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        source = importlib.import_module(f"{kernels.__name__}.{module.name}")
        names |= {name for name in vars(source) if name.endswith("_kernel")}
    return names


def with_ones(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """The source of a launch whose integers are one, specialised as Triton's launcher does."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    signature, values = dict.fromkeys(constants, "constexpr"), dict(constants)
    for param, value in zip(kernel.params, args, strict=False):
        if isinstance(value, int) and not param.do_not_specialize:
            signature[param.name], values[param.name] = "constexpr", 1
        else:
            signature[param.name] = mangle_type(value)
    return ASTSource(kernel, signature, constexprs=values)


def test_every_kernel_compiles_with_integers_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction

    launches: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        known = {key: constants[key] for key in constants.keys() & set(kernel.arg_names)}
        kinds = [key for key in known.items() if isinstance(key[1], bool)]
        launches.setdefault(str((kernel.__name__, sorted(kinds))), (kernel, args, known))

    monkeypatch.setattr(JITFunction, "run", record)
    launch_everything()
    assert {kernel.__name__ for kernel, _, _ in launches.values()} == defined()

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({})
    implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    failed = {}
    for name, launch in launches.items():
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        try:
            with_ones(*launch).make_ir(target, options, implementation, modules, context)
        except Exception as error:
            failed[name] = str(error)
    assert failed == {}
