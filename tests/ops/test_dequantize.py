"""int8 weights: what rounding leaves of them, which bits stay, what is refused."""

from __future__ import annotations

import sys

import pytest
import torch

from poetx_compile import ops
from poetx_compile.ops.dequantize import GROUP, LARGEST, groups_of, norm, quantize
from poetx_compile.ops.random import matrix_bits
from tests.helpers.tolerances import assert_close

CPU = torch.device("cpu")


def normal(rows: int = 64, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("columns", [256, 100, 3])
def test_an_entry_is_off_by_half_a_step_at_most(columns: int, dtype: torch.dtype) -> None:
    values = 0.02 * normal(columns=columns).to(dtype)
    values[3] = 0
    weight, scale = quantize(values, dtype)
    assert (weight.dtype, weight.shape) == (torch.int8, values.shape)
    assert (scale.dtype, list(scale.shape)) == (dtype, [64, groups_of(columns)])
    exact = ops.dequantize(weight, scale, torch.float64)
    steps = scale.double().repeat_interleave(GROUP, 1)[:, :columns]
    assert ((exact - values.double()).abs() <= 0.5001 * steps).all()
    assert not exact[3].any()
    largest = weight.abs().amax(1)
    assert LARGEST - 3 <= int(largest[largest > 0].min()) <= int(largest.max()) <= LARGEST
    assert torch.equal(ops.dequantize(weight, scale, dtype), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_again_keeps_the_bits_of_groups_that_did_not_change(dtype: torch.dtype) -> None:
    weight, scale = quantize(normal(columns=200).to(dtype), dtype)
    weight //= 2  # no group is at its largest: a new scale would be another one
    values = ops.dequantize(weight, scale, torch.float32)
    again, steps, step = weight.clone(), scale.clone(), torch.tensor(2)
    ops.requantize_(again, steps, values, step, 1, 3)
    assert torch.equal(again, weight)
    assert torch.equal(steps, scale)
    values[5, 70] += 0.1
    ops.requantize_(again, steps, values, step, 1, 3)
    changed = (again != weight).nonzero()
    assert set(changed[:, 0].tolist()) == {5}
    assert set((changed[:, 1] // GROUP).tolist()) == {1}
    assert (steps != scale).nonzero().tolist() == [[5, 1]]


def test_scales_of_nan_match_no_values(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[quantize.__module__], "ELEMENTS", 450)  # two rows at once
    values, step = normal(5, 200), torch.tensor(2)
    weight, scale = torch.zeros(5, 200, dtype=torch.int8), torch.full((5, 4), torch.nan)
    values[1] = 0
    ops.requantize_(weight, scale, values, step, 1, 3)
    bits = matrix_bits(5, 200, seed=1, step=2, layer=3, device=CPU)
    monkeypatch.undo()
    expected = quantize(values, torch.float32, bits)
    assert_close(norm(*expected), values.norm(), torch.bfloat16)
    assert torch.equal(weight, expected[0])
    assert torch.equal(scale, expected[1])


def test_rounding_is_unbiased() -> None:
    values, rounds = normal(4, 64), 400
    total = torch.zeros(4, 64, dtype=torch.float64)
    for step in range(rounds):
        bits = matrix_bits(4, 64, seed=0, step=step, layer=0, device=CPU)
        total += ops.dequantize(*quantize(values, torch.float32, bits), torch.float64)
    _, scale = quantize(values, torch.float32)
    off = (total / rounds - values) / scale.double()
    assert off.abs().max() < 4 * 0.5 / rounds**0.5  # four deviations of the worst entry's mean
    assert off.mean().abs() < 4 * 0.5 / (rounds * 256) ** 0.5


def test_rows_of_random_bits_may_be_drawn_in_parts() -> None:
    whole = matrix_bits(7, 20, seed=3, step=torch.tensor(5), layer=1, device=CPU)
    assert torch.equal(whole, matrix_bits(7, 20, seed=3, step=5, layer=1, device=CPU))
    part = matrix_bits(3, 20, seed=3, step=5, layer=1, device=CPU, first_row=4)
    assert torch.equal(part, whole[4:])


@pytest.mark.parametrize(
    ("weight", "scale", "dtype", "message"),
    [
        (torch.zeros(2, 70), torch.ones(2, 2), torch.float32, "must be an int8 matrix"),
        (torch.zeros(2, 70).char(), torch.ones(2, 2).int(), torch.float32, "these floating point"),
        (torch.zeros(2, 70).char(), torch.ones(2, 1), torch.float32, r"must be \[2, 2\]"),
        (torch.zeros(2, 70).char(), torch.ones(2, 2), torch.int32, "dtype must be floating point"),
    ],
)
def test_argument_errors(weight, scale, dtype, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.dequantize(weight, scale, dtype)


@pytest.mark.parametrize(
    ("values", "step", "message"),
    [
        (torch.zeros(2, 71), torch.tensor(1), r"values must be fp32 or fp64 \[2, 70\]"),
        (torch.zeros(2, 70).half(), torch.tensor(1), "values must be fp32 or fp64"),
        (torch.zeros(2, 70), torch.ones(1), "step must be an int64 scalar"),
    ],
)
def test_argument_errors_of_rounding_again(values, step, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.requantize_(torch.zeros(2, 70).char(), torch.ones(2, 2), values, step, 0, 0)
