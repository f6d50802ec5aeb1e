"""The floors of time, counted by hand."""

from __future__ import annotations

import pytest

from benchmarks import (
    floors,
)

CEILINGS = floors.Ceilings(bytes_per_s=1e12, flops_per_s=1e15, fp32_flops_per_s=1e14)


def test_floors_of_a_linear_by_hand() -> None:
    sizes = floors.Layer.of(2048, 4096, 14336, 256, 2)
    costs = floors.linear(sizes)
    assert floors.total_flops(costs) == 6 * 2048 * 4096 * 14336
    # One GEMM: 2.405e11 FLOPs, 1.929e8 bytes; at 1e15 FLOP/s and 1e12 B/s compute takes longer.
    assert costs[0].bytes == 2 * (2048 * 4096 + 2048 * 14336 + 4096 * 14336) == 192937984
    assert floors.total_ms(costs, CEILINGS) == pytest.approx(3 * 0.240518168576)
    assert floors.total_flops(floors.linear(sizes, trained=False)) == 4 * 2048 * 4096 * 14336


@pytest.mark.parametrize("fold_in", [False, True])
@pytest.mark.parametrize("fold_out", [False, True])
def test_flops_of_poetx_by_hand(fold_in: bool, fold_out: bool) -> None:
    t, m, n, b = 100, 32, 48, 16
    sizes = floors.Layer.of(t, m, n, b, 2)
    # Order 3: two products forward and four backward, for 2 + 3 blocks. The gradient of a folded
    # rotation takes the forward's again, and one with the inverse.
    side_in = 2 * b * m * n + 2 * t * b * m if fold_in else 6 * t * b * m
    side_out = 2 * b * m * n + 2 * t * b * n if fold_out else 6 * t * b * n
    products = 2 * (9 if fold_in else 6) + 3 * (9 if fold_out else 6)
    expected = 4 * t * m * n + side_in + side_out + products * 2 * b**3
    fast = floors.poetx(sizes, "fast", fold_in=fold_in, fold_out=fold_out)
    assert floors.total_flops(fast) == expected
    again = 2 * b * m * n if fold_in else 2 * t * b * m
    again += 2 * b * m * n if fold_out else 2 * t * m * n
    mem = floors.poetx(sizes, "mem", fold_in=fold_in, fold_out=fold_out)
    assert floors.total_flops(mem) == expected + again


def test_floors_of_sides_that_the_block_size_does_not_divide() -> None:
    # 35 = 2·16 + 3: the last three coordinates are not rotated; 7 is one block.
    wide, narrow = floors.Side(35, 16), floors.Side(7, 16)
    assert (wide.blocks, wide.b, wide.rotated) == (2, 16, 32)
    assert (narrow.blocks, narrow.b, narrow.rotated) == (1, 7, 7)
    costs = floors.poetx(floors.Layer(10, wide, narrow, 4), "fast", fold_in=False, fold_out=True)
    rotation = next(cost for cost in costs if cost.name == "rotation")
    assert rotation.flops == 2 * 10 * 16 * 32
    assert rotation.bytes == 2 * 10 * 35 * 4 + 4 * 2 * 16 * 16


def test_floors_of_rotations_permutations_and_merges_by_hand() -> None:
    side = floors.Side(512, 256)
    forward, backward = floors.cayley(side, 3)
    assert (forward.flops, backward.flops) == (2 * 2 * 2 * 256**3, 2 * 4 * 2 * 256**3)
    assert forward.bytes == 4 * 2 * (256 * 255 // 2 + 256 * 256)
    assert forward.ms(CEILINGS) == pytest.approx(1e3 * 134217728 / 1e14)  # the precise rate
    narrow = floors.cayley(side, 3, precise=False)[0]
    assert narrow.ms(CEILINGS) == pytest.approx(1e3 * max(134217728 / 1e15, forward.bytes / 1e12))
    assert floors.tangent(side, 3).flops == 2 * (2 + 1 + 4) * 2 * 256**3
    assert floors.tangent(side, None).flops == 6 * 2 * 256**3
    with pytest.raises(ValueError, match="no floor is known for order 7: use 1 to 6"):
        floors.cayley(side, 7)
    assert floors.permute(8192, 4096, 2).ms(CEILINGS) == pytest.approx(0.134217728)
    costs = floors.merge(floors.Layer.of(0, 512, 512, 256, 2))
    assert costs[-1].flops == 4 * 256 * 512 * 512
    assert costs[-1].bytes == 2 * 2 * 512 * 512
    plain = floors.merge(floors.Layer.of(0, 512, 512, 256, 2), "plain")
    assert floors.total_flops(costs) - floors.total_flops(plain) == 4 * 2 * 4 * 256**3


def test_auto_is_the_cheapest_choice_of_sides() -> None:
    sizes = floors.Layer.of(512, 4096, 14336, 256, 2)
    auto, rotated, folded = (
        floors.total_ms(floors.poetx_of(sizes, "fast", name, CEILINGS), CEILINGS)
        for name in ("auto", "input_centric", "folded")
    )
    assert auto <= min(rotated, folded)
    many = floors.Layer.of(16384, 4096, 14336, 256, 2)
    both_folded = floors.poetx(many, "fast", fold_in=True, fold_out=True)
    assert floors.poetx_of(many, "fast", "auto", CEILINGS) == both_folded
