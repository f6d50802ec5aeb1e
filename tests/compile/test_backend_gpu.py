"""The backend on a GPU: Inductor's code around the kernels, CUDA graphs, merges in between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.optim.merge import merge
from tests.helpers.models import SwiGLU
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close

pytestmark = pytest.mark.gpu

WIDTH = 256
CASES = [
    ("fast", "auto", "chunked", 128),
    ("mem", "folded", "chunked", 128),
    ("fast", "folded", "random", 128),
    ("fast", "input_centric", "random", 128),
    ("mem", "input_centric", "chunked", 128),
    ("fast", "folded", "chunked", 96),  # partial rotations, unaligned with the chunks
]


def step(model: nn.Module, forward: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of the input and of all that trains."""
    x = x.detach().clone().requires_grad_()
    out = forward(x)
    weights = torch.linspace(0.5, 1.5, out.numel(), device=out.device, dtype=out.dtype)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad((out * weights.view_as(out)).sum(), wanted)
    # CUDA graphs write their outputs anew at the next replay.
    return [out.detach().clone(), *(g.clone() for g in grads)]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(("variant", "formulation", "permutation", "block"), CASES)
def test_outputs_and_gradients_are_those_of_eager_across_merges(
    variant, formulation, permutation, block, mode
) -> None:
    model = SwiGLU(WIDTH, 512).to("cuda", torch.bfloat16)
    config = poetx.POETXConfig(
        block_size=block, variant=variant, formulation=formulation, permutation=permutation
    )
    poetx.prepare(model, config)
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return poetx.poetx_backend(gm, inputs, mode=mode)

    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 64, WIDTH, device="cuda", dtype=torch.bfloat16)
    for seed in range(3):
        turn(model, 0.1, seed)
        exact = copy.deepcopy(model).float()  # the same stored weights and rotations
        expected = step(exact, exact, x.float())
        for _ in range(3):  # CUDA graphs: warm up, record, replay
            for number, (got, wanted) in enumerate(
                zip(step(model, compiled, x), expected, strict=True)
            ):
                assert_close(got, wanted, torch.bfloat16, f"result {number} after {seed} merges")
        merge(model, redraw=True)
    assert len(graphs) == 1, "a merge compiled again"


def test_an_adopted_model_trains_on_the_gpu() -> None:
    model = SwiGLU(WIDTH, 512).cuda()
    compiled = torch.compile(model, backend=poetx.poetx_backend, options={"block_size": 64})
    x = torch.randn(64, WIDTH, device="cuda")
    compiled(x).square().mean().backward()  # the compiler's own rotations, taken over below
    optimizer = poetx.POETXMuon(compiled, lr=1e-2)
    optimizer.zero_grad()
    losses = []
    for _ in range(20):
        loss = (compiled(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
