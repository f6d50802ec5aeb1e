"""Kernels compiled for a GPU that is not there, in place of their launches."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from poetx_compile.ops import kernels


class Target(NamedTuple):
    """What a kernel is compiled for, and what its host functions ask the device."""

    capability: int
    shared_memory: int
    """Bytes that one program may use."""


A100, ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = (
    Target(capability, kilobytes * 1024)
    for capability, kilobytes in ((80, 163), (89, 99), (90, 227), (100, 227), (120, 99))
)
TARGETS = A100, ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compile_for(
    patch: pytest.MonkeyPatch, target: Target = HOPPER, only: str | None = None
) -> list[Any]:
    """From here on every launch is compiled for the target instead; gives the list of results.

    Args:
        patch: what undoes it.
        target: default compute capability 9.0.
        only: the kernel of which alone it is.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    results: list[Any] = []

    def compile_launch(
        kernel: Any, programs: int, *args: Any, num_warps: int, num_stages: int, **constants: Any
    ) -> None:
        assert programs > 0
        if only not in (None, kernel.__name__):
            return
        limits = {"maxnreg": constants.pop("maxnreg")} if "maxnreg" in constants else {}
        options = {"num_warps": num_warps, "num_stages": num_stages, **limits}
        source = source_of(kernel, args, constants)
        results.append(triton.compile(source, GPUTarget("cuda", target.capability, 32), options))

    answers = {
        "launch": compile_launch,
        "shared_memory": lambda: target.shared_memory,
        "compute_capability": lambda: target.capability,
    }
    # All of them first: what is imported later would keep a patched name for good.
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    for module in [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]:
        for name in answers.keys() & vars(module).keys():
            patch.setattr(module, name, answers[name])
    return results


def source_of(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """What Triton's launcher compiles for these arguments, none of which is one."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = dict.fromkeys(constants, "constexpr")
    aligned: dict[tuple[int], Any] = {}
    for position, (param, value) in enumerate(zip(kernel.params, args, strict=False)):
        is_tensor = isinstance(value, torch.Tensor)
        scalar = "fp32" if isinstance(value, float) else "i32"
        signature[param.name] = TYPES[value.dtype] if is_tensor else scalar
        of_sixteen = is_tensor or (scalar == "i32" and value % 16 == 0)
        if of_sixteen and not (param.do_not_specialize or param.do_not_specialize_on_alignment):
            aligned[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=aligned)


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of stack a thread uses: registers that did not fit."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", report)[0])
