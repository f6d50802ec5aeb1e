"""How often a model is compiled: sizes, modes and merges that change as they do in training."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers.graph_of import prepared
from tests.helpers.models import MLP, SwiGLU, TinyLM
from tests.helpers.tolerances import assert_close

AOT, EAGER = {"stage": "aot_eager"}, {"stage": "eager"}
CONFIG = poetx.POETXConfig(block_size=8, merge_interval=3, redraw_interval=3)


class Run:
    """Training and evaluation of a compiled model; each call takes a batch and a length."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], options=AOT, **how):
        self.model = TinyLM(layers=1)
        self.call = torch.compile(self.model, backend=poetx.poetx_backend, options=options, **how)
        self.optimizer = optimizer(self.model, lr=1e-2, poetx_lr=2e-3, config=CONFIG)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.mark = False

    def tokens(self, batch: int, length: int) -> Tensor:
        tokens = torch.randint(0, 24, (batch, length))
        if self.mark:
            torch._dynamo.mark_dynamic(tokens, [0, 1])
        return tokens

    def train(self, *sizes: tuple[int, int]) -> None:
        for step, (batch, length) in enumerate(sizes):
            self.call(self.tokens(batch, length)).logsumexp(-1).sum().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=step % 2 == 0)

    def evaluate(self, *sizes: tuple[int, int]) -> None:
        self.model.eval()
        with torch.no_grad():
            for batch, length in sizes:
                self.call(self.tokens(batch, length))
        self.model.train()


LENGTHS = [(4, 9), (4, 12), (4, 7), (4, 20), (4, 5), (4, 12), (4, 9)]


def test_lengths_modes_merges_and_rates(graphs):
    """Three graphs by default: the first sizes, any length, any length without gradients."""
    run = Run(poetx.POETXMuon, fullgraph=True)
    run.train(*LENGTHS)
    assert run.optimizer.schedule.merges == 2
    assert graphs() == 2
    run.evaluate((4, 6), (4, 11))
    run.train(*LENGTHS)
    run.evaluate((4, 9))
    assert run.optimizer.schedule.merges == 4
    assert graphs() == 3
    run.train((3, 9), (2, 6))  # Dynamo learns of another size when it sees it
    assert graphs() == 4


@pytest.mark.parametrize("how", ["dynamic", "marked"])
def test_a_short_last_batch_as_well(how, graphs):
    """Two graphs where the sizes are declared to vary: with gradients and without."""
    # What is marked and does not stay dynamic, in AOTAutograd's graphs as well, is an error.
    options, dynamic = (AOT, None) if how == "marked" else (EAGER, True)
    run = Run(poetx.POETXAdamW, options, fullgraph=True, dynamic=dynamic)
    run.mark = how == "marked"
    run.train(*LENGTHS, (3, 8))
    run.evaluate((8, 6), (5, 11))
    run.train(*LENGTHS, (2, 8))
    run.evaluate((8, 12))
    assert run.optimizer.schedule.merges == 5
    assert graphs() == 2


def blocks(count: int = 12) -> nn.Sequential:
    return nn.Sequential(*(SwiGLU() for _ in range(count)))


@pytest.mark.parametrize("by", ["prepare", "adoption"])
def test_twelve_identical_blocks_are_compiled_once(by, graphs):
    model = blocks()
    options = AOT | {"formulation": "input_centric"}
    if by == "prepare":
        prepared(model)
        reference = copy.deepcopy(model)
    else:
        options |= {"block_size": 8}
        reference = copy.deepcopy(model)
    for block in model:
        block.compile(backend=poetx.poetx_backend, fullgraph=True, options=options)
    x = torch.randn(3, 16, requires_grad=True)
    y = model(x)
    assert graphs() == 1
    assert_close(y, reference(x))
    y.square().sum().backward()
    if by == "prepare":
        reference(x).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            if q.grad is not None:
                assert_close(p.grad, q.grad, what=name)
    model(torch.randn(5, 16, requires_grad=True)).sum().backward()  # another size
    with torch.no_grad():
        model(torch.randn(7, 16))
    assert graphs() == 3


def test_blocks_prepared_after_adoption_are_compiled_once_more(graphs):
    model = blocks()
    for block in model:
        block.compile(backend=poetx.poetx_backend, options=AOT | CONFIG.to_dict())
    optimizer = None
    for _ in range(4):
        model(torch.randn(3, 16, requires_grad=True)).square().sum().backward()
        optimizer = optimizer or poetx.POETXAdamW(model, lr=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.schedule.merges == 1
    assert graphs() == 2


def test_the_recompile_limit_is_announced(caplog, graphs):
    model = prepared(MLP())
    compiled = torch.compile(model, backend=poetx.poetx_backend, dynamic=False, options=AOT)
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        caplog.at_level(logging.WARNING, logger="poetx_compile"),
    ):
        compiled(torch.randn(2, 12))
        assert not caplog.records
        compiled(torch.randn(3, 12))
        (record,) = caplog.records
        assert "graph 2 of one function, the last" in record.getMessage()
        assert "mark_dynamic" in record.getMessage()
        x = torch.randn(4, 12)
        assert torch.equal(compiled(x), model(x)), "past the limit it is the eager model"
        assert graphs() == 2


def test_past_the_limit_fullgraph_raises():
    model = prepared(MLP())
    compiled = torch.compile(
        model, backend=poetx.poetx_backend, dynamic=False, fullgraph=True, options=AOT
    )
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(torch.randn(2, 12))
        with pytest.raises(Exception, match="fullgraph=True"):
            compiled(torch.randn(3, 12))
    assert all(e.draw == 1 for _, _, e in prepared_linears(model))
