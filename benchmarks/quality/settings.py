"""`Settings` of one run, checked before anything runs, and the plans that expand into them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama import PRESETS, LlamaConfig

PLANS = Path(__file__).resolve().parent / "plans"

METHODS = {
    "dense": ("adamw", "muon", "scale"),
    "poetx": ("muon", "adamw"),
    "poet": ("adamw",),
    "variant": ("muon",),
    "lora": ("adamw",),
}
"""Method → its optimisers. ``"poet"`` is the original: weight-centric, moments reset at merges;
``"variant"`` has what the package lacks, simulated (`baselines.variant`)."""

HEAD_SIZE = 64


class PlanError(ValueError):
    """Settings that this checkout cannot run, found before anything runs."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run.

    Args:
        method, optimizer: of `METHODS`.
        lr: peak learning rate of what is not a rotation (of everything, where nothing rotates).
        poetx_lr: of the rotations; ``None``: the optimiser's own rule.
        block_size: b, or ``(in, out)``; of the methods that rotate.
        rank, restart: of ``"lora"``: r, and the steps between two merges (ReLoRA, arXiv
            2307.05695); ``None`` for no restarts.
        preset: shapes of `examples/llama.py`; `width` (a multiple of 64) and `layers` change them,
            the width with heads of 64 and three times as many units in the MLP.
        seed: of the weights, the data order and the permutations.
        steps, batch_size, seq_len: tokens are their product.
        warmup, floor: linear steps, then a cosine to this share of the peak.
        clip: largest norm of the gradients.
        weight_decay: of dense matrices.
        weights: ``"float32"`` (products in bf16 by autocast, on a GPU) or ``"bfloat16"``.
        gradients: dtype of the gradients of rotations, the same two.
        config: further fields of `POETXConfig`.
        options: further keyword arguments of the optimiser; ``"torch.…"`` is a dtype.
        start: settings of the run whose weights this one continues from; ``None``: from scratch.

    Raises:
        PlanError: a choice that does not exist, or does not belong to the method.
    """

    method: str = "poetx"
    optimizer: str = "muon"
    lr: float = 3e-3
    poetx_lr: float | None = None
    block_size: int | tuple[int, int] | None = None
    rank: int | None = None
    restart: int | None = None
    preset: str = "20m"
    width: int | None = None
    layers: int | None = None
    seed: int = 0
    steps: int = 2000
    batch_size: int = 64
    seq_len: int = 512
    warmup: int = 100
    floor: float = 0.01
    clip: float = 1.0
    weight_decay: float = 0.1
    weights: str = "float32"
    gradients: str = "float32"
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.block_size, list):
            object.__setattr__(self, "block_size", tuple(self.block_size))
        if self.method not in METHODS:
            raise PlanError(f"method {self.method!r}: use one of {', '.join(METHODS)}")
        if self.optimizer not in METHODS[self.method]:
            known = ", ".join(METHODS[self.method])
            raise PlanError(f"optimizer {self.optimizer!r} of {self.method}: use one of {known}")
        if self.preset not in PRESETS:
            raise PlanError(f"preset {self.preset!r}: use one of {', '.join(PRESETS)}")
        if self.width is not None and self.width % HEAD_SIZE:
            raise PlanError(f"width {self.width}: use a multiple of {HEAD_SIZE}")
        for field in ("weights", "gradients"):
            if (value := getattr(self, field)) not in ("float32", "bfloat16"):
                raise PlanError(f"{field} {value!r}: use float32 or bfloat16")
        if self.rotates != (self.block_size is not None):
            verb = "needs" if self.rotates else "has no"
            raise PlanError(f"{self.method} {verb} block_size")
        if self.method == "variant" and self.poetx_lr is None:
            raise PlanError("variant has no rule for its rotations' rate: give poetx_lr")
        if not self.rotates and (
            self.config or self.poetx_lr is not None or self.gradients != "float32"
        ):
            raise PlanError(
                f"{self.method} has no rotations: leave out config, poetx_lr and gradients"
            )
        if (self.method == "lora") != (self.rank is not None):
            raise PlanError("lora needs rank, and nothing else has one")

    @property
    def rotates(self) -> bool:
        return self.method in ("poetx", "poet", "variant")

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.seq_len

    @property
    def before(self) -> Settings | None:
        """The run that this one continues from."""
        return None if self.start is None else from_dict(self.start)

    @property
    def run(self) -> str:
        """The name of the run: a hash of all settings."""
        values = self.to_dict()
        if self.gradients == "float32":  # rows from before there was a choice keep their names
            del values["gradients"]
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def compiled_alike(self) -> str:
        """Equal where two runs compile the same graphs, as far as settings tell."""
        free = ("lr", "poetx_lr", "seed", "steps", "warmup", "floor", "clip", "weight_decay")
        values = {k: v for k, v in self.to_dict().items() if k not in (*free, "start", "options")}
        return json.dumps(values, sort_keys=True)

    def shapes(self) -> LlamaConfig:
        """The shapes of the model."""
        shapes = dict(PRESETS[self.preset])
        if self.width is not None:
            shapes["hidden_size"] = self.width
            shapes["intermediate_size"] = 3 * self.width
            shapes["num_heads"] = self.width // HEAD_SIZE
        if self.layers is not None:
            shapes["num_layers"] = self.layers
        return LlamaConfig(**shapes, max_seq_len=self.seq_len)

    def cost(self) -> float:
        """About the FLOPs of the run: 6 × tokens × weights, and attention's share."""
        s = self.shapes()
        layer = s.hidden_size * (4 * s.hidden_size + 3 * s.intermediate_size)
        attention = 2 * self.seq_len * s.hidden_size
        return 6.0 * self.tokens * s.num_layers * (layer + attention)

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def from_dict(values: dict[str, Any]) -> Settings:
    """Settings of a dict; one that is unknown raises `PlanError`."""
    known = {field.name for field in dataclasses.fields(Settings)}
    if unknown := sorted(set(values) - known):
        raise PlanError(
            f"unknown setting(s) {', '.join(unknown)}: use {', '.join(sorted(known))}; fields of "
            'POETXConfig go into "config", keywords of the optimiser into "options"'
        )
    return Settings(**values)


def load(name: str) -> list[Settings]:
    """The runs of a plan: the name of one in `plans/`, or the path of a JSON file.

    A plan is ``{"about": …, "base": {…}, "runs": [{…, "grid": {…}}, …]}``. Each entry of ``runs``
    is the base with what the entry changes, once for every combination of the grid's values;
    ``"config.redraw_interval"`` in a grid or an entry is that field of the nested dict.
    """
    path = Path(name) if name.endswith(".json") else PLANS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PLANS.glob("*.json")))
        raise PlanError(f"there is no plan {path}: use one of {known}, or the path of a .json file")
    return expand(json.loads(path.read_text(encoding="utf-8")))


def expand(plan: dict[str, Any]) -> list[Settings]:
    """The runs of a plan, each once, in the plan's order."""
    if unknown := sorted(set(plan) - {"about", "base", "runs"}):
        raise PlanError(f"a plan has about, base and runs, and not {', '.join(unknown)}")
    found: dict[str, Settings] = {}
    for entry in plan["runs"]:
        for values in combinations(entry):
            settings = from_dict(nested(plan.get("base", {}) | values))
            found.setdefault(settings.run, settings)
    return list(found.values())


def combinations(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An entry once for each combination of the values of its ``"grid"``.

    ``"lr,poetx_lr": [[1e-3, 2e-3], …]`` are settings that change together.
    """
    grid = entry.get("grid", {})
    fixed = {key: value for key, value in entry.items() if key != "grid"}
    for values in itertools.product(*grid.values()):
        chosen: dict[str, Any] = {}
        for key, value in zip(grid, values, strict=True):
            names = key.split(",")
            chosen |= dict(zip(names, value if len(names) > 1 else [value], strict=True))
        yield fixed | chosen


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """``{"config.seed": 1}`` as ``{"config": {"seed": 1}}``."""
    out: dict[str, Any] = {k: v for k, v in flat.items() if "." not in k}
    for key, value in flat.items():
        outer, dot, inner = key.partition(".")
        if dot:
            out[outer] = {**out.get(outer, {}), inner: value}
    return out
