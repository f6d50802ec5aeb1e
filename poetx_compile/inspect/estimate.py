"""`estimate`: the memory that training takes, before there is a GPU to train on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poetx_compile.compile import collector
from poetx_compile.compile.options import BackendOptions, without_adoption
from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError, EstimateError
from poetx_compile.inspect.memory import inputs as example
from poetx_compile.inspect.memory import meta, parts
from poetx_compile.inspect.memory.fit import Peak, parse_memory, with_budget
from poetx_compile.inspect.memory.rows import Estimate, MemoryRow, judged
from poetx_compile.inspect.memory.source import checkpoint_layers, model_on_meta
from poetx_compile.inspect.memory.step import Longer, StepMemory, step_memory
from poetx_compile.inspect.memory.trace import trace
from poetx_compile.layers.prepare import config_of
from poetx_compile.layers.prepared import trained_parameters
from poetx_compile.optim.momentum import parse_dtype

MIB = 2**20

TRACED = 2
"""Of a run of equal layers so many are traced."""

Progress = Callable[[str], None]


def estimate(
    model: Any,
    *inputs: Any,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    optimizer: str = "muon",
    momentum_dtype: torch.dtype | str = torch.float32,
    gradient_dtype: torch.dtype | str = torch.float32,
    compiled: str = "model",
    config: POETXConfig | None = None,
    shared: Sequence[Sequence[str]] = (),
    variants: Sequence[str] = ("fast", "mem"),
    loss: example.Loss | None = None,
    options: dict[str, Any] | None = None,
    whole: bool = False,
    gpu_memory: int | str | None = None,
    checkpointing: bool = False,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Estimate:
    """The bytes of weights, gradients, optimiser state and activations, and the peak of a step.

    For dense training with AdamW and for POET-X beside it, on one CUDA GPU, compiled. No GPU is
    needed and nothing is allocated: the model is copied to the meta device, and what a step keeps
    is counted on the graphs that `torch.compile` would run (see `poetx_compile.inspect.memory`).
    Long runs of equal layers are traced with few layers, and the rest follows. There
    a `memory_budget` is not traced: it lies between ``fast`` and ``mem`` by what is kept.

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
        optimizer: ``"muon"`` (`POETXMuon`) or ``"adamw"`` (`POETXAdamW`), for the rows of POET-X.
        momentum_dtype: of `POETXMuon`.
        gradient_dtype: of the rotations, which is `Tensor.grad_dtype` of the skew parameters. They
            are rounded where a graph hands them over.
        compiled: what `torch.compile` was given: ``"model"``, or ``"layers"`` where each of the
            equal layers is compiled by itself, which hands its gradients over one by one and
            builds its own rotations.
        config: of POET-X; of a prepared model its own. `variant` is taken from `variants`.
        shared: as for `prepare`.
        variants: one row each.
        loss: what the model returns → a scalar.
        options: of `poetx_backend`.
        whole: trace every layer, which takes longer.
        gpu_memory: of the GPU, such as ``"80GB"`` or a number of bytes: the result says whether it
            fits, the largest batch that does, and what is needed for the one that was asked for.
        checkpointing: activation checkpointing of every layer, for a model of transformers.
        progress: called with a line before each trace.

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
    if compiled not in ("model", "layers"):
        raise ConfigError(f"compiled = {compiled!r} is not allowed: use 'model' or 'layers'")
    momentum, gradient = parse_dtype(momentum_dtype), _gradient_dtype(gradient_dtype)
    memory = None if gpu_memory is None else parse_memory(gpu_memory)
    given = bool(inputs or kwargs)
    example.check_sizes(batch_size, sequence_length, given)
    plain = model_on_meta(model)
    if dtype is not None:
        plain.to(dtype)
    if checkpointing:
        checkpoint_layers(plain)
    config = config_of(plain) or config or POETXConfig()
    batch, length = batch_size or 1, sequence_length or 1024
    if given:
        inputs, kwargs = example.on_meta((inputs, kwargs))
    else:
        inputs, kwargs = example.make_inputs(plain, batch, length)
    trained = plain if config_of(plain) else meta.prepared(plain, config, shared)
    step = _Step(
        inputs, kwargs, loss, autocast, whole, compiled == "layers", gradient, progress or _silent
    )
    chosen = [_with_variant(config, variant) for variant in variants]
    parsed = [_options(one, options or {}) for one in chosen]
    dense = meta.unprepared(plain)
    peaks = [
        *step.peaks("nn.Linear", dense, "adamw", [None]),
        *step.peaks("POET-X", trained, optimizer, parsed, momentum),
    ]
    name = {"adamw": "POETXAdamW", "muon": "POETXMuon"}[optimizer]
    methods = ["nn.Linear", *(f"POET-X {_described_choice(one)}" for one in chosen)]
    counts = [sum(p.numel() for p in trained_parameters(m)) for m in (dense, trained)]
    rows = [
        MemoryRow(
            method=method,
            optimizer=name if number else "AdamW",
            trained=counts[bool(number)],
            weights=parts.weights(trained if number else dense),
            gradients=peak.step.gradients,
            optimizer_state=peak.constant - parts.weights(trained if number else dense),
            activations=peak.step.kept,
            peak=peak.total,
            peak_in=peak.where,
        )
        for number, (method, peak) in enumerate(zip(methods, peaks, strict=True))
    ]
    described = tuple(map(_described, example.tensors(inputs, kwargs)))
    found = Estimate(type(plain).__name__, described, tuple(rows), step.traced, config, memory)
    if memory is None:
        return found

    def at(size: int) -> list[Peak]:
        args, kwargs = example.make_inputs(plain, size, length)
        other = dataclasses.replace(step, inputs=args, kwargs=kwargs)
        return other.peaks(f"POET-X, batch {size}", trained, optimizer, parsed, momentum)

    return judged(found, peaks, None if given else batch, at, checkpointing)


def _silent(_: str) -> None:
    pass


def _gradient_dtype(value: torch.dtype | str) -> torch.dtype:
    """A dtype that rotations may have their gradients in."""
    allowed = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
    name = str(value) if isinstance(value, torch.dtype) else f"torch.{value}"
    if name not in allowed:
        raise ConfigError(
            f"gradient_dtype = {value!r} is not allowed: use one of {', '.join(allowed)}"
        )
    return allowed[name]


@dataclasses.dataclass
class _Step:
    """A step of training apart from the model: what it is called with, and how it is traced."""

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: example.Loss | None
    autocast: torch.dtype | None
    whole: bool
    apart: bool = False
    gradient: torch.dtype = torch.float32
    progress: Progress = _silent
    traced: str = ""

    def peaks(
        self,
        name: str,
        model: nn.Module,
        optimizer: str,
        choices: Sequence[BackendOptions | None],
        momentum: torch.dtype = torch.float32,
    ) -> list[Peak]:
        """What training the whole model takes, for each choice."""
        constant = parts.weights(model) + parts.optimizer_state(model, optimizer, momentum)
        batch = sum(t.nbytes for t in example.tensors(self.inputs, self.kwargs))
        narrow = not momentum == self.gradient == torch.float32
        update = parts.step(model, optimizer, narrow)

        def of(choices: Sequence[BackendOptions | None]) -> list[Peak]:
            found = self.memory(model, choices, name)
            rounded = parts.rounded_off(model, self.gradient)
            return [
                Peak(
                    constant, batch, update, dataclasses.replace(m, gradients=m.gradients - rounded)
                )
                for m in found
            ]

        budgets = [_budget(one) for one in choices]
        if self.whole or not any(budgets) or not meta.runs_of_layers(model):
            return of(choices)
        # A budget is met over all layers, which few of them do not tell: between fast and mem.
        ends = [_of_variant(choices[budgets.index(max(budgets))], v) for v in ("fast", "mem")]
        rest = [one for one, budget in zip(choices, budgets, strict=True) if not budget]
        fast, mem, *found = of([*ends, *rest])
        return [with_budget(fast, mem, f) if f else found.pop(0) for f in budgets]

    def memory(
        self, model: nn.Module, choices: Sequence[BackendOptions | None], name: str = ""
    ) -> list[StepMemory]:
        """That of the whole model, from a few layers where it has long runs of equal ones."""
        runs = [] if self.whole else meta.runs_of_layers(model)
        if runs:
            try:
                found = self._from_few(model, runs, choices, name)
            except EstimateError:  # a forward that counts its layers: trace all of them
                runs = []
        if not runs:
            self.progress(f"tracing {name}: every layer")
            found = self._of(model, choices)
        few = [f"{run.name}: {TRACED} of {run.count} equal layers" for run in runs]
        self.traced = f"traced with {', '.join(few)}" if few else "traced with every layer"
        return found

    def _from_few(
        self,
        model: nn.Module,
        runs: list[meta.Run],
        choices: Sequence[BackendOptions | None],
        name: str,
    ) -> list[StepMemory]:
        self.progress(f"tracing {name}: {TRACED} of {runs[0].count} layers")
        short = meta.shortened(model, dict.fromkeys(runs, TRACED))
        longer = [[self._longer(short, run, options) for run in runs] for options in choices]
        return self._of(short, choices, longer)

    def _longer(self, short: nn.Module, run: meta.Run, options: BackendOptions | None) -> Longer:
        """The layers of a run beyond those that are traced, as parts of a `TrainingStep`."""
        first, second = (f"{run.name}.{run.start + i}" for i in range(TRACED))
        layer = short.get_submodule(second)
        rotations = parts.rotations(layer)
        share = filling = 0.0
        if options is not None and rotations:
            share = parts.share_of_rotations(layer, short)
            filling = max(0.0, options.cayley_batch_bytes / rotations - TRACED)
        gradients = sum(parameter.nbytes for parameter in trained_parameters(layer))
        rounded = 0
        if self.apart:
            filling, rounded = 0.0, parts.rounded_off(layer, self.gradient)
        names = f"model.{first}", f"model.{second}"
        return Longer(*names, run.count - TRACED, gradients, share, filling, rounded)

    def _of(
        self,
        model: nn.Module,
        choices: Sequence[BackendOptions | None],
        longer: Sequence[Sequence[Longer]] | None = None,
    ) -> list[StepMemory]:
        step = example.TrainingStep(model, self.loss, self.autocast)
        with collector.paused():
            traced = trace(step, self.inputs, self.kwargs, choices)
            every = longer or [[]] * len(choices)
            return [step_memory(graphs, runs) for graphs, runs in zip(traced, every, strict=True)]


def _budget(options: BackendOptions | None) -> float:
    return 0.0 if options is None else options.config.get("memory_budget") or 0.0


def _of_variant(options: BackendOptions | None, variant: str) -> BackendOptions:
    assert options is not None
    config = options.config | {"variant": variant, "memory_budget": None}
    return dataclasses.replace(options, config=config)


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
