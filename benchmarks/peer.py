"""Another implementation of POET-X beside this one, where somebody has it and names its path.

The adapter knows the public interface of ``poet_torch`` (github.com/Sphere-AI-Lab/poet) and holds
none of its code. Without ``--peer`` nothing here imports it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gate
from benchmarks.options import Session

PACKAGE = "poet_torch"


class PeerError(RuntimeError):
    """The folder that was named holds no peer, or one with another interface."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """``--peer PATH``."""
    parser.add_argument(
        "--peer", type=Path, metavar="PATH", help=f"folder that holds {PACKAGE}, to compare with"
    )


class Peer:
    """The peer's public interface: ``POETLinear``, ``POETConfig``, ``POETModel``, its optimiser."""

    name = PACKAGE

    def __init__(self, package: Any):
        self.package = package
        names = ("POETLinear", "POETConfig", "POETModel", "get_poet_optimizer")
        missing = [name for name in names if not hasattr(package, name)]
        if missing:
            raise PeerError(f"{package.__file__} has no {', '.join(missing)}")

    def layer(
        self, session: Session, in_features: int, out_features: int, block_size: int, variant: str
    ) -> nn.Module:
        """A layer of the peer's, with a random weight and rotations that are not the identity."""
        module = self.package.POETLinear(
            in_features,
            out_features,
            block_size=block_size,
            device=session.device,
            dtype=session.dtype,
            mem_efficient_mode=variant == "mem",
        )
        with torch.no_grad():
            module.weight.copy_(session.normal(out_features, in_features) * in_features**-0.5)
        gate.random_skew_(module.oft_R, block_size, session.generator)
        return module

    def effective_weight(self, module: Any) -> Tensor:
        """The weight [out_features, in_features] that a layer applies."""
        return module.get_effective_weight()

    def model(
        self, model: nn.Module, block_size: int, variant: str, lr: float
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A model wrapped by the peer, and the peer's optimiser for it."""
        config = self.package.POETConfig(
            block_size=block_size,
            mem_efficient_mode=variant == "mem",
            base_lr=lr,
            poet_lr=lr * 64 / block_size,
        )
        wrapped = self.package.POETModel(model, config)
        return wrapped, self.package.get_poet_optimizer(wrapped, config)

    def merge(self, wrapped: Any) -> None:
        """Merge-then-reinitialise of all layers of a wrapped model."""
        wrapped.merge()


def load(folder: Path) -> Peer:
    """Import the peer from `folder`. Raises `PeerError` where it is not there."""
    folder = folder.resolve()
    if not (folder / PACKAGE / "__init__.py").is_file():
        raise PeerError(f"{folder} holds no package {PACKAGE}")
    sys.path.insert(0, str(folder))
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise PeerError(f"{PACKAGE} of {folder} cannot be imported: {error}") from error
    found = Path(str(package.__file__)).resolve()
    if folder not in found.parents:
        raise PeerError(f"{PACKAGE} was imported from {found} before, not from {folder}")
    return Peer(package)
