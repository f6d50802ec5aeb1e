"""Angles, orthogonality and drift against direct computation in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.inspect.diagnostics import diagnostics, spectrum, spectrum_drift
from poetx_compile.layers.prepared import equivalence_of
from poetx_compile.ops.packing import pack, unpack
from poetx_compile.optim.spectral_norm import largest_norms, spectral_norms
from tests.helpers.models import OddZoo
from tests.helpers.rotations import sides


def test_a_known_rotation() -> None:
    model = nn.Linear(4, 6).double()
    poetx.prepare(model, poetx.POETXConfig(block_size=2, exclude_modules=()))
    e = equivalence_of(model)
    assert e is not None
    e.skew_in.data.copy_(torch.tensor([[0.1], [-0.3]]))
    figures = diagnostics(model)
    assert figures["angle_max"] == pytest.approx(0.3)
    assert figures["angle_mean"] == pytest.approx(0.4 / 5)
    # σ = 1 − θ⁴ and GᵀG − I = σ² − 1.
    assert figures["orthogonality_error"] == pytest.approx(1 - (1 - 0.3**4) ** 2)


def test_the_largest_over_every_layer_and_block_size() -> None:
    model = OddZoo()
    poetx.prepare(model, poetx.POETXConfig(block_size=8, exclude_modules=()))
    norms = []
    for side in sides(model):
        nn.init.normal_(side.skew, std=0.05)
        if side.skew.numel():
            skews = unpack(side.skew.detach().double(), side.block)
            norms.append(torch.linalg.matrix_norm(skews, ord=2))
    figures = diagnostics(torch.compile(model, backend="eager"))
    assert figures["angle_max"] == pytest.approx(torch.cat(norms).max().item(), rel=1e-5)
    assert figures["angle_mean"] == pytest.approx(torch.cat(norms).mean().item(), rel=1e-5)
    assert figures["orthogonality_error"] > 0


def test_nothing_prepared() -> None:
    expected = {"angle_max": 0.0, "angle_mean": 0.0, "orthogonality_error": 0.0}
    assert diagnostics(nn.Linear(2, 2)) == expected


def test_spectrum_drift() -> None:
    weight = torch.diag(torch.tensor([3.0, 1.0]))
    reference = spectrum(weight)
    assert reference.tolist() == [3.0, 1.0]
    assert spectrum_drift(weight, reference) == 0.0
    assert spectrum_drift(torch.diag(torch.tensor([3.2, 0.8])), reference) == pytest.approx(0.1)


def _skew(kind: str, b: int, blocks: int = 16) -> torch.Tensor:
    x = torch.randn(blocks, b, b)
    if kind == "low rank":
        x = torch.randn(blocks, b, 2) @ torch.randn(blocks, 2, b)
    if kind == "orthogonal":
        x = x - x.mT
        u, _, vh = torch.linalg.svd(x)
        return unpack(pack(u @ vh), b)
    return x - x.mT


@pytest.mark.parametrize("kind", ["gaussian", "low rank", "orthogonal"])
@pytest.mark.parametrize("b", [2, 3, 8, 64, 256])
def test_the_guards_estimate_is_close_and_never_above(kind: str, b: int) -> None:
    q = _skew(kind, b, blocks=4 if b == 256 else 16)
    exact = torch.linalg.matrix_norm(q, ord=2).max().item()
    estimate = spectral_norms(q).max().item()
    assert 0.96 * exact <= estimate <= exact * (1 + 1e-5)
    (device_wide,) = largest_norms([(pack(q)[:3], b), (pack(q)[3:], b)])
    assert device_wide.item() == pytest.approx(estimate, rel=1e-6)


def test_the_estimate_of_zero_and_of_tiny_blocks() -> None:
    assert spectral_norms(torch.zeros(2, 8, 8)).tolist() == [0.0, 0.0]
    q = torch.zeros(1, 8, 8)
    q[0, 2, 5], q[0, 5, 2] = 1e-12, -1e-12
    assert spectral_norms(q).item() == pytest.approx(1e-12, rel=0.05)
