"""The peer: another implementation beside ours, held to the same gate."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import (
    gate,
    layers,
    peer,
    step_worker,
)
from tests.helpers.benchmarks import FAST, small_machine


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    small_machine(monkeypatch)


PEER = '''
import torch

class POETLinear(torch.nn.Module):
    """The interface of a peer's layer over one rotation of the inputs."""

    def __init__(self, m, n, block_size=256, device=None, dtype=None, mem_efficient_mode=False):
        super().__init__()
        self.b = block_size
        self.weight = torch.nn.Parameter(torch.empty(n, m, dtype=dtype), requires_grad=False)
        blocks = (m + n) // block_size
        size = block_size * (block_size - 1) // 2
        self.oft_R = torch.nn.Parameter(torch.zeros(blocks, size, dtype=dtype))

    def get_effective_weight(self):
        return self.weight * (1 + self.oft_R.sum()) * {factor}

    def forward(self, x):
        return x @ (self.weight * (1 + self.oft_R.sum())).T

class POETConfig:
    def __init__(self, block_size, mem_efficient_mode, base_lr, poet_lr):
        self.lr = base_lr

class POETModel(torch.nn.Module):
    def __init__(self, model, config):
        super().__init__()
        self.base_model, self.merges = model, 0

    def forward(self, *args):
        return self.base_model(*args)

    def merge(self):
        self.merges += 1

def get_poet_optimizer(model, config):
    return torch.optim.AdamW(model.parameters(), lr=config.lr)
'''


@pytest.fixture
def peer_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "peer"
    (folder / peer.PACKAGE).mkdir(parents=True)
    (folder / peer.PACKAGE / "__init__.py").write_text(PEER.replace("{factor}", "1"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    sys.modules.pop(peer.PACKAGE, None)


LAYERS_WITH_PEER = (
    *("--device", "cpu", "--shapes", "16x8", "--tokens", "4", "--block-sizes", "8"),
    *("--variants", "mem", "--permutations", "random", "--stage", "aot_eager", *FAST),
)


def test_a_peer_runs_beside_a_layer(peer_folder: Path, tmp_path: Path) -> None:
    arguments = [*LAYERS_WITH_PEER, "--output", str(tmp_path)]
    assert len(layers.main(arguments)) == 1
    assert peer.PACKAGE not in sys.modules
    ours, theirs = layers.main([*arguments, "--peer", str(peer_folder)])
    assert ours["formulation"] == "auto"
    assert theirs["formulation"] == peer.PACKAGE
    assert theirs["ms"] > 0
    assert theirs["output_error"] < 1e-5


def test_a_peer_passes_the_gate_too(peer_folder: Path, tmp_path: Path) -> None:
    code = peer_folder / peer.PACKAGE / "__init__.py"
    code.write_text(PEER.replace("{factor}", "1.01"))
    with pytest.raises(gate.GateError, match="output: relative error"):
        layers.main([*LAYERS_WITH_PEER, "--output", str(tmp_path), "--peer", str(peer_folder)])


def test_a_peer_trains_a_model(peer_folder: Path) -> None:
    case = step_worker.StepCase(
        method="peer", preset="tiny", vocabulary=8, batch=1, length=4, device="cpu",
        dtype="float32", stage="eager", warmup=0, steps=1, rounds=1, lr=1e-3,
        peer=str(peer_folder),
    )  # fmt: skip
    row = step_worker.run(case)
    assert row["merge_ms"] > 0
    assert row["peer"] == peer.PACKAGE
    assert row["last_loss"] < row["first_loss"]


def test_a_folder_without_a_peer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(peer.PeerError, match="holds no package poet_torch"):
        peer.load(tmp_path)


def test_a_peer_with_another_interface_is_refused(peer_folder: Path) -> None:
    (peer_folder / peer.PACKAGE / "__init__.py").write_text("class POETLinear: ...\n")
    with pytest.raises(peer.PeerError, match="has no POETConfig, POETModel, get_poet_optimizer"):
        peer.load(peer_folder)
