"""The momentum of `POETXMuon` in narrow forms."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from poetx_compile.inspect.memory.parts import optimizer_state
from poetx_compile.ops.random import hashed
from poetx_compile.optim.momentum import BUFFER, SCALE, rounding_noise, store, values
from tests.helpers.rotations import skews
from tests.helpers.tolerances import relative_error

NARROW = {"bfloat16": 2**-8, "int8": 1 / 127}
"""What the largest value of a group is known to."""
narrow = pytest.mark.parametrize("dtype", NARROW)


def build(dtype: str | torch.dtype, seed: int = 0, **fields) -> tuple[nn.Module, poetx.POETXMuon]:
    torch.manual_seed(seed)
    model = nn.Linear(50, 70)
    fields = {"merge_interval": 4, "redraw_interval": 6, "max_angle": None, **fields}
    config = poetx.POETXConfig(block_size=24, **fields)
    return model, poetx.POETXMuon(model, lr=1e-2, config=config, momentum_dtype=dtype)


def step(model: nn.Module, optimizer: poetx.POETXMuon, number: int) -> list[Tensor]:
    """A step whose gradients follow from the number; they are returned."""
    gradients = []
    for i, p in enumerate(skews(model)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * number + i))
        gradients.append(p.grad)
    optimizer.step()
    return gradients


def momentum(optimizer: poetx.POETXMuon, skew: Tensor) -> Tensor:
    return values(optimizer.state[skew], BUFFER)


@narrow
def test_it_follows_the_average_of_the_gradients(dtype: str) -> None:
    model, optimizer = build(dtype, merge_interval=1000, redraw_interval=None)
    exact = [torch.zeros_like(s) for s in skews(model)]
    for number in range(30):
        for m, gradient in zip(exact, step(model, optimizer, number), strict=True):
            m.lerp_(gradient, 0.05)
    for skew, m in zip(skews(model), exact, strict=True):
        # A rounding has a third of its step on average, and 1/√(1 − 0.95²) of them are alive.
        assert relative_error(momentum(optimizer, skew), m) < 4 * NARROW[dtype]
        assert optimizer.state[skew][BUFFER].dtype == getattr(torch, dtype)
        assert (SCALE in optimizer.state[skew]) is (dtype == "int8")
    rotations = sum(v.nbytes for s in skews(model) for v in optimizer.state[s].values())
    model.bias.grad = torch.zeros_like(model.bias)
    optimizer.step()
    dense = sum(v.nbytes for v in optimizer.state[model.bias].values())
    assert rotations + dense == optimizer_state(model, "muon", getattr(torch, dtype))


@narrow
def test_what_is_less_than_a_rounding_adds_up(dtype: str) -> None:
    state = {BUFFER: torch.ones(3, 300, dtype=torch.bfloat16)}
    if dtype == "int8":
        codes = torch.full((3, 300), 64, dtype=torch.int8)
        codes[:, ::256] = 127  # the largest of each group keeps its scale
        state = {BUFFER: codes, SCALE: torch.full((3, 2), 127 / 64)}
    exact = values(state, BUFFER).clone()
    small = torch.full((3, 300), 2e-4)
    small[:, ::256] = 0.0
    for number in range(50):
        exact += small
        noise = rounding_noise(300, 7, number, small.device)
        store([state], [(0, slice(0, 3))], values(state, BUFFER).float() + small, noise)
    moved = (values(state, BUFFER).float() - 1)[:, 1:256].mean()
    assert moved.item() == pytest.approx(50 * 2e-4, rel=0.3)


def test_the_noise_is_uniform_and_follows_from_seed_and_step() -> None:
    """Against SplitMix64 in Python's own integers."""

    def mixed(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden = 0x9E3779B97F4A7C15
    seed, number = 2**63 - 1, 12345
    key = mixed((mixed((seed + golden) % 2**64) + number + golden) % 2**64)
    expected = [mixed((key + i * golden) % 2**64) >> 33 for i in range(1, 101)]
    assert hashed(100, seed, number, torch.device("cpu")).tolist() == expected
    noise = rounding_noise(40_000, 0, 1, torch.device("cpu")).double()
    assert 0 <= noise.min() < noise.max() < 2**16
    assert noise.mean().item() == pytest.approx(2**15, rel=0.02)
    other = rounding_noise(40_000, 0, 2, torch.device("cpu")).double()
    assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 0.02


@narrow
@pytest.mark.parametrize("merge_interval", [4, 1])
def test_kill_and_resume_is_bitwise(dtype: str, merge_interval: int) -> None:
    model, optimizer = build(dtype, merge_interval=merge_interval)
    file = io.BytesIO()
    for number in range(11):
        if number == 5:
            torch.save([model.state_dict(), optimizer.state_dict()], file)
        step(model, optimizer, number)
    assert optimizer.schedule.redraws == 1
    resumed, other = build(dtype, seed=1, merge_interval=merge_interval)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    for number in range(5, 11):
        step(resumed, other, number)
    assert torch.equal(model.weight, resumed.weight)
    for one, two in zip(skews(model), skews(resumed), strict=True):
        for key, value in optimizer.state[one].items():
            assert value.dtype == other.state[two][key].dtype
            assert torch.equal(value, other.state[two][key]), key


@pytest.mark.parametrize("into", ["float32", *NARROW])
@pytest.mark.parametrize("saved", ["float32", *NARROW])
def test_a_saved_momentum_is_converted(saved: str, into: str) -> None:
    model, optimizer = build(saved)
    for number in range(3):
        step(model, optimizer, number)
    other_model, other = build(into)
    other.load_state_dict(optimizer.state_dict())
    for one, two in zip(skews(model), skews(other_model), strict=True):
        error = relative_error(momentum(other, two), momentum(optimizer, one))
        assert error <= (0 if into == "float32" else NARROW[into])
        assert other.state[two][BUFFER].dtype == getattr(torch, into)


@narrow
def test_it_moves_with_its_planes(dtype: str) -> None:
    (model, optimizer), (exact_model, exact) = build(dtype), build("float32")
    for number in range(6):
        step(model, optimizer, number)
        step(exact_model, exact, number)
    assert optimizer.schedule.redraws == 1
    for one, two in zip(skews(model), skews(exact_model), strict=True):
        assert relative_error(momentum(optimizer, one), momentum(exact, two)) < 4 * NARROW[dtype]


def test_what_is_not_finite_is_not_hidden() -> None:
    model, optimizer = build("int8", redraw_interval=None)
    step(model, optimizer, 0)
    for p in skews(model):
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert all(momentum(optimizer, s).isnan().all() for s in skews(model))


def test_another_dtype_is_refused() -> None:
    for dtype in (torch.float16, "fp8", None):
        with pytest.raises(ConfigError, match=r"momentum_dtype = .*use torch\.float32, torch\.bf"):
            build(dtype)


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_gradients_may_be_narrow(dtype: str) -> None:
    """`Tensor.grad_dtype`, through the backend: accumulated in bf16, stepped in fp32."""
    (model, optimizer), (exact_model, exact) = build(dtype), build(dtype)
    for skew in skews(model):
        skew.grad_dtype = torch.bfloat16
    x = torch.randn(8, 50)
    for made in (model, exact_model):
        compiled = torch.compile(made, backend="poetx", options={"stage": "eager"})
        for part in x.split(4):
            compiled(part).square().mean().backward()
    assert {s.grad.dtype for s in skews(model)} == {torch.bfloat16}
    optimizer.step()
    exact.step()
    for one, two in zip(skews(model), skews(exact_model), strict=True):
        error = relative_error(momentum(optimizer, one), momentum(exact, two))
        assert error < 2**-8 + NARROW.get(dtype, 0)
