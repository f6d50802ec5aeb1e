"""What the `Trainer` of Hugging Face transformers needs to train with POET-X, by either door.

>>> from poetx_compile.integrations.huggingface import OptimizerFactory, for_trainer
>>> trainer = Trainer(train_dataset=dataset, **for_trainer(model, args))
>>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(OptimizerFactory, {"args": args}))
>>> trainer.train()
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from poetx_compile.compile.backend import poetx_backend
from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError, IncompatibleStateError, UnownedRotationsError
from poetx_compile.layers.eligibility import unwrap_compiled
from poetx_compile.layers.prepare import config_of, prepare
from poetx_compile.layers.prepared import prepared_linears
from poetx_compile.layers.saving import warn_of_saving
from poetx_compile.optim import MergeSchedule, POETXAdamW, POETXMuon
from poetx_compile.optim.schedule import schedule_of

_ORIGINAL = "save_original_format"
"""Argument of `save_pretrained` in transformers 5: save under the names of older versions."""

RATE = "learning_rate"
"""The Trainer logs that of the first group under this name; others follow it by their names."""


def for_trainer(
    model: nn.Module,
    args: TrainingArguments,
    config: POETXConfig | None = None,
    *,
    optimizer: type[POETXAdamW] | type[POETXMuon] | torch.optim.Optimizer = POETXMuon,
    callbacks: Sequence[TrainerCallback] = (),
    shared: Sequence[Sequence[str]] = (),
    compile: bool = True,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    options: dict[str, Any] | None = None,
    **optimizer_arguments: Any,
) -> dict[str, Any]:
    """Keyword arguments for a `Trainer`: the model prepared and compiled, an optimiser, a callback.

    ``torch_compile_backend="poetx"`` in `args` is what the Trainer itself refuses (its list of
    backends is closed): it is taken over from there, with ``torch_compile_mode``. The model is
    compiled in place (`nn.Module.compile`), so its class, its names and `save_pretrained` stay.

    Args:
        model: prepared here if nobody has; moved to ``args.device``.
        args: the learning rate, betas, epsilon and weight decay of the optimiser are read from it;
            the Trainer makes the schedule itself.
        config, shared: as for `prepare`.
        optimizer: a class of this package, or an optimiser that was given to `attach`.
        callbacks: your own, which go in front.
        compile: whether to compile; without it the model runs weight-centric, right and slow.
        dynamic, fullgraph, options: of `torch.compile`. ``dynamic=True`` compiles once for batches
            of all sizes and lengths (docs/how-to/compile-budget.md).
        optimizer_arguments: further arguments of the optimiser's class, such as `poetx_lr`; they
            go before those of `args`.

    Returns:
        ``model``, ``args``, ``optimizers`` and ``callbacks``.

    Raises:
        ConfigError: FSDP, DeepSpeed, several devices in one process, or another compiler backend.
    """
    _refuse(args)
    model = unwrap_compiled(model)
    mode = _take_over_compilation(args)
    if getattr(model, "hf_device_map", None) is None:
        model.to(args.device)
    optimizer = _optimizer_of(model, args, config, optimizer, shared, optimizer_arguments)
    if (schedule := schedule_of(optimizer)) is None:
        raise UnownedRotationsError(
            "this optimiser merges no rotations: call poetx_compile.attach(optimizer, model)"
        )
    if compile:
        model.compile(
            backend=poetx_backend, dynamic=dynamic, fullgraph=fullgraph, mode=mode, options=options
        )
    _save_under_own_names(model)
    return {
        "model": model,
        "args": args,
        "optimizers": (optimizer, None),
        "callbacks": [*callbacks, POETXCallback(optimizer, schedule)],
    }


class OptimizerFactory:
    """For ``Trainer(optimizer_cls_and_kwargs=(OptimizerFactory, {"args": args, ...}))``.

    The Trainer calls it with the model when it is to train, also with one of `model_init`. It does
    what `for_trainer` does, without the callback: the rates of the groups, the angle and the last
    merge are not logged.
    """

    def __call__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        config: POETXConfig | None = None,
        *,
        optimizer: type[POETXAdamW] | type[POETXMuon] = POETXMuon,
        shared: Sequence[Sequence[str]] = (),
        compile: bool = True,
        dynamic: bool | None = None,
        fullgraph: bool = False,
        options: dict[str, Any] | None = None,
        **optimizer_arguments: Any,
    ) -> torch.optim.Optimizer:
        """The optimiser of `model`, which is prepared (if nobody has) and compiled in place.

        Arguments as of `for_trainer`.

        Raises:
            ConfigError: as `for_trainer`; or ``torch_compile`` in `args`, by which the Trainer
                compiles with another backend before this is called.
            IncompatibleStateError: a run is resumed whose model was not prepared before: its
                weights could not be loaded.
        """
        _refuse(args)
        if args.torch_compile:
            raise ConfigError(
                "torch_compile: the Trainer compiles with a backend of its own list; leave it out, "
                "OptimizerFactory compiles the model"
            )
        model = unwrap_compiled(model)
        unprepared = config_of(model) is None
        made = _optimizer_of(model, args, config, optimizer, shared, optimizer_arguments)
        if unprepared:
            made.register_load_state_dict_pre_hook(_refuse_to_resume)
        if compile:
            model.compile(
                backend=poetx_backend, dynamic=dynamic, fullgraph=fullgraph, options=options
            )
        _save_under_own_names(model)
        return made


def _refuse_to_resume(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The Trainer loads weights before it makes the optimiser, and passes over unknown names."""
    if not state["state"]:
        return  # no step yet: Accelerate gives an optimiser its own state
    raise IncompatibleStateError(
        "the weights of the checkpoint were loaded before the model was prepared, by names that it "
        "did not have: call poetx_compile.prepare(model, config) before you make the Trainer"
    )


def _optimizer_of(
    model: nn.Module,
    args: TrainingArguments,
    config: POETXConfig | None,
    optimizer: type[POETXAdamW] | type[POETXMuon] | torch.optim.Optimizer,
    shared: Sequence[Sequence[str]],
    arguments: dict[str, Any],
) -> torch.optim.Optimizer:
    """The optimiser, made by `args` where it is a class; the model is prepared if nobody has."""
    if config_of(model) is None or shared:
        prepare(model, config, shared=shared)
    if isinstance(optimizer, type):
        given: dict[str, Any] = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
        }
        return optimizer(model, config=config, **given | arguments)
    if arguments:
        raise ConfigError(
            f"{', '.join(arguments)}: the optimiser is made already, give its arguments to it"
        )
    return optimizer


def _refuse(args: TrainingArguments) -> None:
    """Raise for ways of running that take the parameters away from the optimiser."""
    reason = None
    if getattr(args, "deepspeed", None):
        reason = "DeepSpeed flattens the parameters: use DDP (torchrun)"
    elif getattr(args, "fsdp", None):
        reason = "the Trainer takes no optimiser under FSDP: use DDP (torchrun)"
    elif args.n_gpu > 1:
        reason = (
            f"{args.n_gpu} GPUs in one process (DataParallel) train copies of the model: start it "
            "with torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    if reason is not None:
        raise ConfigError(f"the Trainer cannot train rotations here: {reason}")


def _take_over_compilation(args: TrainingArguments) -> str | None:
    """Switch the Trainer's own compilation off; returns the mode it was to have."""
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    if backend not in (None, "poetx", "inductor"):  # the Trainer's default is Inductor
        raise ConfigError(
            f"torch_compile_backend = {backend!r} would build every effective weight: use 'poetx'"
        )
    if args.torch_compile:  # version 4 tells Accelerate by these
        os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
        os.environ.pop("ACCELERATE_DYNAMO_MODE", None)
    args.torch_compile = False
    args.torch_compile_backend = args.torch_compile_mode = None
    return mode


class POETXCallback(TrainerCallback):
    """Logs what the Trainer does not: every group's rate, the angle, the last merge and redraw.

    Beside each training loss: ``learning_rate/<group>``, as it was in that step;
    ``poetx_last_merge`` and ``poetx_last_redraw``, the steps of the last ones; ``poetx_angle``, the
    guard's last measurement in radians. They are in ``state.log_history`` and in the ``logs`` of
    the callbacks behind this one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: MergeSchedule):
        self._optimizer, self._schedule = optimizer, schedule
        self._rates: dict[str, float] = {}

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        """Note the rates of this step: when it is logged, the scheduler has set the next."""
        groups = enumerate(self._optimizer.param_groups)
        self._rates = {f"{RATE}/{g.get('name', i)}": float(g["lr"]) for i, g in groups}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the logs of a training step."""
        if logs is None or RATE not in logs:
            return
        last = {
            "poetx_last_merge": self._schedule.last_merge,
            "poetx_last_redraw": self._schedule.last_redraw,
        }
        more = self._rates | last
        if self._schedule.angle is not None:
            more["poetx_angle"] = self._schedule.angle
        logs.update(more)
        state.log_history[-1].update(more)


def _save_under_own_names(model: nn.Module) -> None:
    """Let a prepared model be saved under the names it has.

    Some architectures of transformers 5 are saved under the names of older versions, which
    `from_pretrained` knows to translate and a resuming Trainer does not: it would load nothing.
    """
    save: Any = getattr(type(model), "save_pretrained", None)
    if save is not None and _ORIGINAL in inspect.signature(save).parameters:
        model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[assignment]


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> None:
    if any(True for _ in prepared_linears(model)):
        warn_of_saving(model, *args, **kwargs)
        kwargs.setdefault(_ORIGINAL, False)
    type(model).save_pretrained(model, *args, **kwargs)
