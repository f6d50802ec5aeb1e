"""The reference implementation (github.com/Sphere-AI-Lab/poet) beside this package, step by step.

Both train one tiny model with Adam, from the same weights, on the same batches. None of its code is
here: it is imported from the path that is named. What it is known to do otherwise is put right from
outside, and so is no part of the difference:

- it runs in fp32 or fp64, without its Triton kernels, which multiply in TF32 and not on a CPU; its
  fallback has 2Q⁴ where the kernels have Q⁴, and gets their polynomial;
- its permutations are not in the weights at wrapping, and come from the global generator: it gets
  ours, at the start and after each merge. The weights that it has merged stay its own;
- its moments are reset a step too early where steps count from 0: here they count from 1;
- its ``eps`` is outside of the bias correction: 1e-15 on both sides.
"""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from benchmarks import peer
from benchmarks.quality.page import ROOT
from llama import PRESETS, Llama, LlamaConfig
from poetx_compile.layers.prepared import equivalence_of
from pretraining.batches import TrainBatches, windows_at
from pretraining.failure import RunError

BATCH, LENGTH, BETAS, EPS = 8, 64, (0.9, 0.999), 1e-15
LR, POETX_LR = 2e-3, 1e-3


@torch.compiler.set_stance("force_eager")
def compare(path: Path, steps: int, interval: int, b: int, seed: int, dtype: str) -> int:
    """Train both, print both losses and their largest relative difference; 0.

    Raises:
        RunError: `path` holds no reference implementation that can be imported.
    """
    package = _imported(path)
    torch.manual_seed(seed)
    shapes = LlamaConfig(**PRESETS["tiny"], max_seq_len=LENGTH)
    ours = Llama(shapes).to(getattr(torch, dtype))
    with _quiet():
        config = package.POETConfig(block_size=b, merge_interval=interval, poet_scale=1.0)
        config.base_lr, config.poet_lr = LR, POETX_LR
        theirs = package.POETModel(copy.deepcopy(ours), config)
        their_optimizer = package.get_poet_optimizer(theirs, config)
    for group in their_optimizer.param_groups:
        group |= {"betas": BETAS, "eps": EPS}
    own: dict[str, Any] = {"merge_interval": interval, "redraw_interval": interval, "seed": seed}
    own |= {"moments": "reset", "merge_rotation": "plain", "max_angle": None, "init": "rows"}
    poetx.prepare(ours, poetx.POETXConfig(block_size=b, permutation="random", **own))
    optimizer = poetx.POETXAdamW(ours, LR, POETX_LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    _rearrange(theirs, ours)

    found: list[tuple[float, float]] = []
    for step, (tokens, targets) in enumerate(_batches(steps, seed), 1):
        losses = ours(tokens, targets), theirs(tokens, targets)
        for loss, each in zip(losses, (optimizer, their_optimizer), strict=True):
            loss.backward()
            each.step()
            each.zero_grad()
        if theirs.merge_if_needed(step):
            _rearrange(theirs, ours)
        found.append((losses[0].item(), losses[1].item()))
        if step == 1 or step % interval == 0:
            print(f"step {step:5d}: ours {found[-1][0]:.7f}, the reference {found[-1][1]:.7f}")
    largest = max(abs(a - b) / b for a, b in found)
    print(f"{dtype}: largest relative difference {largest:.1e}, {optimizer.schedule.merges} merges")
    return 0


@torch.no_grad()
def _rearrange(theirs: nn.Module, ours: nn.Module) -> None:
    """Give the layers of the reference our permutations, and their weights in that order.

    Its rotations are the identity. At wrapping its weights are in their natural order.
    """
    for name, layer in ours.named_modules():
        if (e := equivalence_of(layer)) is None:
            continue
        other: Any = theirs.get_submodule(f"base_model.{name}")
        arranged = hasattr(other, "arranged")
        natural = other.get_effective_weight() if arranged else other.weight.clone()
        other.arranged = True
        (inner, inner_back), (outer, outer_back) = e.perm_in.pair, e.perm_out.pair
        other.weight.copy_(natural[outer][:, inner])
        other.perm_in.copy_(inner_back)
        other.perm_in_inv.copy_(inner)
        other.perm_out.copy_(outer_back)
        other.perm_out_inv.copy_(outer)


def _batches(steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of the sources of this package."""
    text = b"".join(file.read_bytes() for file in sorted((ROOT / "poetx_compile").rglob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    batches = TrainBatches(data, LENGTH, BATCH, seed, 0)
    for _ in range(steps):
        yield windows_at(data, torch.tensor(batches.starts()), LENGTH)


def _imported(path: Path) -> Any:
    """The package of a checkout or a git directory, without Triton."""
    if not (path / peer.PACKAGE).is_dir():
        archive = ["git", f"--git-dir={path}", "archive", "HEAD", peer.PACKAGE]
        made = subprocess.run(archive, capture_output=True, check=False)
        if made.returncode:
            raise RunError(f"{path} holds no {peer.PACKAGE}, neither as files nor in git")
        path = Path(tempfile.mkdtemp(prefix="reference-"))
        with tarfile.open(fileobj=io.BytesIO(made.stdout)) as files:
            files.extractall(path, filter="data")
    hidden = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "triton"}
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        with _quiet():
            package = peer.load(path).package
    except peer.PeerError as error:
        raise RunError(str(error)) from error
    finally:
        del sys.modules["triton"]
        sys.modules.update(hidden)
    package.core.ops._cayley_transform_pytorch = _polynomial
    return package


def _polynomial(q: Tensor) -> Tensor:
    """(I+Q)(I+Q+Q²+Q³), which the kernels of the reference compute."""
    eye, q2 = torch.eye(q.shape[-1], dtype=q.dtype), q @ q
    return (eye + q) @ (eye + q + q2 + q2 @ q)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
