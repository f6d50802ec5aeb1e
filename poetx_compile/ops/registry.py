"""How an op of namespace ``poetx`` is defined: once, in its own module, by one call of `define`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from poetx_compile._torch import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from poetx_compile.ops.kernels import Kernel
from poetx_compile.ops.precision import ieee_fp32, without_autocast


def _always(*_: Any) -> bool:
    return True


@dataclass
class Op:
    """What there is to know of an op beside its schema, its fake and its gradient.

    Attributes:
        reference: its definition in plain torch ops.
        kernel: what runs in place of the reference where it applies, if anything.
        expands: whether Inductor compiles the nodes of the reference, by the op's arguments;
            elsewhere the op stays a call.
        ieee: whether its products of fp32 tensors are IEEE fp32 whatever the user allows.
        drawn: what its result is in a drawing of `explain` (`inspect.drawing.Drawn.kind`).
    """

    reference: Callable[..., Any]
    kernel: Kernel | None = None
    expands: Callable[..., bool] = _always
    ieee: bool = False
    drawn: str = "other"


OPS: dict[str, Op] = {}
"""All ops, by the name behind ``poetx::``."""

_library = torch.library.Library("poetx", "IMPL")


def define(
    name: str,
    reference: Callable[..., Tensor],
    *,
    check: Callable[..., None],
    fake: Callable[..., Tensor],
    kernel: Kernel | None = None,
    without_kernel: Callable[..., Tensor] | None = None,
    casts_first: bool = False,
    expands: Callable[..., bool] = _always,
    ieee: bool = False,
    drawn: str = "other",
) -> CustomOpDef:
    """Define ``poetx::<name>``; its gradient is added by `register_autograd` of the result.

    All functions take the arguments of the op in order, defaults filled in. What runs has autocast
    off.

    Args:
        name: of the op.
        reference: its definition in plain torch ops; the schema is that of its signature.
        check: raises for arguments that are not the op's.
        fake: from checked arguments to an empty result.
        kernel, expands, ieee, drawn: see `Op`.
        without_kernel: what runs where the kernel does not, if it is not the reference.
        casts_first: under autocast the first argument is cast, as the input of a linear is.
    """
    op = OPS[name] = Op(reference, kernel, expands, ieee, drawn)
    defaults = [p.default for p in inspect.signature(reference).parameters.values()]

    def checked(args: tuple[Any, ...]) -> tuple[Any, ...]:
        args = *args, *defaults[len(args) :]  # torch leaves out what equals a default
        check(*args)
        return args

    @functools.wraps(reference)
    def run(*args: Any) -> Tensor:
        args = checked(args)
        if op.kernel is not None and op.kernel.applies(*args):
            return op.kernel.run(*args)
        out = (without_kernel or op.reference)(*args).contiguous()
        given = (a.data_ptr() for a in args if isinstance(a, Tensor))
        return out.clone() if out.data_ptr() in given else out  # no op may return its input

    def run_fake(*args: Any) -> Tensor:
        return fake(*checked(args))

    body = without_autocast(ieee_fp32()(run) if ieee else run)
    made = torch.library.custom_op(f"poetx::{name}", body, mutates_args=())
    made.register_fake(run_fake)
    if casts_first:
        _library.impl(name, _casting(made, "cpu"), "AutocastCPU")
        _library.impl(name, _casting(made, "cuda"), "AutocastCUDA")
    return made


def define_in_place(
    name: str,
    reference: Callable[..., None],
    *,
    check: Callable[..., None],
    written: str | tuple[str, ...],
    kernel: Kernel | None = None,
    ieee: bool = False,
) -> CustomOpDef:
    """Define ``poetx::<name>``, which writes into its argument `written` and returns nothing.

    It takes no gradient, and stays a call in compiled code. The other arguments are as for
    `define`.
    """
    op = OPS[name] = Op(reference, kernel, lambda *_: False, ieee)
    defaults = [p.default for p in inspect.signature(reference).parameters.values()]

    @functools.wraps(reference)
    def run(*args: Any) -> None:
        args = *args, *defaults[len(args) :]
        check(*args)
        if op.kernel is not None and op.kernel.applies(*args):
            op.kernel.run(*args)
        else:
            op.reference(*args)

    names = {written} if isinstance(written, str) else set(written)
    body = without_autocast(ieee_fp32()(run) if ieee else run)
    made = torch.library.custom_op(f"poetx::{name}", body, mutates_args=names)
    made.register_fake(lambda *args: check(*args, *defaults[len(args) :]))
    return made


def _casting(op: CustomOpDef, device: str) -> Callable[..., Tensor]:
    """`op` under autocast: its first argument cast, the others as they are."""
    key = getattr(DispatchKey, f"Autocast{device.upper()}")

    def cast(x: Tensor, *args: Any) -> Tensor:
        if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = x.to(torch.get_autocast_dtype(device))
        with _ExcludeDispatchKeyGuard(DispatchKeySet(key)):
            return op(x, *args)

    return cast
