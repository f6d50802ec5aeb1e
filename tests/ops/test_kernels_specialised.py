"""What Triton compiles a kernel anew for: integers of one or divisible by 16, aligned addresses.

Each kernel with integers of one, which become constants; and none again where what differs is how
much a step has to do.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pkgutil
from collections import defaultdict
from typing import Any

import pytest
import torch

import poetx_compile as poetx
from poetx_compile.ops import OPS, kernels
from tests.helpers.kernel_cases import BF16, CASES, launches, meta, needs_triton, pair
from tests.helpers.rotations import skews

pytestmark = needs_triton


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

    launched: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        known = {key: constants[key] for key in constants.keys() & set(kernel.arg_names)}
        kinds = [key for key in known.items() if isinstance(key[1], bool)]
        launched.setdefault(str((kernel.__name__, sorted(kinds))), (kernel, args, known))

    monkeypatch.setattr(JITFunction, "run", record)
    for launch in launches().values():
        launch()
    assert {kernel.__name__ for kernel, _, _ in launched.values()} == defined()

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({})
    implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    failed = {}
    for name, launch in launched.items():
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        try:
            with_ones(*launch).make_ir(target, options, implementation, modules, context)
        except Exception as error:
            failed[name] = str(error)
    assert failed == {}


class Compiled:
    """What Triton would compile, in place of its launches: the variants of each kernel.

    They are told apart as its launcher does, by the dtypes of tensors, the alignment of their
    addresses and what it knows of integers; apart from that by the constants.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import JITFunction, create_function_from_signature

        self.variants: dict[tuple[Any, ...], dict[tuple[Any, ...], None]] = defaultdict(dict)
        backend, binders = make_backend(GPUTarget("cuda", 90, 32)), {}

        def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
            if kernel not in binders:
                given = kernel.signature, kernel.params, backend
                binders[kernel] = create_function_from_signature(*given)
            values, found, _ = binders[kernel](*args, **constants)
            fixed = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
            pairs = zip(kernel.params, found, strict=True)
            of_runtime = tuple((p.name, *one) for p, one in pairs if not p.is_constexpr)
            self.variants[kernel.__name__, str(fixed)][of_runtime] = None
            for name, value in values.items():  # a step of zeros, not of what lies in memory
                if name in ("direction", "norms") or name.endswith("out"):
                    value.zero_()

        monkeypatch.setattr(JITFunction, "run", record)

    def several(self) -> dict[str, list[Any]]:
        """Of what is compiled more than once, the arguments that differ."""
        return {
            f"{name} {constants}": [set(one) - set(variants[0]) for one in variants[1:]]
            for (name, constants), found in self.variants.items()
            if len(variants := list(found)) > 1
        }


OF_TOKENS = (
    "rotate_blocks",
    "rotate_by_delta",
    "permute_columns",
    *(op for op in OPS if "block_product" in op),
)


def of_size(args: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """The arguments of an op with so many blocks, or tokens, in place of those of a case."""
    first = args[0].shape[0]
    resized = [
        torch.empty(size, *a.shape[1:], dtype=a.dtype, device="meta")
        if isinstance(a, torch.Tensor) and a.shape[0] == first
        else a
        for a in args
    ]
    return tuple(resized)


@pytest.mark.parametrize("case", [case for case, (op, _) in CASES.items() if op != "fold_weight"])
def test_another_number_of_blocks_or_tokens_compiles_nothing(case, monkeypatch):
    op, args = CASES[case]
    compiled = Compiled(monkeypatch)
    # Tokens that come in sixteens need fewer instructions.
    for size in (16, 32, 496, 512, 8192) if op in OF_TOKENS else (1, 2, 15, 16, 17, 32):
        OPS[op].kernel.load()(*of_size(args, size))
    assert compiled.variants
    assert compiled.several() == {}


@pytest.mark.parametrize("b", [64, 256, 512])
@pytest.mark.parametrize("blocks", [(2, 2), (2, 0), (0, 2)])
def test_another_number_of_layers_compiles_nothing(b, blocks, monkeypatch):
    from poetx_compile.ops.kernels.turn_layers import turn_layers
    from poetx_compile.ops.turn_weight import Turn

    compiled = Compiled(monkeypatch)
    steps = [meta(count, b * (b - 1) // 2) for count in blocks]
    turn = Turn(meta(2 * b, 2 * b, dtype=BF16), *steps, pair(2), pair(2), b, b, 3, 1)
    for layers in (1, 2, 15, 16, 17, 32):
        turn_layers([(turn, turn.kind)] * layers, 5, layers, None)
    assert "unpack_kernel" in {name for name, _ in compiled.variants}
    assert compiled.several() == {}


@pytest.mark.parametrize("blocks", [(1, 1), (1, 0), (0, 1)])
def test_shapes_of_one_alignment_share_the_kernels_of_a_turn(blocks, monkeypatch):
    """A decoder layer of 8B has three of them: 16 blocks, or 56, on either side."""
    from poetx_compile.ops.kernels.turn_layers import turn_layers
    from poetx_compile.ops.turn_weight import Turn

    compiled = Compiled(monkeypatch)
    for rows, width in ((4096, 4096), (14336, 4096), (4096, 14336)):
        counts = blocks[0] * width // 256, blocks[1] * rows // 256
        steps = [meta(count, 256 * 255 // 2) for count in counts]
        perms = pair(width // 64), pair(rows // 64)
        turn = Turn(meta(rows, width, dtype=BF16), *steps, *perms, 256, 256, 3, 1)
        turn_layers([(turn, turn.kind)] * 2, 5, 2, None)
    assert compiled.several() == {}


@pytest.mark.parametrize(
    ("interval", "layers", "b"),
    [
        (1, 3, 16),
        (1, 3, 12),  # the gradients of a second side are not aligned
        (1000, 3, 12),
        (1000, 1, 16),  # nothing turns in every other step
    ],
)
def test_a_step_compiles_nothing_that_an_earlier_one_has(interval, layers, b, monkeypatch):
    monkeypatch.setattr(kernels, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(kernels, "_triton_runs_on", lambda index: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    compiled = Compiled(monkeypatch)
    sizes = [3 * b, 3 * b, b, 3 * b][: layers + 1]
    linears = [torch.nn.Linear(*of, bias=False) for of in itertools.pairwise(sizes)]
    model = torch.nn.Sequential(*linears).bfloat16()
    config = poetx.POETXConfig(block_size=b, merge_interval=interval)
    optimizer = poetx.POETXMuon(model, config=config, turn_every=4, momentum_dtype="int8")
    rotations = skews(model)
    for _ in range(8):
        for one, other in zip(rotations[::2], rotations[1::2], strict=True):
            both = torch.zeros(len(one) + len(other), one.shape[1])
            one.grad, other.grad = both.split([len(one), len(other)])
        optimizer.step()
    assert {"momentum_kernel", "whole_blocks_kernel"} <= {name for name, _ in compiled.variants}
    assert compiled.several() == {}
