"""`requires_grad` that changes after compiling, seen by Dynamo's guards or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import poetx_compile as poetx
from poetx_compile.errors import RewriteError
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from tests.helpers.models import MLP
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close

PARTS = {"model": "", "rotations": "skew", "biases": "bias", "stored weights": "original"}
MISSED = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def prepared(cls: type[nn.Module] = MLP, formulation: str = "auto") -> nn.Module:
    torch.manual_seed(0)
    model = cls()
    poetx.prepare(model, poetx.POETXConfig(block_size=4, formulation=formulation))
    return turn(model)


def set_flags(model: nn.Module, part: str, flag: bool) -> None:
    for name, parameter in model.named_parameters():
        if PARTS[part] in name:
            parameter.requires_grad_(flag)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="poetx", options={"stage": "aot_eager", **options})


def check_gradients(model: nn.Module, run: Any, x: Tensor) -> None:
    """Those of the eager model, and ``None`` where it has none."""

    def gradients(f: Any) -> dict[str, Tensor | None]:
        model.zero_grad()
        x.grad = None
        f(x).square().sum().backward()
        return {name: p.grad for name, p in [("x", x), *model.named_parameters()]}

    expected, actual = gradients(model), gradients(run)
    for name, gradient in expected.items():
        found = actual[name]
        assert (found is None) == (gradient is None), name
        if found is not None and gradient is not None:
            assert_close(found, gradient, what=name)


def inputs() -> Tensor:
    return torch.randn(5, 12, requires_grad=True)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_unfrozen_after_compiling_trains_and_stored_weights_do_not(part: str) -> None:
    """Guards of torch 2.11 look at no parameter while its module has the same ones."""
    model, x = prepared(), inputs()
    set_flags(model, part, False)
    run = compiled(model)
    run(x)
    set_flags(model, part, True)
    check_gradients(model, run, x)


@pytest.mark.parametrize(
    ("first", "cls", "formulation", "stage"),
    [
        (False, MLP, "input_centric", "eager"),
        (False, MLP, "folded", "eager"),
        (False, Checkpointed, "folded", "eager"),
        (False, MLP, "input_centric", "aot_eager"),
        (True, MLP, "folded", "aot_eager"),
    ],
)
def test_a_stored_weight_takes_no_gradient_though_no_guard_sees_its_flag(
    first: bool, cls: type[nn.Module], formulation: str, stage: str
) -> None:
    model, x = prepared(cls, formulation), inputs()
    set_flags(model, "stored weights", first)
    run = compiled(model, stage=stage, **MISSED)
    run(x)
    set_flags(model, "stored weights", not first)
    check_gradients(model, run, x)
    assert all(stored_weight(m).grad is None for _, m, _ in prepared_linears(model))


@pytest.mark.parametrize("part", ["rotations", "biases"])
def test_what_no_guard_sees_unfrozen_raises(part: str) -> None:
    model, x = prepared(), inputs()
    set_flags(model, part, False)
    run = compiled(model, **MISSED)
    run(x)
    set_flags(model, part, True)
    with pytest.raises(RewriteError, match=r"torch\._dynamo\.reset\(\)"):
        run(x)
    with torch.no_grad():
        run(x)
    torch._dynamo.reset()
    check_gradients(model, run, x)


def test_what_no_guard_sees_frozen_gets_no_gradient() -> None:
    model, x = prepared(), inputs()
    run = compiled(model, **MISSED)
    run(x)
    for part in ("rotations", "biases"):
        set_flags(model, part, False)
        check_gradients(model, run, x)


def test_folds_are_kept_though_a_stored_weight_is_unfrozen() -> None:
    model, x = prepared(formulation="folded"), inputs()
    run = compiled(model, stage="eager", keep_folded="step", **MISSED)
    run(x)
    set_flags(model, "stored weights", True)
    with torch.profiler.profile(acc_events=True) as profile:
        run(x).sum().backward()
    names = [event.key for event in profile.key_averages()]
    assert "poetx::folded_linear" in names
    assert "poetx::fold_weight" not in names
    check_gradients(model, run, x)
