"""Triton kernels of the ops, and when one runs.

Which kernel an op has, and for which arguments, is said where the op is defined. Importing this
package imports no Triton: `Kernel.applies` looks, and only `Kernel.run` loads a kernel's module.
Wherever `applies` is false the reference runs; nothing is tried and caught.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poetx_compile.ops.kernels.common import rehearsing

# ROCm devices have this type too; `input_precision` knows the difference.
_DEVICE_TYPE = "cuda"


@functools.cache
def _triton_runs_on(index: int) -> bool:
    """Whether Triton is installed and compiles bf16 products for device `index`."""
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


def run_on(device: torch.device) -> bool:
    """Whether kernels run on tensors of this device; in a `rehearsal` on those of meta."""
    if device.type == "meta":
        return rehearsing()
    if device.type != _DEVICE_TYPE:
        return False
    return _triton_runs_on(torch.cuda.current_device() if device.index is None else device.index)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, this device is the current one: kernels ask it, and Triton launches on it.

    In a `rehearsal` that is the one that meta stands for.
    """
    if device.type == "meta" or not torch.cuda.is_available():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@dataclass(frozen=True)
class Kernel:
    """The Triton kernel of an op.

    Attributes:
        host: the function that launches it, ``"module.function"`` in this package. It takes the
            arguments of the op.
        takes: whether it takes these arguments, all of the op's in order. The tensors, real or
            fake, are on one device where Triton runs; none is known to be empty.
    """

    host: str
    takes: Callable[..., bool]

    def applies(self, *args: Any) -> bool:
        """Whether the kernel runs for these arguments of the op (real or fake tensors).

        A symbolic number of tokens counts as not empty: the op looks again when it runs.
        """
        tensors = [a for a in args if isinstance(a, Tensor)]
        device = tensors[0].device
        if not run_on(device) or any(t.device != device for t in tensors):
            return False
        if any(isinstance(size, int) and size == 0 for t in tensors for size in t.shape):
            return False
        with current(device):
            return self.takes(*args)

    def run(self, *args: Any) -> Tensor:
        """Launch the kernel; only where it `applies`.

        Returns:
            What the op returns, a contiguous tensor of its own.
        """
        tensors = [a for a in args if isinstance(a, Tensor)]
        with current(tensors[0].device):
            return self.load()(*args)

    def load(self) -> Callable[..., Tensor]:
        """The function `host`; loads Triton."""
        module, function = self.host.split(".")
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)
