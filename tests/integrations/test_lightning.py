"""Lightning's Trainer and Fabric: the same run as a plain loop, and one that is resumed."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import poetx_compile as poetx
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers.models import TinyLM
from tests.helpers.tolerances import relative_error, tolerance

CONFIG = poetx.POETXConfig(block_size=8, merge_interval=3)
COMPILED: dict[str, Any] = {"backend": poetx.poetx_backend, "options": {"stage": "eager"}}
STEPS, ACCUMULATED, EPOCHS = 8, 2, 2


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)


def prepared() -> TinyLM:
    torch.manual_seed(0)
    model = TinyLM(layers=1)
    poetx.prepare(model, CONFIG)
    return model


def epoch() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    count = STEPS * ACCUMULATED // EPOCHS
    return list(torch.randint(0, 24, (count, 3, 7), generator=generator))


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


class Language(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = prepared()
        self.model.compile(**COMPILED)
        self.losses: list[Tensor] = []

    def training_step(self, tokens: Tensor) -> Tensor:
        loss = loss_of(self.model, tokens)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = poetx.POETXMuon(self.model, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def plain_loop() -> tuple[Tensor, TinyLM]:
    model = prepared()
    optimizer = poetx.POETXMuon(model, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    losses = []
    for at, tokens in enumerate(epoch() * EPOCHS, 1):
        loss = loss_of(model, tokens)
        (loss / ACCUMULATED).backward()
        losses.append(loss.detach())
        if at % ACCUMULATED == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return torch.stack(losses), model


def fit(folder: Path, resume: Path | None = None) -> tuple[Language, Any]:
    saving = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=STEPS // EPOCHS, save_top_k=-1
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=0.5,
        default_root_dir=folder,
        logger=False,
        callbacks=[saving],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Language()
    loader = torch.utils.data.DataLoader(epoch(), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=resume)
    return module, trainer


def test_the_trainer_is_a_plain_loop_and_resumes(tmp_path, graphs):
    whole, trainer = fit(tmp_path / "whole")
    assert graphs() == 1
    expected, model = plain_loop()
    assert relative_error(torch.stack(whole.losses), expected) < tolerance(torch.float32)
    schedule = trainer.optimizers[0].schedule
    assert (schedule.step, schedule.merges) == (STEPS, 2)
    for (name, _, mine), (_, _, theirs) in zip(
        prepared_linears(whole.model), prepared_linears(model), strict=True
    ):
        assert relative_error(mine.skew_in, theirs.skew_in) < tolerance(torch.float32), name

    resumed, _ = fit(tmp_path / "resumed", tmp_path / "whole" / "step=4.ckpt")
    assert len(resumed.losses) == len(whole.losses) // EPOCHS
    for (name, a), b in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_fabric(graphs):
    fabric = lightning.Fabric(accelerator="cpu")
    model = prepared()
    optimizer = poetx.POETXMuon(model, lr=1e-2)
    wrapped, wrapped_optimizer = fabric.setup(torch.compile(model, **COMPILED), optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    losses = []
    for at, tokens in enumerate(epoch() * EPOCHS, 1):
        loss = loss_of(wrapped, tokens)
        fabric.backward(loss / ACCUMULATED)
        losses.append(loss.detach())
        if at % ACCUMULATED == 0:
            fabric.clip_gradients(wrapped, wrapped_optimizer, max_norm=0.5)
            wrapped_optimizer.step()
            scheduler.step()
            wrapped_optimizer.zero_grad()
    assert graphs() == 1
    assert relative_error(torch.stack(losses), plain_loop()[0]) < tolerance(torch.float32)
    assert optimizer.schedule.merges == 2
