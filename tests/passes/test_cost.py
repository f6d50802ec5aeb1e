"""The cost model against numbers worked out by hand."""

from __future__ import annotations

import pytest
import sympy

from poetx_compile.passes import cost
from poetx_compile.passes.cost import TOKENS, Machine

MACHINE = Machine(flops=1e12, bytes=1e9, launch=1e-6)


def test_rotating_is_two_passes_over_the_activation() -> None:
    seconds = cost.rotate_seconds(4096, 256, 2, MACHINE)
    # 16 kB a token and pass at 1 GB/s, above 2 MFLOP at 1 TFLOP/s; two launches.
    assert float(seconds.subs(TOKENS, 1)) == pytest.approx(2 * 4 * 4096 / 1e9 + 2e-6)
    bound_by_flops = cost.rotate_seconds(4096, 256, 2, Machine(1e9, 1e12, 1e-6))
    assert float(bound_by_flops.subs(TOKENS, 3)) == pytest.approx(
        2 * 3 * 2 * 256 * 4096 / 1e9 + 2e-6
    )


def test_folding_is_one_pass_over_the_weight_for_each_fold() -> None:
    once = float(cost.fold_seconds((64, 32), 8, 2, MACHINE, 1))
    assert once == pytest.approx(2 * 64 * 32 * 2 / 1e9 + 1e-6)
    assert float(cost.fold_seconds((64, 32), 8, 2, MACHINE, 2)) == pytest.approx(2 * once)


def test_break_even_is_where_the_costs_meet() -> None:
    rotate = cost.rotate_seconds(4096, 256, 2, Machine())
    fold = cost.fold_seconds((14336, 4096), 256, 2, Machine(), 1)
    tokens = cost.break_even(rotate, fold)
    assert rotate.subs(TOKENS, tokens) <= fold < rotate.subs(TOKENS, tokens + 1)
    assert cost.break_even(rotate, sympy.Float(0)) == 0


def test_the_wide_side_folds_before_the_narrow_one() -> None:
    def tokens(width: int) -> int:
        rotate = cost.rotate_seconds(width, 256, 2, Machine())
        return cost.break_even(rotate, cost.fold_seconds((14336, 4096), 256, 2, Machine(), 1))

    assert tokens(14336) < tokens(4096)


@pytest.mark.parametrize("rates", [{"flops": 0}, {"bytes": -1.0}, {"launch": True}])
def test_rates_are_positive_numbers(rates) -> None:
    with pytest.raises(ValueError, match=next(iter(rates))):
        Machine(**rates)
