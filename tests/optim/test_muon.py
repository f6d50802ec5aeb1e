"""`POETXMuon`: the orthogonalised step, its state, and its plumbing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import poetx_compile as poetx
from poetx_compile.errors import ConfigError
from poetx_compile.layers.prepared import equivalence_of
from poetx_compile.ops.orthogonalize import orthogonalize
from poetx_compile.ops.packing import pack, unpack
from poetx_compile.optim import POETXMuon, blocks
from tests.helpers.models import OddZoo, TinyLM
from tests.helpers.rotations import sides, skews
from tests.helpers.tolerances import relative_error
from tests.helpers.training import build, train_step


@pytest.mark.parametrize("b", [2, 3, 16, 65])
def test_orthogonalize_keeps_directions_and_evens_out_lengths(b: int) -> None:
    m = torch.randn(5, b, b, dtype=torch.float64)
    m = m - m.mT
    result = orthogonalize(m)
    assert relative_error(result, -result.mT) < 1e-12
    u, sigma, vh = torch.linalg.svd(m)
    # In the basis of the singular vectors the result is diagonal, with values near 1.
    values = u.mT @ result @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert relative_error(values, torch.diag_embed(diagonal)) < 1e-9
    large = sigma > 0.005 * sigma.norm(dim=-1, keepdim=True)
    assert large.any(-1).all()
    assert (diagonal[large] > 0.76).all()
    assert (diagonal[large] < 1.08).all()
    polar = (u * large[..., None, :]) @ vh
    assert (
        torch.linalg.matrix_norm((u * (large * diagonal)[..., None, :]) @ vh - polar, 2).max()
        < 0.25
    )


def test_orthogonalize_zero() -> None:
    assert not orthogonalize(torch.zeros(2, 8, 8)).any()
    m = torch.randn(2, 8, 8, dtype=torch.float64)
    m -= m.mT.clone()
    assert relative_error(orthogonalize(1e-12 * m), orthogonalize(m)) < 1e-9
    assert not orthogonalize(1e-18 * m).any()


def test_two_steps_against_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over batches smaller than a parameter: the split changes nothing."""
    monkeypatch.setattr(blocks.chunks, "__defaults__", (3 * 4 * 8 * 8,))
    model = nn.Sequential(nn.Linear(32, 40), nn.Linear(40, 24)).double()
    poetx.prepare(model, poetx.POETXConfig(block_size=8, max_angle=None))
    optimizer = POETXMuon(model, poetx_lr=0.03, momentum=0.9)
    momenta: dict = {}
    expected: dict = {}
    for step in range(2):
        model(torch.randn(16, 32, dtype=torch.float64)).square().mean().backward()
        for i, skew in enumerate(skews(model)):
            m = momenta[i] = 0.9 * momenta.get(i, 0) + 0.1 * skew.grad
            direction = orthogonalize(unpack(0.1 * skew.grad + 0.9 * m, 8))
            expected[i] = skew.detach() - 0.03 * pack(direction)
        optimizer.step()
        optimizer.zero_grad()
        for i, skew in enumerate(skews(model)):
            assert relative_error(skew, expected[i]) < 1e-11, (step, i)
            assert set(optimizer.state[skew]) == {"momentum_buffer"}


@pytest.mark.parametrize("period", [2, 3, 4])
def test_sides_take_turns(period: int) -> None:
    """All momenta go on as without; a side turns in every k-th step, k times as far."""
    models = [nn.Sequential(nn.Linear(32, 40), nn.Linear(40, 24)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        poetx.prepare(model, poetx.POETXConfig(block_size=8, max_angle=None))
    both, one = POETXMuon(models[0]), POETXMuon(models[1], turn_every=period)
    expected = [torch.zeros_like(skew) for skew in skews(models[0])]
    turned: list[tuple[int, int]] = []
    for step in range(2 * period):
        before = [skew.detach().clone() for skew in skews(models[0])]
        for i, skew in enumerate(skews(models[0])):
            skew.grad = torch.randn_like(skew)
            skews(models[1])[i].grad = skew.grad.clone()
        both.step()
        one.step()
        for i, (skew, other) in enumerate(zip(skews(models[0]), skews(models[1]), strict=True)):
            if (step + 1 + i // 2 + i % 2 * (period // 2)) % period == 0:
                expected[i] += period * (skew.detach() - before[i])
                turned.append((step, i // 2))
            assert relative_error(other.detach() + 1, expected[i] + 1) < 1e-14, (step, i)
            momenta = [o.state[p]["momentum_buffer"] for o, p in ((both, skew), (one, other))]
            assert torch.equal(*momenta)
    assert len(set(turned)) == len(turned) == 2 * len(expected), "never both sides of a layer"


@pytest.mark.parametrize("period", [0, -2, 2.5, True, None])
def test_a_period_is_a_number_of_steps(period: Any) -> None:
    with pytest.raises(ConfigError, match=f"turn_every = {period} is not allowed: use a whole"):
        POETXMuon(nn.Sequential(nn.Linear(8, 8)), turn_every=period)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_momenta_of_resting_sides_go_on(dtype: str) -> None:
    states = []
    for period in (1, 2, 3):
        torch.manual_seed(0)
        model = TinyLM(layers=1)
        poetx.prepare(model, poetx.POETXConfig(block_size=8))
        optimizer = POETXMuon(model, momentum_dtype=dtype, turn_every=period)
        train_step(model, optimizer)
        states.append([optimizer.state[skew]["momentum_buffer"] for skew in skews(model)])
    for whole, *others in zip(*states, strict=True):
        assert whole.any()
        assert all(torch.equal(whole, other) for other in others)


def test_every_plane_turns_by_about_the_learning_rate() -> None:
    model, optimizer = build(POETXMuon, poetx_lr=0.02)
    train_step(model, optimizer)
    for side in sides(model):
        norms = torch.linalg.matrix_norm(unpack(side.skew.detach(), side.block), ord=2)
        assert (norms > 0.65 * 0.02).all()
        assert (norms < 1.25 * 0.02).all()


def test_it_trains() -> None:
    torch.manual_seed(0)
    model, optimizer = build(POETXMuon, lr=5e-3, merge_interval=20, max_angle=0.25)
    losses = [train_step(model, optimizer, 0).item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.schedule.merges >= 3


def test_sides_of_size_one_and_missing_gradients() -> None:
    model = OddZoo()
    poetx.prepare(model, poetx.POETXConfig(block_size=4, exclude_modules=()))
    optimizer = POETXMuon(model, poetx_lr=0.01)
    nn.Sequential(*model.chain[:3])(torch.randn(5, 7)).sum().backward()  # the rest has none
    optimizer.step()
    first, last = equivalence_of(model.chain[0]), equivalence_of(model.chain[-1])
    assert first is not None
    assert last is not None
    assert first.skew_in.any()
    assert not last.skew_in.any()
    assert last.skew_in not in optimizer.state


def test_no_dense_parameters() -> None:
    model = nn.Linear(8, 8, bias=False)
    poetx.prepare(model, poetx.POETXConfig(block_size=4))
    optimizer = POETXMuon(model)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert all(s.any() for s in skews(model))


def test_closures_and_hooks_run_once() -> None:
    model, optimizer = build(POETXMuon)
    calls, steps = [], []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        optimizer.zero_grad()
        loss = model(torch.zeros(1, 4, dtype=torch.int64)).square().mean()
        loss.backward()
        return loss

    try:
        loss = optimizer.step(closure)
    finally:
        handle.remove()
    assert loss.requires_grad
    assert (calls, steps, optimizer.schedule.step) == ([1], [1], 1)


def test_fresh_model_in_float64() -> None:
    model = TinyLM().double()
    _, optimizer = build(POETXMuon, model)
    tokens = torch.arange(12).reshape(1, 12)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    assert all(s.dtype == torch.float64 and s.any() for s in skews(model))
