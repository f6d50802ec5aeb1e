"""Hugging Face Accelerate alone: accumulation, mixed precision, saved and loaded states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers.models import TinyLM
from tests.helpers.tolerances import relative_error, tolerance

CONFIG = poetx.POETXConfig(block_size=8, merge_interval=3, redraw_interval=3)
ACCUMULATED = 2


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate keeps its settings for the life of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Loop:
    """A training loop as the documentation of Accelerate has it."""

    def __init__(self, precision: str, how: str):
        torch.manual_seed(0)
        self.accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=ACCUMULATED
        )
        model = TinyLM(layers=1)
        poetx.prepare(model, CONFIG)
        optimizer = poetx.POETXMuon(model, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        options = {"stage": "aot_eager"}
        if how == "in place":
            model.compile(backend=poetx.poetx_backend, fullgraph=True, options=options)
        elif how == "wrapped":
            model = torch.compile(model, backend=poetx.poetx_backend, options=options)
        elif how == "default backend":
            model.compile(options=options)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            model, optimizer, scheduler
        )
        self.schedule = optimizer.schedule

    def run(self, micro_batches: range) -> list[float]:
        losses = []
        for number in micro_batches:
            generator = torch.Generator().manual_seed(number)
            tokens = torch.randint(0, 24, (3, 7), generator=generator)
            with self.accelerator.accumulate(self.model):
                logits = self.model(tokens[:, :-1]).flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulation_and_mixed_precision(precision, graphs):
    compiled, eager = Loop(precision, "in place"), Loop(precision, "eager")
    losses, expected = (torch.tensor(loop.run(range(8))) for loop in (compiled, eager))
    assert graphs() == 1
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert relative_error(losses, expected) < tolerance(dtype)
    assert compiled.schedule.step == 8 // ACCUMULATED
    assert compiled.schedule.merges == 1
    skews = [e.skew_in for _, _, e in prepared_linears(compiled.model)]
    assert all(skew.dtype == torch.float32 and skew.abs().max() > 0 for skew in skews)


@pytest.fixture
def _default_backend() -> Iterator[None]:
    if not hasattr(torch.compiler, "set_default_backend"):
        pytest.skip("this torch has no default backend")
    torch.compiler.set_default_backend("poetx")
    yield
    torch.compiler.set_default_backend(None)


@pytest.mark.usefixtures("_default_backend")
def test_the_default_backend_is_that_of_a_model_compiled_without_one(graphs):
    loops = [Loop("no", how) for how in ("in place", "default backend")]
    named, default = (torch.tensor(loop.run(range(6))) for loop in loops)
    assert graphs() == 1, "of one backend: the second model runs what the first one compiled"
    assert torch.equal(default, named)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_loaded_state_continues_bit_for_bit(how, tmp_path: Path):
    whole = Loop("no", how)
    whole.run(range(10))
    assert (whole.schedule.step, whole.schedule.last_merge) == (5, 3), "within an interval"
    whole.accelerator.save_state(str(tmp_path))
    expected = whole.run(range(10, 14))
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = Loop("no", how)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.schedule.step == 5
    assert resumed.run(range(10, 14)) == expected
    assert resumed.schedule.last_merge == whole.schedule.last_merge == 6
    mine, theirs = (loop.accelerator.unwrap_model(loop.model) for loop in (resumed, whole))
    for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
