"""`estimate`: the memory that training takes, before there is a GPU to train on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poetx_compile.compile.options import BackendOptions, without_adoption
from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError, EstimateError
from poetx_compile.inspect.memory import inputs as example
from poetx_compile.inspect.memory import meta, parts
from poetx_compile.inspect.memory.liveness import Longer, StepMemory, step_memory, with_more_layers
from poetx_compile.inspect.memory.source import model_on_meta
from poetx_compile.inspect.memory.trace import trace
from poetx_compile.layers.parametrization import trained_parameters
from poetx_compile.layers.prepare import config_of
from poetx_compile.layers.tables import format_table

MIB = 2**20

_FEW = 2
"""Of a run of equal layers so many are traced, then one more: the difference is one layer's."""


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One way to train the model; all sizes in bytes.

    Attributes:
        method: ``"nn.Linear"``, or ``"POET-X fast"`` and the like.
        optimizer: name of its class.
        trained: number of trained parameters.
        weights: parameters, trained or frozen, and buffers.
        gradients: of the trained parameters.
        optimizer_state: moments and step counters.
        activations: what the forward keeps for the backward.
        peak: the most that is allocated at any time of a step.
        peak_in: ``"forward"``, ``"backward"`` or ``"optimizer step"``.
    """

    method: str
    optimizer: str
    trained: int
    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    peak: int
    peak_in: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What `estimate` found; prints as a table in MiB.

    Attributes:
        model: name of the model's class.
        inputs: shapes and dtypes of the example inputs.
        rows: plain AdamW first, then a row for each variant.
        traced: how the activations were found: the whole model, or fewer layers of it.
        config: the configuration of POET-X.
    """

    model: str
    inputs: tuple[str, ...]
    rows: tuple[MemoryRow, ...]
    traced: str
    config: POETXConfig

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, sizes in bytes."""
        return dataclasses.asdict(self) | {"config": self.config.to_dict()}

    def __str__(self) -> str:
        header = ("MiB", *(row.method for row in self.rows))
        sizes = ("weights", "gradients", "optimizer_state", "activations", "peak")
        cells = [("optimizer", *(row.optimizer for row in self.rows))]
        for name in sizes:
            values = (f"{getattr(row, name) / MIB:,.0f}" for row in self.rows)
            cells.append((name.replace("_", " "), *values))
        cells.append(("peak in", *(row.peak_in for row in self.rows)))
        dense = self.rows[0].peak
        cells.append(("peak / dense", *(f"{row.peak / dense:.2f}" for row in self.rows)))
        cells.append(("trained", *(f"{row.trained:,}" for row in self.rows)))
        block = self.config.block_size
        return "\n".join(
            [
                f"{self.model}, {', '.join(self.inputs)}, block size {block}",
                format_table(header, cells, right=range(1, len(header))),
                f"activations: {self.traced}",
            ]
        )


def estimate(
    model: Any,
    *inputs: Any,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    optimizer: str = "adamw",
    config: POETXConfig | None = None,
    shared: Sequence[Sequence[str]] = (),
    variants: Sequence[str] = ("fast", "mem"),
    loss: example.Loss | None = None,
    options: dict[str, Any] | None = None,
    whole: bool = False,
    **kwargs: Any,
) -> Estimate:
    """The bytes of weights, gradients, optimiser state and activations, and the peak of a step.

    For dense training with AdamW and for POET-X beside it, on one CUDA GPU, compiled. No GPU is
    needed and nothing is allocated: the model is copied to the meta device, and what a step keeps
    is counted on the graphs that `torch.compile` would run (see `poetx_compile.inspect.memory`).
    Long runs of equal layers are traced with two and with three layers, and the rest follows.

    Where no inputs are given they are token ids [batch_size, sequence_length] (and labels, where
    the forward takes them), or the images of a Hugging Face model. The loss is what the model
    returns; for logits of token ids their cross-entropy in fp32, otherwise the mean square of the
    output. It is compiled together with the model: one that is computed eagerly keeps more.

    What is not counted: the CUDA context (about 0.5 GiB, which ``max_memory_allocated`` leaves out
    as well), the allocator's fragmentation, workspaces of libraries, communication buffers.

    Args:
        model: an `nn.Module`, prepared or not, on any device; a Hugging Face configuration
            (`transformers` builds the model); or the path of a ``config.json``.
        inputs, kwargs: arguments of the forward; their values do not matter.
        batch_size: default 1, for inputs that are made here.
        sequence_length: default 1024.
        dtype: the model is converted to it; default: as it is (a configuration: as it says, or
            fp32).
        autocast: dtype of the autocast region around the forward, if there is one.
        optimizer: ``"adamw"`` (`POETXAdamW`) or ``"muon"`` (`POETXMuon`), for the rows of POET-X.
        config: of POET-X; of a prepared model its own. `variant` is taken from `variants`.
        shared: as for `prepare`.
        variants: one row each.
        loss: what the model returns → a scalar.
        options: of `poetx_backend`.
        whole: trace every layer, which takes longer.

    Returns:
        An `Estimate`; print it, or read ``rows`` and ``to_dict()``.

    Raises:
        ConfigError: an argument out of range, or no model.
        EstimateError: the model cannot be traced, or transformers cannot build it.
        NothingToTrainError: no `nn.Linear` is eligible.
    """
    if optimizer not in parts.OPTIMIZERS:
        raise ConfigError(
            f"optimizer = {optimizer!r} is not allowed: use one of {parts.OPTIMIZERS}"
        )
    given = bool(inputs or kwargs)
    example.check_sizes(batch_size, sequence_length, given)
    plain = model_on_meta(model)
    if dtype is not None:
        plain.to(dtype)
    config = config_of(plain) or config or POETXConfig()
    if given:
        inputs, kwargs = example.on_meta((inputs, kwargs))
    else:
        inputs, kwargs = example.make_inputs(plain, batch_size or 1, sequence_length or 1024)
    trained = plain if config_of(plain) else meta.prepared(plain, config, shared)
    step = _Step(inputs, kwargs, loss, autocast, whole)
    rows = _rows(["nn.Linear"], "AdamW", "adamw", meta.unprepared(plain), step, [None])
    chosen = [_with_variant(config, variant) for variant in variants]
    parsed = [_options(one, options or {}) for one in chosen]
    methods = [f"POET-X {_described_choice(one)}" for one in chosen]
    name = {"adamw": "POETXAdamW", "muon": "POETXMuon"}[optimizer]
    rows += _rows(methods, name, optimizer, trained, step, parsed)
    described = tuple(map(_described, example.tensors(inputs, kwargs)))
    return Estimate(type(plain).__name__, described, tuple(rows), step.traced, config)


@dataclasses.dataclass
class _Step:
    """A step of training apart from the model: what it is called with, and how it is traced."""

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: example.Loss | None
    autocast: torch.dtype | None
    whole: bool
    traced: str = ""

    def memory(
        self, model: nn.Module, choices: Sequence[BackendOptions | None]
    ) -> list[StepMemory]:
        """That of the whole model, from a few layers where it has long runs of equal ones."""
        # A budget is met layer by layer: few of them say nothing of many.
        budget = any(one is not None and one.config.get("memory_budget") for one in choices)
        runs = [] if self.whole or budget else meta.runs_of_layers(model)
        if runs:
            try:
                found = self._from_few(model, runs, choices)
            except EstimateError:  # a forward that counts its layers: trace all of them
                runs = []
        if not runs:
            found = self._of(model, choices)
        few = [f"{run.name}: {_FEW} and {_FEW + 1} of {run.count} equal layers" for run in runs]
        self.traced = f"traced with {', '.join(few)}" if few else "traced with every layer"
        return found

    def _from_few(
        self, model: nn.Module, runs: list[meta.Run], choices: Sequence[BackendOptions | None]
    ) -> list[StepMemory]:
        counts = dict.fromkeys(runs, _FEW)
        few = self._of(meta.shortened(model, counts), choices)
        longer = [
            self._of(meta.shortened(model, counts | {run: _FEW + 1}), choices) for run in runs
        ]
        grown = []
        for options, step, *steps in zip(choices, few, *longer, strict=True):
            parts_of = zip(runs, steps, strict=True)
            of_runs = [Longer(s, r.count - _FEW, _filling(model, r, options)) for r, s in parts_of]
            grown.append(with_more_layers(step, of_runs))
        return grown

    def _of(self, model: nn.Module, choices: Sequence[BackendOptions | None]) -> list[StepMemory]:
        step = example.TrainingStep(model, self.loss, self.autocast)
        return [step_memory(graphs) for graphs in trace(step, self.inputs, self.kwargs, choices)]


def _filling(model: nn.Module, run: meta.Run, options: BackendOptions | None) -> float:
    """How many layers beyond the few fill the batch of rotations that these have begun."""
    layer = model.get_submodule(f"{run.name}.{run.start}")
    rotations = parts.rotations(layer)
    if options is None or not rotations:
        return 0
    return max(0.0, options.cayley_batch_bytes / rotations - _FEW)


def _rows(
    methods: Sequence[str],
    name: str,
    optimizer: str,
    model: nn.Module,
    step: _Step,
    choices: Sequence[BackendOptions | None],
) -> list[MemoryRow]:
    weights = parts.weights(model)
    state = parts.optimizer_state(model, optimizer)
    trained = sum(p.numel() for p in trained_parameters(model))
    batch = sum(t.nbytes for t in example.tensors(step.inputs, step.kwargs))
    rows = []
    for method, found in zip(methods, step.memory(model, choices), strict=True):
        peaks = {
            "forward": found.forward,
            "backward": max(found.backward),
            "optimizer step": found.gradients + parts.step(model, optimizer),
        }
        peak_in = max(peaks, key=peaks.__getitem__)
        peak = weights + state + batch + peaks[peak_in]
        rows.append(
            MemoryRow(
                method=method,
                optimizer=name,
                trained=trained,
                weights=weights,
                gradients=found.gradients,
                optimizer_state=state,
                activations=found.kept,
                peak=peak,
                peak_in=peak_in,
            )
        )
    return rows


def _with_variant(config: POETXConfig, variant: str) -> POETXConfig:
    budget = None if variant == "mem" else config.memory_budget
    return dataclasses.replace(config, variant=variant, memory_budget=budget)


def _described_choice(config: POETXConfig) -> str:
    budget = "" if config.memory_budget is None else f", budget {config.memory_budget:g}"
    return config.variant + budget


def _options(config: POETXConfig, given: dict[str, Any]) -> BackendOptions:
    fields = {field.name for field in dataclasses.fields(POETXConfig)}
    if doubled := sorted(fields & given.keys()):
        raise ConfigError(
            f"options {', '.join(doubled)} are fields of POETXConfig: give config=..."
        )
    return BackendOptions.parse(None, config.to_dict() | without_adoption(given))


def _described(tensor: Tensor) -> str:
    shape = " x ".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} [{shape}]"
