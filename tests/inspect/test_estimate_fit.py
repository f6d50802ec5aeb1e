"""`estimate` says whether it fits: largest batches, budgets, checkpointing, mixtures of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.errors import ConfigError, EstimateError
from poetx_compile.inspect.memory.fit import (
    GIB,
    Batches,
    Peak,
    budget_for,
    number,
    parse_memory,
    usable,
    with_budget,
)
from poetx_compile.inspect.memory.rows import Estimate, MemoryRow, judged
from poetx_compile.inspect.memory.step import StepMemory
from tests.helpers.models import MLP

CONFIG = poetx.POETXConfig(block_size=16)


def peak(kept: int, forward: int, *backward: int, gradients: int = 5) -> Peak:
    return Peak(100, 1, 3, StepMemory(kept, gradients, forward, backward))


class Tokens(nn.Module):
    """Layers on token ids, enough of them for a few to be traced."""

    def __init__(self, layers: int = 6, width: int = 48):
        super().__init__()
        self.embedding = nn.Embedding(32, width)
        self.layers = nn.ModuleList(MLP(width, 3 * width) for _ in range(layers))
        self.head = nn.Linear(width, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * GIB), ("79.5 GiB", int(79.5 * GIB)), ("24g", 24 * GIB), (7, 7)]
)
def test_memory_is_written_as_cards_are_named(text: str | int, size: int) -> None:
    assert parse_memory(text) == size
    assert usable(80 * GIB) < 79 * GIB


@pytest.mark.parametrize("wrong", ["80", "GB", "-3GB", "0GB", 0, True, "80 apples"])
def test_other_sizes_are_refused(wrong: str | int) -> None:
    with pytest.raises(ConfigError, match="use a size such as '80GB'"):
        parse_memory(wrong)


def test_batches_grow_part_by_part() -> None:
    one = Batches({2: peak(20, 30, 40, 25)})  # of 25 and of 40 the gradients do not grow: 5
    assert one.at(2) == 100 + 1 + 40
    assert one.at(4) == 100 + 2 + 75
    assert one.largest(100 + 2 + 75) == 4
    two = Batches({2: peak(20, 30, 40, 25), 4: peak(30, 50, 45, 30)})
    assert two.at(4) == 100 + 2 + 50
    assert two.at(8) == 100 + 4 + 90  # the forward, which grows faster, has overtaken
    assert two.largest(100) == 0
    assert one.at(1) == 100 + 5 + 17  # 22 in the backward
    assert Batches({1: peak(0, 0, 0)}).largest(50) == 0


def test_a_budget_lies_between_fast_and_mem() -> None:
    fast, mem = peak(100, 100, 120), peak(40, 40, 80)
    half = with_budget(fast, mem, 0.7)
    assert (half.step.kept, max(half.step.backward), half.step.forward) == (70, 100, 70)
    assert with_budget(fast, mem, 0.1).step.kept == 40
    assert budget_for(201, fast, mem) == 0.71
    assert budget_for(100, fast, mem) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (15, "15.0"), (3.2, "3.20"), (0.25, "0.25"), (0.00123, "0.0012")],
)
def test_numbers_that_are_not_zero_do_not_read_as_zero(value: float, text: str) -> None:
    assert number(value) == text


def found(peaks: list[Peak], memory: int) -> Estimate:
    methods = ("nn.Linear", "POET-X fast", "POET-X mem")
    rows = [
        MemoryRow(m, "", 1, 1, 1, 1, p.step.kept, p.total, p.where)
        for m, p in zip(methods, peaks, strict=True)
    ]
    return Estimate("Model", ("int64 [4]",), tuple(rows), "", CONFIG, memory)


@pytest.mark.parametrize(
    ("limit", "fits", "batches", "advice"),
    [
        (500, (True, True, True), (13, 13, 19), ""),
        (200, (False, False, True), (3, 3, 4), "As asked it needs memory_budget=0.69, or variant"),
        (150, (False, False, False), (1, 1, 2), "As asked it does not: use a batch of 2, checkpoi"),
    ],
)
def test_the_verdict_names_batches_and_what_is_needed(
    limit: int, fits: tuple[bool, ...], batches: tuple[int, ...], advice: str
) -> None:
    memory = GIB // 2 + 1 + int(limit / 0.96)
    at_4 = [peak(100, 100, 120), peak(100, 100, 120), peak(40, 40, 80)]

    def at(batch: int) -> list[Peak]:
        asked.append(batch)
        return [peak(25 * batch, 25 * batch, 30 * batch), peak(10 * batch, 0, 20 * batch)]

    asked: list[int] = []
    result = judged(found(at_4, memory), at_4, 4, at, False)
    assert tuple(row.fits for row in result.rows) == fits
    assert tuple(row.largest_batch for row in result.rows) == batches
    assert result.advice.startswith(advice)
    assert bool(result.advice) == bool(advice)
    assert len(asked) <= 1
    for text in ("largest batch", "fits", "peak in"):
        assert f"\n{text}  " in str(result)
    assert "<td>fits</td>" in result._repr_html_()
    assert repr(result).startswith("<Estimate of Model: nn.Linear 2")
    alone = judged(found(at_4, memory), at_4, None, at, False)
    assert "largest batch" not in str(alone)


def test_a_small_model_is_judged_and_no_size_reads_as_zero() -> None:
    lines: list[str] = []
    result = poetx.estimate(
        Tokens(1), batch_size=4, sequence_length=8, config=CONFIG, gpu_memory="80GB",
        variants=["mem"], progress=lines.append,
    )  # fmt: skip
    dense, mem = result.rows
    assert dense.fits
    assert mem.fits
    assert min(dense.largest_batch or 0, mem.largest_batch or 0) > 10**5
    assert "fits: 76.3 GiB of the GPU's 80.0 GiB" in str(result)
    assert " 0  " not in str(result)
    assert lines[:2] == [f"tracing {name}: every layer" for name in ("nn.Linear", "POET-X")]
    assert lines[2] == f"tracing POET-X, batch {2**20}: every layer"


def test_checkpointing_needs_a_switch() -> None:
    with pytest.raises(ConfigError, match=r"Use torch\.utils\.checkpoint in the model"):
        poetx.estimate(Tokens(), checkpointing=True)


def test_a_mixture_of_transformers_and_checkpoints() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, num_local_experts=4,
        architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    sizes: dict[str, Any] = {"batch_size": 2, "sequence_length": 64, "variants": []}
    plain, less = (
        poetx.estimate(config, **sizes, config=CONFIG, checkpointing=checkpointing).rows[0]
        for checkpointing in (False, True)
    )
    assert less.activations < plain.activations
    assert (less.weights, less.gradients) == (plain.weights, plain.gradients)


def test_an_op_that_cannot_be_traced_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    @torch.library.custom_op("poetx_tests::no_fake", mutates_args=())
    def no_fake(x: Tensor) -> Tensor:
        return x.clone()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return no_fake(self.up(x))

    with pytest.raises(EstimateError, match=r"it stops at the op .*no_fake"):
        poetx.estimate(Model(), torch.zeros(3, 8), config=CONFIG)
    assert capfd.readouterr().err == ""
