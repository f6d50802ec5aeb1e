"""The correctness gate: no time is taken of what gives wrong results."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tolerances import relative_error, tolerance
from poetx_compile.layers.prepared import prepared_linears

ANGLE = 0.18
"""About the largest angle of the rotations that are checked and timed, below the guard's 0.25."""


class GateError(AssertionError):
    """What was going to be timed computes something else than its reference."""


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> float:
    """``‖actual − expected‖ / ‖expected‖``; `GateError` where it exceeds the table for `dtype`."""
    if actual.shape != expected.shape:
        raise GateError(f"{what}: shape {list(actual.shape)}, not {list(expected.shape)}")
    error = relative_error(actual, expected)
    if not error <= tolerance(dtype):  # NaN is no success
        raise GateError(f"{what}: relative error {error:.3g} exceeds {tolerance(dtype):.3g}")
    return error


@torch.no_grad()
def random_skew_(skew: Tensor, block_size: int, generator: torch.Generator) -> None:
    """Fill packed skew blocks with normal entries whose spectral norm is about `ANGLE`."""
    values = torch.randn(skew.shape, generator=generator, device=skew.device)
    skew.copy_(ANGLE / (2 * block_size**0.5) * values)


@contextlib.contextmanager
def turned(model: nn.Module) -> Iterator[None]:
    """Fill the rotations that `model` stores with `random_skew_`; at the end they are identities.

    After a few steps at a small rate their entries are below half a unit in the last place of
    bf16: what a formulation shows of them depends on where it rounds, and says nothing about it.
    Their values are given up, as a copy would be in the peak. A merged form stores none: its
    weights have turned.
    """
    stored = [
        side
        for _, _, equivalence in prepared_linears(model)
        if not equivalence.merged
        for side in equivalence.sides
    ]
    for number, side in enumerate(stored):
        generator = torch.Generator(side.skew.device).manual_seed(number)
        random_skew_(side.skew, side.block, generator)
    try:
        yield
    finally:
        with torch.no_grad():
            for side in stored:
                side.skew.zero_()


def check_layer(
    module: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, dy: Tensor
) -> dict[str, float]:
    """Compare output and all gradients of `module` with the weight-centric layer in float64.

    In float64 eager ops run their plain references, no kernel. Gradients are ``None`` afterwards.

    Args:
        module: a compiled form of `layer`, which computes in the dtype of `x`.
        layer: the prepared layer, not compiled.
        x: [tokens, in_features], requires its gradient.
        dy: [tokens, out_features].

    Returns:
        The errors: ``output_error``, and the largest of all gradients as ``gradient_error``.

    Raises:
        GateError: an error beyond the tolerance of x's dtype, or a gradient that is missing.
    """
    actual = _results(module, layer, x, dy)
    wide = x.detach().double().requires_grad_()
    reference = copy.deepcopy(layer).double()
    expected = _results(reference, reference, wide, dy.double())
    errors: dict[str, float] = {}
    for name, value in expected.items():
        given = actual[name]
        if value is None:
            raise GateError(f"{name}: the reference has no gradient")
        if given is None:
            raise GateError(f"{name} is missing")
        errors[name] = check(given, value, x.dtype, name)
    output = errors.pop("output")
    return {"output_error": output, "gradient_error": max(errors.values())}


def check_weight(
    module: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor, dy: Tensor
) -> dict[str, float]:
    """Compare output and dX of `module` with ``x Wᵀ`` in float64; arguments as `check_layer`.

    Args:
        weight: [out_features, in_features], the weight that `module` applies.
    """
    x.grad = None
    y = module(x)
    y.backward(dy)
    assert x.grad is not None
    wide = weight.detach().double()
    errors = {
        "output_error": check(y, x.detach().double() @ wide.T, x.dtype, "output"),
        "gradient_error": check(x.grad, dy.double() @ wide, x.dtype, "gradient of x"),
    }
    x.grad = None
    return errors


def _results(
    module: Callable[[Tensor], Tensor], owner: nn.Module, x: Tensor, dy: Tensor
) -> dict[str, Tensor | None]:
    """Output, dX and the gradients of the trained parameters, by name."""
    leaves: dict[str, Any] = {"gradient of x": x}
    leaves |= {f"gradient of {n}": p for n, p in owner.named_parameters() if p.requires_grad}
    for leaf in leaves.values():
        leaf.grad = None
    y = module(x)
    y.backward(dy)
    results = {"output": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return results
