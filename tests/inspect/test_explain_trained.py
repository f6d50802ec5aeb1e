"""`explain` leads with the share that trains through rotations, and lists what trains densely."""

from __future__ import annotations

import expecttest
import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.inspect.page import page

OPTIONS = {"stage": "eager", "block_size": 8}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 16, 40))
        self.down = nn.Parameter(torch.randn(4, 40, 16))


class Block(nn.Module):
    """Nearly all of its weights are experts of three dimensions."""

    def __init__(self):
        super().__init__()
        self.attention, self.router = nn.Linear(16, 16, bias=False), nn.Linear(16, 4, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        share = self.router(x).softmax(-1)
        y = torch.einsum("tm,emh->teh", x, self.experts.up).relu()
        return x + torch.einsum("teh,ehm,te->tm", y, self.experts.down, share)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.unused, self.norm = nn.Linear(16, 8), nn.RMSNorm(16)
        self.frozen = nn.Linear(16, 16, bias=False).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.frozen(self.norm(x))


def lead(explanation: poetx.explain) -> str:
    return explanation.text(verbose=True).split("\n\n")[0] + "\n"


class TestGolden(expecttest.TestCase):
    def test_a_mixture_that_nobody_prepared(self):
        found = poetx.explain(Mixture(), torch.arange(5), options=OPTIONS)
        self.assertExpectedInline(
            lead(found),
            """\
4.5 % of 11,448 parameters (2 of 6 nn.Linear) train by rotations
trainable: 10,904 = 224 of rotations + 10,680 dense
  dense: layers.0-1.experts.up: 4x16x40, 5,120 parameters, Experts is no nn.Linear (3 dimensions)
  dense: layers.0-1.experts.down: 4x40x16, 5,120 parameters, Experts is no nn.Linear (3 dimensions)
  dense: embedding.weight: 10x16, 160 parameters, embedding
  dense: layers.0-1.router: 4x16, 128 parameters, router of a mixture of experts
  dense: unused: 8x16, 128 parameters, no graph of these inputs calls it
""",
        )

    def test_prepared_rotations_train_wherever_they_are_called(self):
        model = Mixture()
        poetx.prepare(model, poetx.POETXConfig(block_size=8))
        self.assertExpectedInline(
            lead(poetx.explain(model, torch.arange(5))),
            """\
5.6 % of 11,448 parameters (3 of 6 nn.Linear) train by rotations
trainable: 10,860 = 308 of rotations + 10,552 dense
  dense: layers.0-1.experts.up: 4x16x40, 5,120 parameters, Experts is no nn.Linear (3 dimensions)
  dense: layers.0-1.experts.down: 4x40x16, 5,120 parameters, Experts is no nn.Linear (3 dimensions)
  dense: embedding.weight: 10x16, 160 parameters, embedding
  dense: layers.0-1.router: 4x16, 128 parameters, router of a mixture of experts
""",
        )


@pytest.mark.parametrize("prepared", [False, True])
def test_the_numbers_are_those_of_the_model(prepared: bool):
    model = Mixture()
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    config = poetx.POETXConfig(block_size=8)
    if prepared:
        poetx.prepare(model, config)
    what = poetx.explain(model, torch.arange(5), options=OPTIONS).trained
    assert what.total == total
    assert what.rotated + what.dense + frozen == total
    if not prepared:
        poetx.prepare(model, poetx.POETXConfig(block_size=8, exclude_modules=["unused"]))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert what.rotations + what.dense == trainable


def test_the_page_leads_with_it_too():
    text = page(poetx.explain(Mixture(), torch.arange(5), options=OPTIONS))
    assert text.index("nn.Linear) train by rotations") < text.index('id="h-layers"')
    assert "<code>layers.0-1.experts.up</code> 4×16×40: 5,120 parameters" in text
    assert "trains through rotations</span>" in text
