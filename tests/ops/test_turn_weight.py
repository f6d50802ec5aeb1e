"""A step of the rotations of a weight, in place, and the bits that it is rounded with."""

from __future__ import annotations

import pytest
import torch

from poetx_compile import ops
from poetx_compile.layers.permutation import draw_permutation
from poetx_compile.ops.random import matrix_bits, philox, round_stochastically
from poetx_compile.ops.turn_weight import Turn
from tests.helpers.kernel_cases import meta, needs_triton
from tests.helpers.kernel_cases import pair as of_width

DOUBLE = torch.float64


def pair(size: int, group: int, kind: str = "random") -> torch.Tensor:
    return draw_permutation(size, seed=3, draw=1, group=group, kind=kind, block=16)


def arguments(n: int, m: int, b_in: int, b_out: int, dtype=DOUBLE, kind="random") -> list:
    generator = torch.Generator().manual_seed(0)

    def step(blocks: int, b: int) -> torch.Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        packed = torch.randn(blocks, b * (b - 1) // 2, generator=generator, dtype=DOUBLE)
        return (packed * 0.01).to(wide)

    weight = torch.randn(n, m, generator=generator, dtype=DOUBLE).to(dtype)
    blocks = (m // b_in if m > 1 else 0), (n // b_out if n > 1 else 0)
    steps = step(blocks[0], b_in), step(blocks[1], b_out)
    return [weight, *steps, pair(m, 0, kind), pair(n, 1, kind), b_in, b_out, 3, 7, 1, 0]


@pytest.mark.parametrize(
    ("n", "m", "b_in", "b_out", "kind"),
    [
        (13, 21, 5, 4, "random"),
        (64, 32, 16, 16, "chunked"),
        (1, 9, 4, 1, "random"),
        (6, 1, 1, 6, "random"),
    ],
)
def test_it_is_the_effective_weight_of_the_step(n, m, b_in, b_out, kind) -> None:
    weight, *rest = arguments(n, m, b_in, b_out, kind=kind)
    step_in, step_out, perm_in, perm_out = rest[:4]
    turned = weight.clone()
    address = turned.data_ptr()
    ops.turn_weight_(turned, *rest)
    assert turned.data_ptr() == address

    def rotation(packed: torch.Tensor, b: int) -> torch.Tensor:
        rows, columns = torch.triu_indices(b, b, 1)
        q = packed.new_zeros(len(packed), b, b)
        q[:, rows, columns] = packed
        q = q - q.mT
        eye = torch.eye(b, dtype=DOUBLE)
        return torch.block_diag(*((eye + q) @ (eye + q + q @ q + q @ q @ q)))

    full = [torch.eye(m, dtype=DOUBLE), torch.eye(n, dtype=DOUBLE)]
    for eye, packed, b in zip(full, (step_in, step_out), (b_in, b_out), strict=True):
        if len(packed):
            eye[: len(packed) * b, : len(packed) * b] = rotation(packed, b)
    chunk_out, chunk_in = n // perm_out.shape[1], m // perm_in.shape[1]
    rows = (perm_out[0][:, None] * chunk_out + torch.arange(chunk_out)).flatten()
    columns = (perm_in[0][:, None] * chunk_in + torch.arange(chunk_in)).flatten()
    expected = full[1].T @ weight[rows][:, columns] @ full[0].T
    assert (turned[rows][:, columns] - expected).abs().max() < 1e-14
    # What brings a norm back is one factor of all that a side turns.
    scaled, scale = weight.clone(), torch.tensor(1.01, dtype=DOUBLE)
    ops.turn_weight_(scaled, *rest, None, scale)
    if len(step_in):
        expected[:, : len(step_in) * b_in] *= scale
    else:
        expected[: len(step_out) * b_out] *= scale
    assert (scaled[rows][:, columns] - expected).abs().max() < 1e-14


def test_its_definition() -> None:
    weight, *rest = arguments(9, 10, 5, 4, torch.float32)
    torch.library.opcheck(torch.ops.poetx.turn_weight_, (weight.clone(), *rest))
    untouched = weight.clone()
    ops.turn_weight_(untouched, *rest, torch.tensor(0))
    assert torch.equal(untouched, weight)
    ops.turn_weight_(untouched, *rest, torch.tensor(1))
    assert not torch.equal(untouched, weight)
    with pytest.raises(RuntimeError, match=r"must be torch\.float64"):
        ops.turn_weight_(weight.double(), *rest)
    with pytest.raises(RuntimeError, match="apply must be a scalar"):
        ops.turn_weight_(weight, *rest, torch.ones(2))
    with pytest.raises(RuntimeError, match="scale must be a scalar"):
        ops.turn_weight_(weight, *rest, None, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_weight_is_rounded_to_a_neighbour_by_its_counter(dtype) -> None:
    weight, *rest = arguments(12, 10, 5, 4, dtype)
    wide = weight.float()
    ops.turn_weight_(wide, *rest)

    def turned(step: int, layer: int) -> torch.Tensor:
        out = weight.clone()
        ops.turn_weight_(out, *rest[:8], step, layer)
        return out

    one = turned(1, 0)
    assert torch.equal(one, turned(1, 0))
    assert not torch.equal(one, turned(2, 0))
    assert not torch.equal(one, turned(1, 1))
    gap = torch.finfo(dtype).eps * wide.abs().clamp_min(torch.finfo(dtype).tiny)
    assert ((one.float() - wide).abs() <= gap).all()
    zero = [torch.zeros_like(t) for t in rest[:2]]
    still = weight.clone()
    ops.turn_weight_(still, *zero, *rest[2:])
    assert torch.equal(still, weight)


@needs_triton
@pytest.mark.parametrize("side", ["both", "one"])
def test_layers_of_one_shape_share_their_launches(side: str, monkeypatch) -> None:
    from poetx_compile.ops.kernels import cayley_low_precision, turn_layers, turn_panels

    launched: list[str] = []

    def note(kernel, *_, **__) -> None:
        launched.append(kernel.fn.__name__)

    for module in (cayley_low_precision, turn_layers, turn_panels):
        monkeypatch.setattr(module, "launch", note)

    def layer(number: int) -> Turn:
        turns = side == "both", True
        one = meta(4, 256 * 255 // 2)
        steps = [one if turns[(number + i) % 2] else None for i in range(2)]
        weight = meta(1024, 1024, dtype=torch.bfloat16)
        return Turn(weight, *steps, *(of_width(16), of_width(16)), 256, 256, 3, number)

    turns = [layer(number) for number in range(6)]
    turn_layers.turn_layers([(turn, turn.kind) for turn in turns], 0, 1, None)
    deltas = ["unpack_kernel", "rotation_kernel"]
    sides = ["turn_rows_resident_kernel", "turn_columns_resident_kernel"]
    assert launched == deltas + (["turn_panels_kernel"] if side == "both" else sides)


@needs_triton
def test_every_layer_has_the_deltas_of_its_own_steps(monkeypatch) -> None:
    """Layers of several block sizes and dtypes, in any order, with one side or both."""
    from poetx_compile.ops.kernels import turn_layers

    made: list[tuple[int, int]] = []

    def delta(packed, b, dtype, transposed):
        made.append((b, transposed))
        return packed.to(dtype, copy=True)  # the steps themselves, in their order

    monkeypatch.setattr(turn_layers, "delta", delta)
    turns, ordered = [], iter(torch.arange(1.0, 100))
    for number, (b_in, b_out, sides) in enumerate(
        [(5, 5, "both"), (7, 5, "out"), (5, 7, "in"), (5, 5, "in"), (7, 7, "both")]
    ):
        weight = torch.zeros(35, 35, dtype=torch.bfloat16 if number % 3 else torch.float32)
        skew_in, skew_out = (
            torch.stack([next(ordered).expand(b * (b - 1) // 2) for _ in range(35 // b)])
            for b in (b_in, b_out)
        )
        steps = None if sides == "out" else skew_in, None if sides == "in" else skew_out
        scale = torch.tensor(2.0) if number == 4 else None
        turns.append(Turn(weight, *steps, *(of_width(16),) * 2, b_in, b_out, 3, number, scale))
    monkeypatch.setattr(turn_layers, "scale_rotation_", lambda deltas, scale: deltas.mul_(scale))
    for turn, (same, *sides) in zip(turns, turn_layers.with_deltas(turns), strict=True):
        assert same is turn
        for (skew, _), side, factor in zip(turn.steps, sides, (turn.scale, None), strict=True):
            assert (skew is None) == (side is None)
            if side is not None:
                assert torch.equal(side.deltas.float(), skew if factor is None else skew * factor)
    assert made == [(5, 7), (5, 7), (7, 5)]


def test_philox_gives_the_published_words() -> None:
    """Random123's known answers."""
    for fill, seed, expected in (
        (0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ):
        words = philox(seed, (torch.tensor(fill),) * 4)
        assert [f"{int(word):08x}" for word in words] == expected.split()
    bits = matrix_bits(3, 11, 5, 6, 7, torch.device("cpu"))
    word = philox(5, tuple(map(torch.tensor, (1, 2, 6, 7))))[1]  # column 10: third of the second 8
    assert bits[2, 10] == word & 0xFFFF


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-7])
def test_stochastic_rounding_is_unbiased(dtype, scale) -> None:
    """Each of 4096 draws of a value is one of its neighbours; their mean is the value."""
    values = torch.tensor([1.2345, -1.0001, 3.3e-2, -0.71]) * scale
    bits = matrix_bits(4, 4096, 1, 0, 0, torch.device("cpu"))
    x = values[:, None].expand(4, 4096).contiguous()
    drawn = round_stochastically(x, dtype, bits).double()
    for value, row in zip(values, drawn, strict=True):
        found = row.unique()
        assert len(found) <= 2
        gap = (found.max() - found.min()).item()
        assert found.min() <= value <= found.max()
        assert abs(row.mean() - value.double()) < 4 * gap / 2 / 64 + 1e-30
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    kept = round_stochastically(special, dtype, torch.full((4,), 0xFFFF))
    assert torch.equal(kept[:2].float(), special[:2])
    assert kept[2].isnan()
    assert kept[3] == 0
