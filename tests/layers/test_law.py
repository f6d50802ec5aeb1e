"""What a report says of the share of trained parameters."""

from __future__ import annotations

import pytest
import torch

import poetx_compile as poetx
from poetx_compile.layers.law import LAW, TOLD_FROM, expected, notice


def test_the_loss_is_read_from_the_law_and_between_its_points() -> None:
    for share, loss in LAW:
        assert expected(share) == pytest.approx(loss)
    (a, at_a), (b, at_b), *_ = LAW
    assert expected((a * b) ** 0.5) == pytest.approx((at_a + at_b) / 2)
    assert (expected(1e-9), expected(2.0)) == (LAW[0][1], LAW[-1][1])
    assert list(LAW) == sorted(LAW)


def test_only_what_is_known_to_cost_is_told() -> None:
    cheap = next(share for share, loss in LAW if loss < TOLD_FROM)
    assert notice(int(1e6 * cheap), 10**6) is notice(0, 10**6) is notice(0, 0) is None
    assert f"expect {LAW[0][1]:.0f} % more" in str(notice(int(1e6 * LAW[0][0]), 10**6))
    assert "expect at least" in str(notice(1, 10**6))


def test_the_report_of_full_blocks_says_that_they_are_more_than_their_weights() -> None:
    report = poetx.prepare(torch.nn.Linear(8, 40, bias=False), poetx.POETXConfig(block_size=40))
    assert "rotations are 252 % of their weights" in str(report)  # 28 + 780 of 320
