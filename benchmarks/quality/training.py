"""One run: train as `Settings` say, and the row of it.

The loop is the same for every method: equal batches at equal steps, one schedule, and nothing that
waits for the device between two validations.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import poetx_compile as poetx
from benchmarks.quality.corpora import Stored
from benchmarks.quality.methods import Trained, build, poetx_config
from benchmarks.quality.settings import Settings
from benchmarks.quality.spectra import Spectra
from benchmarks.rows import Row, environment
from llama import Llama
from pretraining.batches import TrainBatches, validation_batches, windows_at

VALIDATIONS = 5
"""How often the validation loss is taken after the start, evenly; the last time over more."""

POINTS = 50
"""Points of the curve of training losses."""

_PACKAGES = ("poetx_compile", "passes")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run runs.

    Args:
        device: cpu or cuda.
        stage: of `methods.build`.
        windows: validation windows: (between, at the end).
        models: folder of the weights that other runs start from; ``None`` where there are none.
    """

    device: torch.device
    stage: str = "inductor"
    windows: tuple[int, int] = (1024, 8192)
    models: Path | None = None


class Run:
    """A run in memory."""

    def __init__(self, settings: Settings, corpus: Stored, place: Place):
        self.settings, self.place = settings, place
        self.train = corpus.train.to(place.device)
        self.validation = corpus.validation.to(place.device)
        self.corpus = corpus
        self.autocast = place.device.type == "cuda" and settings.weights == "float32"
        # Nothing but the model draws from the global generators, so equal seeds start equal.
        torch.manual_seed(settings.seed)
        model = Llama(settings.shapes())
        if settings.before is not None:
            model.load_state_dict(torch.load(model_path(place, settings.before)))
        self.params = sum(p.numel() for p in model.parameters())
        model.to(place.device)
        for parameter in model.parameters():  # the rotary table stays fp32
            parameter.data = parameter.data.to(getattr(torch, settings.weights))
        self.trained: Trained = build(settings, model, place.stage)
        named = self.trained.model.named_parameters()
        learned = {name: p for name, p in named if p.requires_grad}
        self.learned = list(learned.values())
        self.rotations = [p for name, p in learned.items() if ".skew_" in name]
        self.spectra = Spectra(self.trained.model)
        self.losses = torch.full((settings.steps,), math.nan, device=place.device)
        self.validated: list[list[float]] = []
        self.first_step_s = self.validation_s = 0.0
        self.gradient_bytes = self.rotation_gradient_bytes = 0
        groups = self.trained.optimizer.param_groups
        self.peak_lr = {g.get("name", f"group{i}"): float(g["lr"]) for i, g in enumerate(groups)}

    def run(self) -> Row:
        """Train to the end, or until the loss is not finite; the row."""
        s, begun = self.settings, time.perf_counter()
        optimizer = self.trained.optimizer
        starts = batch_starts(s, self.train)
        stops = {round(s.steps * (i + 1) / VALIDATIONS) for i in range(VALIDATIONS)}
        self.spectra.take("start")
        self._validate(0)
        for step in range(s.steps):
            factor = lr_factor(s, step) * self.trained.rate(step)
            for group, peak in zip(optimizer.param_groups, self.peak_lr.values(), strict=True):
                group["lr"] = peak * factor
            first_s = time.perf_counter()
            loss = self._loss(*windows_at(self.train, starts[step], s.seq_len))
            loss.backward()
            self.trained.clip()
            optimizer.step()
            if step == 0:
                self.gradient_bytes = sum(_bytes(p.grad) for p in self.learned)
                self.rotation_gradient_bytes = sum(_bytes(p.grad) for p in self.rotations)
            optimizer.zero_grad(set_to_none=True)
            self.losses[step] = loss.detach()
            self.trained.after(step + 1, s.steps)
            if step == 0:
                self._wait()
                self.first_step_s = time.perf_counter() - first_s
            if step + 1 == s.steps // 2:
                self.spectra.take("middle")
            if step + 1 in stops:
                if not bool(self.losses[: step + 1].isfinite().all()):
                    break
                self._validate(step + 1)
        self.spectra.take("end")
        return self._row(time.perf_counter() - begun)

    def save(self, path: Path) -> None:
        """Write the plain weights, on the CPU, for runs that start from them."""
        state = {k: v.detach().float().cpu() for k, v in self.trained.plain().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """Validation loss of the plain module: a graph without gradients is not worth compiling."""
        begun, s = time.perf_counter(), self.settings
        windows = self.place.windows[step == s.steps]
        pairs = validation_batches(
            self.validation, s.seq_len, s.batch_size, max(1, windows // s.batch_size)
        )
        model = self.trained.model.eval()
        losses = [self._loss(*pair, forward=model) for pair in pairs]
        model.train()
        self.validated.append([step, float(torch.stack(losses).double().mean())])
        self.validation_s += time.perf_counter() - begun

    def _loss(self, tokens: Tensor, targets: Tensor, forward: Any = None) -> Tensor:
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.autocast):
            return (forward or self.trained.forward)(tokens, targets)

    def _plane_bytes(self) -> float | None:
        """Bytes a plane: of rotations, their gradients and their state."""
        if not self.rotations:
            return None
        state = sum(self.trained.state_bytes(p) for p in self.rotations)
        total = _distinct_bytes(self.rotations) + self.rotation_gradient_bytes + state
        return total / sum(p.numel() for p in self.rotations)

    def _wait(self) -> None:
        if self.place.device.type == "cuda":
            torch.cuda.synchronize(self.place.device)

    def _row(self, seconds: float) -> Row:
        s, device = self.settings, self.place.device
        losses = self.losses.tolist()
        finite = all(map(math.isfinite, losses))
        val_loss = self.validated[-1][1] if finite else None
        shapes = s.shapes()
        cuda = device.type == "cuda"
        return (
            environment(device, torch.bfloat16 if self.autocast else getattr(torch, s.weights))
            | {"poetx_compile": poetx.__version__, "sources": sources(), "run": s.run}
            | s.to_dict()
            | {
                "width": shapes.hidden_size,
                "layers": shapes.num_layers,
                "resolved": poetx_config(s).to_dict() if s.rotates else None,
                "peak_lr": self.peak_lr,
                "params": self.params,
                "trained": sum(p.numel() for p in self.learned),
                "trained_bytes": _distinct_bytes(self.learned),
                "gradient_bytes": self.gradient_bytes,
                "state_bytes": self.trained.state_bytes(),
                "planes": sum(p.numel() for p in self.rotations),
                "plane_bytes": self._plane_bytes(),
                "tokens": s.tokens,
                "val_loss": val_loss,
                "diverged": not finite,
                "merges": self.trained.merges(),
                "spike": spike(losses, s.warmup) if finite else None,
                "curve": curve(losses),
                "validation": [v for v in self.validated if math.isfinite(v[1])],
                "spectra": self.spectra.row() if finite else None,
                "seconds": seconds,
                "first_step_s": self.first_step_s,
                "validation_s": self.validation_s,
                "peak_mib": torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None,
                "corpus": self.corpus.fingerprint,
                "corpus_name": self.corpus.name,
                "corpus_bytes": [len(self.train), len(self.validation)],
                "validation_windows": self.place.windows[1],
                "stage": self.place.stage,
            }
        )


def model_path(place: Place, settings: Settings) -> Path:
    """Where the weights of a run are that others start from."""
    assert place.models is not None
    return place.models / f"{settings.run}.pt"


def batch_starts(settings: Settings, data: Tensor) -> Tensor:
    """Where the windows of all steps begin, int64 [steps, batch], on the device of `data`.

    It depends on the seed and the step alone; a run that continues another one goes on in the data.
    """
    done = 0
    before = settings.before
    while before is not None:
        done += before.steps * before.batch_size
        before = before.before
    batches = TrainBatches(data, settings.seq_len, settings.batch_size, settings.seed, done)
    return torch.tensor([batches.starts() for _ in range(settings.steps)], device=data.device)


def lr_factor(settings: Settings, step: int) -> float:
    """Share of the peak rate at `step`, from 0: linear warm-up, then a cosine to the floor."""
    s = settings
    warmup = min(s.warmup, s.steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, s.steps - 1 - warmup)
    return s.floor + (1 - s.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def curve(losses: list[float], points: int = POINTS) -> list[list[float]]:
    """[step, mean training loss since the last point] at evenly spaced steps, while finite."""
    ends = sorted({round(len(losses) * (i + 1) / points) for i in range(points)} - {0})
    out: list[list[float]] = []
    begin = 0
    for end in ends:
        mean = statistics.fmean(losses[begin:end])
        if not math.isfinite(mean):
            break
        out.append([end, round(mean, 5)])
        begin = end
    return out


def spike(losses: list[float], warmup: int, window: int = 20) -> float:
    """The largest rise of the loss above the mean of the `window` steps before, after warm-up."""
    first = max(window, min(warmup, len(losses) // 2))
    rises = [
        losses[i] - statistics.fmean(losses[i - window : i]) for i in range(first, len(losses))
    ]
    return max(rises, default=0.0)


def sources() -> str:
    """A hash of this package's sources: rows of different code are told apart."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _distinct_bytes(tensors: list[Any]) -> int:
    """Bytes of tensors, some of which may share their memory: rotations of the merged form do."""
    held: dict[int, int] = {}
    for tensor in tensors:
        held[tensor.data_ptr()] = max(_bytes(tensor), held.get(tensor.data_ptr(), 0))
    return sum(held.values())


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
