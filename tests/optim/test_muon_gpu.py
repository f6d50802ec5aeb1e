"""The kernels of a step of `POETXMuon` beside its torch operations, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.optim import muon
from tests.helpers.rotations import skews
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.gpu


def trained(b: int, dtype: torch.dtype, gradients: torch.dtype) -> tuple[list[Tensor], list[Any]]:
    """Rotations and states after two steps, of four layers: more sides than a launch takes."""
    generator = torch.Generator("cuda").manual_seed(b)
    layers = [nn.Linear(2 * b + i, 3 * b, device="cuda") for i in range(5)]
    model = nn.Sequential(*layers)
    config = poetx.POETXConfig(block_size=b, merge_interval=1000, max_angle=None)
    optimizer = poetx.POETXMuon(model, poetx_lr=0.01, config=config, momentum_dtype=dtype)
    for _ in range(2):
        for skew in skews(model):
            gradient = torch.randn(skew.shape, generator=generator, device="cuda")
            if gradients != skew.dtype:
                skew.grad_dtype = gradients
            skew.grad = gradient.to(gradients)
        optimizer.step()
    return [s.detach().clone() for s in skews(model)], [optimizer.state[s] for s in skews(model)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("b", [40, 77, 256, 320])
def test_kernels_do_what_torch_does(monkeypatch, b, gradients, dtype) -> None:
    ran = []
    steps = muon.muon_steps
    monkeypatch.setattr(muon, "muon_steps", lambda *given: ran.append(given) or steps(*given))
    actual, states = trained(b, dtype, gradients)
    launched = len(ran)
    assert launched
    monkeypatch.setattr(muon, "fused", lambda *_: False)
    expected, others = trained(b, dtype, gradients)
    assert len(ran) == launched
    for a, e in zip(states, others, strict=True):
        assert a.keys() == e.keys()
        for key in e:
            if e[key].dtype == torch.float32:
                assert_close(a[key], e[key], torch.float32, key)
            else:  # rounded by the same bits, of sums that may differ in their last one
                assert (a[key] == e[key]).float().mean() > 0.999
    for a, e in zip(actual, expected, strict=True):
        # Both are rounded, apart.
        assert (a - e).norm() < 0.05 * e.norm()
