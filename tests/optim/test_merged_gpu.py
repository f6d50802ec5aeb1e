"""The merged form on a GPU: CUDA graphs over weights that steps write, and what is told late."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.errors import DivergedError
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from poetx_compile.ops.random import matrix_bits, round_stochastically
from tests.helpers.models import SwiGLU

pytestmark = pytest.mark.gpu


def build(optimizer_class: type = poetx.POETXMuon, dtype: torch.dtype = torch.bfloat16):
    torch.manual_seed(0)
    model = SwiGLU(256, 512).to("cuda", dtype)
    config = poetx.POETXConfig(block_size=128, merge_interval=1, permutation="chunked")
    poetx.prepare(model, config)
    return model, optimizer_class(model, lr=2e-3)


def step(forward: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(4, 64, 256, generator=generator, device="cuda", dtype=torch.bfloat16)
    loss = (forward(x) - x.roll(1, -1)).float().square().mean() * factor
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("optimizer_class", [poetx.POETXMuon, poetx.POETXAdamW])
def test_compiled_training_is_that_of_eager(optimizer_class: type, mode: str | None) -> None:
    model, optimizer = build(optimizer_class)
    other, again = build(optimizer_class)
    compiled = torch.compile(model, backend=poetx.poetx_backend, mode=mode)
    addresses = [p.data_ptr() for p in model.parameters()]
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = [step(compiled, optimizer) for _ in range(8)]
    expected = [step(other, again) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert torch.stack(losses).allclose(torch.stack(expected), rtol=0.01)
    assert addresses == [p.data_ptr() for p in model.parameters()]


def test_a_step_that_is_not_finite_is_told_at_the_next_one() -> None:
    model, optimizer = build()
    step(model, optimizer)
    before = [stored_weight(m).clone() for _, m, _ in prepared_linears(model)]
    step(model, optimizer, factor=float("nan"))
    for weight, (_, module, _) in zip(before, prepared_linears(model), strict=True):
        assert torch.equal(weight, stored_weight(module))
    with pytest.raises(DivergedError, match="no weight was turned"):
        step(model, optimizer)


def test_rotations_at_rest_share_one_zero_and_a_resumed_run_has_the_same_bits() -> None:
    model, optimizer = build()
    for _ in range(2):
        step(model, optimizer)
    skews = [skew for _, _, e in prepared_linears(model) for skew in e.skews]
    assert len({skew.data_ptr() for skew in skews}) == 1
    state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    other, again = build()
    other.load_state_dict(state)
    again.load_state_dict(moments)
    for it, its in ((model, optimizer), (other, again)):
        for _ in range(2):
            step(it, its)
    for (_, one, _), (_, two, _) in zip(
        prepared_linears(model), prepared_linears(other), strict=True
    ):
        assert torch.equal(one.weight, two.weight)


def test_random_bits_and_rounding_are_those_of_the_cpu() -> None:
    arguments = (33, 70, 2**40 + 5, 7, 3)
    on_cpu = matrix_bits(*arguments, torch.device("cpu"))
    on_gpu = matrix_bits(*arguments, torch.device("cuda"))
    assert torch.equal(on_gpu.cpu(), on_cpu)
    x = torch.randn(33, 70)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = round_stochastically(x.cuda(), dtype, on_gpu)
        assert torch.equal(rounded.cpu(), round_stochastically(x, dtype, on_cpu))
