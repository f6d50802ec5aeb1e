"""The precision rules that the ops share."""

from __future__ import annotations

import pytest
import torch

from poetx_compile.ops.precision import ieee_fp32, rotation_dtype, without_autocast


@pytest.mark.parametrize(
    ("data", "rotation"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_rotations_are_fp32_at_least(data, rotation) -> None:
    assert rotation_dtype(data) == rotation


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_ieee_products_and_the_setting_restored(precision: str) -> None:
    x = torch.randn(64, 64)
    exact = x @ x
    torch.set_float32_matmul_precision(precision)
    with ieee_fp32():
        assert torch.equal(x @ x, exact)
    assert torch.get_float32_matmul_precision() == precision


def test_ieee_beside_the_settings_of_one_backend() -> None:
    # torch.get_float32_matmul_precision() raises in this state.
    backend = torch.backends.cuda.matmul
    previous, backend.fp32_precision = backend.fp32_precision, "tf32"
    try:
        with ieee_fp32():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = previous


def test_ieee_restores_the_setting_after_an_exception() -> None:
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(KeyError), ieee_fp32():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "medium"


def test_without_autocast_switches_off_the_device_of_its_arguments() -> None:
    @without_autocast
    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
        assert product(x.to("meta")).device.type == "meta"
