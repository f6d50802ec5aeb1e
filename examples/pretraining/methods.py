"""The two ways to train the same model: through POET-X, or densely with AdamW.

Everything else of a run is the same for both; what differs between them stands here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from llama import Llama, LlamaConfig
from poetx_compile.inspect.diagnostics import diagnostics
from pretraining.failure import RunError
from pretraining.options import Options
from pretraining.processes import Processes, spread

BETAS = (0.9, 0.95)
_LABELS = {"muon": "POET-X (Muon)", "adamw": "POET-X (AdamW)"}


@dataclasses.dataclass(frozen=True)
class Method:
    """A model made ready to train.

    Attributes:
        label: name of the method in the plots.
        model: the plain module, which owns the parameters (sharded by FSDP2: a part of each).
        forward: the compiled model: ``forward(tokens, targets)`` gives the loss.
        optimizer: trains what the method trains.
        trainable: trained parameters in per cent of the dense model's.
        summary: what was prepared, for the log; empty for dense training.
    """

    label: str
    model: nn.Module
    forward: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    trainable: float
    summary: str = ""

    @property
    def last_merge(self) -> int | None:
        """The step of the last merge, 0 before the first; None without rotations."""
        schedule = getattr(self.optimizer, "schedule", None)
        return None if schedule is None else schedule.last_merge

    def angle_and_error(self, exact: bool) -> tuple[float | None, float | None]:
        """(largest angle θ in radians, largest ‖GᵀG − I‖); None, None without rotations.

        Unless `exact`, the first one as the angle guard has estimated it, and None.
        """
        schedule = getattr(self.optimizer, "schedule", None)
        if schedule is None:
            return None, None
        if not exact:
            return schedule.angle, None
        figures = diagnostics(self.model)
        return figures["angle_max"], figures["orthogonality_error"]

    def learning_rates(self) -> dict[str, float]:
        """The learning rate in force, for each parameter group by its name."""
        groups = self.optimizer.param_groups
        return {g.get("name", f"group{i}"): float(g["lr"]) for i, g in enumerate(groups)}


def poetx_config(options: Options, shapes: LlamaConfig) -> poetx.POETXConfig:
    """The configuration of POET-X: rows normalised, because the weights are fresh."""
    block_size = options.block_size or min(256, shapes.hidden_size // 2)
    return poetx.POETXConfig(
        block_size=block_size,
        merge_interval=options.merge_interval,
        redraw_interval=options.redraw_interval or None,
        base=options.base,
        variant=options.variant,
        permutation=options.permutation,
        seed=options.seed,
        init="rows",
    )


def build(
    model: Llama, options: Options, config: poetx.POETXConfig, group: Processes | None = None
) -> Method:
    """Make `model` ready to train by `options.method`, in all processes of `group`."""
    dense = sum(p.numel() for p in model.parameters())
    label, summary = "AdamW", ""
    backend: Any = options.stage
    compile_options: dict[str, Any] = {"triton.cudagraphs": True} if options.cuda_graphs else {}
    if options.method == "poetx":
        report = poetx.prepare(model, config)
    forward: Any = model
    if group is not None and group.several:
        forward = spread(model, options.parallel, rotations=options.method == "poetx")
    if options.method == "poetx":
        label, summary = _LABELS[options.optimizer], "; ".join(str(report.trained).splitlines())
        backend = poetx.poetx_backend
        compile_options["stage"] = options.stage
        optimizer = _poetx_optimizer(model, options)
    else:
        optimizer = _dense_optimizer(model, options)
    if options.compile_by == "block" and not options.no_compile:
        for block in model.layers:
            block.compile(backend=backend, options=compile_options or None)
    elif not options.no_compile:
        forward = torch.compile(forward, backend=backend, options=compile_options or None)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Method(label, model, forward, optimizer, 100 * trained / dense, summary)


def _poetx_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    rates: dict[str, Any] = {"lr": options.lr, "poetx_lr": options.poetx_lr, "betas": BETAS}
    if options.optimizer == "muon":
        own: dict[str, Any] = {
            "momentum_dtype": options.momentum_dtype,
            "turn_every": options.turn_every,
        }
        return poetx.POETXMuon(model, **rates, weight_decay=0.0, **own)
    for name, default in (("momentum_dtype", "float32"), ("turn_every", 1)):
        if getattr(options, name) != default:
            flag = name.replace("_", "-")
            raise RunError(f"--{flag} is of --optimizer muon: leave one of them out")
    return poetx.POETXAdamW(model, **rates, weight_decay=0.0)


def _dense_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    group = {"params": list(model.parameters()), "name": "dense"}
    return torch.optim.AdamW([group], lr=options.lr, betas=BETAS, weight_decay=0.0, fused=True)


@contextmanager
def built_in(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, parameters are made on `device` in `dtype`: there is never a copy in another one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def check_cuda_graphs(options: Options, device: torch.device, group: Processes) -> None:
    """Raise `RunError` where ``--cuda-graphs`` has nothing to record, or was not tried."""
    if not options.cuda_graphs:
        return
    if device.type != "cuda" or options.no_compile or options.stage != "inductor":
        raise RunError(
            "--cuda-graphs needs a CUDA device and a model that --stage inductor compiles: leave "
            "it out"
        )
    if group.several:
        raise RunError("--cuda-graphs is for one process: leave it out under torchrun")


def be_deterministic() -> None:
    """Same input, same bits, on CUDA too; what cannot be raises. Before CUDA is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def pick_device(name: str) -> torch.device:
    """The device called `name`; ``"auto"`` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"--device {name} is no device: use cpu, cuda or cuda:<number>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"--device {name}: use cpu, cuda or cuda:<number>")
    return device


def pick_dtypes(name: str, device: torch.device) -> tuple[torch.dtype, bool]:
    """(dtype of the weights, whether the products run in bfloat16 under autocast)."""
    if name == "auto":
        name = "autocast" if device.type == "cuda" else "float32"
    return (torch.bfloat16 if name == "bfloat16" else torch.float32), name == "autocast"
