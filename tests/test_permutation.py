"""Permutations: a function of (seed, draw, group, size, kind), alike in every process."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from poetx_compile.permutation import CHUNK, Permutation, draw_permutation

KEY = {"seed": 3, "draw": 2, "group": 5, "kind": "random"}


@pytest.mark.parametrize("kind", ["random", "chunked"])
@pytest.mark.parametrize("size", [1, 2, 7, 16, 31, 32, 40, 129])
def test_a_pair_is_a_permutation_and_its_inverse(kind: str, size: int) -> None:
    pair = draw_permutation(size, **(KEY | {"kind": kind}))
    assert pair.dtype == torch.int64
    assert pair.shape == (2, size)
    assert pair[0].sort().values.tolist() == list(range(size))
    assert pair[0][pair[1]].tolist() == list(range(size))


def test_draw_zero_is_the_identity() -> None:
    pair = draw_permutation(50, **(KEY | {"draw": 0}))
    assert pair.tolist() == [list(range(50))] * 2


@pytest.mark.parametrize("change", [{"seed": 4}, {"draw": 3}, {"group": 6}])
def test_every_part_of_the_key_counts(change: dict[str, int]) -> None:
    pair = draw_permutation(50, **KEY)
    assert torch.equal(pair, draw_permutation(50, **KEY))
    assert not torch.equal(pair, draw_permutation(50, **(KEY | change)))


def test_chunks_stay_together() -> None:
    permutation = draw_permutation(4 * CHUNK, **(KEY | {"kind": "chunked"}))[0]
    chunks = permutation.view(-1, CHUNK)
    assert (chunks[:, 0] % CHUNK == 0).all()
    assert torch.equal(chunks, chunks[:, :1] + torch.arange(CHUNK))
    assert not torch.equal(permutation, torch.arange(4 * CHUNK))


@pytest.mark.parametrize("kind", ["random", "chunked"])
@pytest.mark.parametrize("size", [11, 3 * CHUNK + 8])
def test_coordinates_that_no_block_covers_change_with_the_draw(kind: str, size: int) -> None:
    # The last 8 or 3 places are left over by blocks; in time every coordinate must leave them.
    left_over = 3 if size == 11 else 8
    stuck = set(range(size))
    for draw in range(1, 40):
        permutation = draw_permutation(size, **(KEY | {"draw": draw, "kind": kind}))[0]
        stuck &= set(permutation[-left_over:].tolist())
    assert not stuck


def test_the_global_generator_is_neither_read_nor_advanced() -> None:
    before = torch.get_rng_state()
    first = draw_permutation(50, **KEY)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(draw_permutation(50, **KEY), first)


def test_the_default_device_is_not_followed() -> None:
    expected = draw_permutation(50, **KEY)
    with torch.device("meta"):
        assert torch.equal(draw_permutation(50, **KEY), expected)


def test_another_process_draws_the_same() -> None:
    code = (
        "from poetx_compile.permutation import draw_permutation\n"
        f"print(draw_permutation(50, **{KEY!r}).tolist())\n"
        f"print(draw_permutation(50, **{KEY | {'kind': 'chunked'}!r}).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [draw_permutation(50, **(KEY | {"kind": kind})) for kind in ("random", "chunked")]
    assert done.stdout.splitlines() == [str(pair.tolist()) for pair in here]


def _module(**change) -> Permutation:
    return Permutation(50, **(KEY | change))


def test_redraw_writes_in_place() -> None:
    module = _module()
    pair, address = module.pair, module.pair.data_ptr()
    ahead = module.peek(7, 9)
    module.redraw(7, 9)
    assert module.pair is pair
    assert pair.data_ptr() == address
    assert torch.equal(pair, ahead)
    assert (module.seed, module.draw) == (7, 9)


def test_it_is_not_saved_because_it_follows_from_its_key() -> None:
    assert _module().state_dict() == {}
    assert torch.equal(_module().pair, _module().pair)


def test_casts_leave_the_indices_alone() -> None:
    module = _module()
    expected = module.pair.clone()
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.type(torch.float32)):
        cast(module)
        assert module.pair.dtype == torch.int64
        assert torch.equal(module.pair, expected)


def test_a_module_without_storage_is_drawn_again() -> None:
    module = _module()
    expected = module.pair.clone()
    module.to("meta").to_empty(device="cpu")
    assert torch.equal(module.pair, expected)


def test_deepcopy_keeps_a_shared_one_shared() -> None:
    shared = _module()
    first, second = copy.deepcopy(nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared)]))
    assert first[0] is second[0]
    assert first[0] is not shared
