"""Permutations: a function of (seed, draw, group, size, kind), alike in every process."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from poetx_compile.layers.permutation import (
    CHUNK,
    Permutation,
    chunk_size,
    draw_permutation,
    redraw_all,
)
from poetx_compile.ops.permute import pair_index

KEY = {"seed": 3, "draw": 2, "group": 5, "kind": "random"}


@pytest.mark.parametrize("kind", ["random", "chunked"])
@pytest.mark.parametrize("size", [1, 2, 7, 16, 31, 32, 40, 129, 4096])
def test_a_pair_is_a_permutation_and_its_inverse(kind: str, size: int) -> None:
    pair = draw_permutation(size, **(KEY | {"kind": kind}))
    chunks = size // chunk_size(size, kind)
    assert pair.dtype == torch.int64
    assert pair.shape == (2, chunks)
    assert pair[0].sort().values.tolist() == list(range(chunks))
    assert pair[0][pair[1]].tolist() == list(range(chunks))


@pytest.mark.parametrize(
    ("size", "chunk"),
    [(1, 1), (2, 1), (4, 2), (16, 8), (31, 1), (64, 32), (40, 8), (46, 2), (192, 64), (14336, 64)],
)
def test_chunks_divide_the_size_into_two_at_least(size: int, chunk: int) -> None:
    assert chunk_size(size, "chunked") == chunk
    assert chunk_size(size, "random") == 1


@pytest.mark.parametrize("kind", ["random", "chunked"])
def test_draw_zero_is_the_identity(kind: str) -> None:
    pair = draw_permutation(56, **(KEY | {"draw": 0, "kind": kind}))
    for row in (0, 1):
        assert pair_index(pair, row, 56).tolist() == list(range(56))


@pytest.mark.parametrize("change", [{"seed": 4}, {"draw": 3}, {"group": 6}])
def test_every_part_of_the_key_counts(change: dict[str, int]) -> None:
    pair = draw_permutation(50, **KEY)
    assert torch.equal(pair, draw_permutation(50, **KEY))
    assert not torch.equal(pair, draw_permutation(50, **(KEY | change)))


def test_chunks_stay_together() -> None:
    pair = draw_permutation(4 * CHUNK, **(KEY | {"kind": "chunked"}))
    permutation, inverse = (pair_index(pair, row, 4 * CHUNK) for row in (0, 1))
    chunks = permutation.view(-1, CHUNK)
    assert (chunks[:, 0] % CHUNK == 0).all()
    assert torch.equal(chunks, chunks[:, :1] + torch.arange(CHUNK))
    assert not torch.equal(permutation, torch.arange(4 * CHUNK))
    assert torch.equal(permutation[inverse], torch.arange(4 * CHUNK))


@pytest.mark.parametrize("kind", ["random", "chunked"])
@pytest.mark.parametrize(
    ("size", "b"), [(11, 8), (3 * CHUNK + 8, 16), (CHUNK, 9), (2 * CHUNK, 31), (6, 5), (40, 25)]
)
def test_no_coordinate_is_left_over_by_the_blocks_for_ever(kind: str, size: int, b: int) -> None:
    stuck = set(range(size))
    for draw in range(1, 40):
        pair = draw_permutation(size, **(KEY | {"draw": draw, "kind": kind}))
        stuck &= set(pair_index(pair, 0, size)[size // b * b :].tolist())
    assert not stuck


@pytest.mark.parametrize(("block", "chunk"), [(256, 64), (255, 32), (128, 32), (8, 2), (7, 1)])
def test_a_block_holds_four_chunks_at_least(block: int, chunk: int) -> None:
    assert chunk_size(4096, "chunked", block) == chunk
    pair = draw_permutation(4096, **(KEY | {"kind": "chunked", "block": block}))
    assert pair.shape == (2, 4096 // chunk)


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
        "from poetx_compile.layers.permutation import draw_permutation\n"
        f"print(draw_permutation(50, **{KEY!r}).tolist())\n"
        f"print(draw_permutation(50, **{KEY | {'kind': 'chunked'}!r}).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [draw_permutation(50, **(KEY | {"kind": kind})) for kind in ("random", "chunked")]
    assert done.stdout.splitlines() == [str(pair.tolist()) for pair in here]


def _module(**change) -> Permutation:
    return Permutation(56, **(KEY | change))


@pytest.mark.parametrize("kind", ["random", "chunked"])
def test_redraw_writes_in_place(kind: str) -> None:
    module = _module(kind=kind)
    pair, address = module.pair, module.pair.data_ptr()
    ahead = module.peek(7, 9)
    module.redraw(7, 9)
    assert module.pair is pair
    assert pair.data_ptr() == address
    assert torch.equal(pair, ahead)
    assert (module.seed, module.draw) == (7, 9)


def test_all_are_redrawn_together_and_say_where_coordinates_come_from() -> None:
    others = [
        Permutation(48, **(KEY | {"group": 3, "kind": kind})) for kind in ("random", "chunked")
    ]
    modules = [_module(), _module(kind="chunked"), _module(kind="chunked", group=5), *others]
    before = [(m.pair.data_ptr(), m.draw, pair_index(m.pair, 0, m.size).clone()) for m in modules]
    indices = redraw_all([*modules, modules[0]])  # a shared one is redrawn once
    for module, (address, draw, old) in zip(modules, before, strict=True):
        assert (module.pair.data_ptr(), module.draw) == (address, draw + 1)
        assert torch.equal(module.pair, module.peek(module.seed, draw + 1))
        x = torch.randn(module.size)
        assert torch.equal(x[old][indices[module]], x[pair_index(module.pair, 0, module.size)])


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
