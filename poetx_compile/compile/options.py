"""The options of `poetx_backend`: POET-X's own beside Inductor's, unknown ones refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from poetx_compile._torch import list_mode_options, list_options
from poetx_compile.config import POETXConfig, current_names
from poetx_compile.errors import ConfigError
from poetx_compile.passes import NAMES, Machine
from poetx_compile.passes.batch_cayley import DEFAULT_BYTES

CHOICES = {
    "stage": ("inductor", "aot_eager", "eager"),
    "unprepared": ("adopt", "refuse"),
    "keep_folded": ("call", "step"),
}
"""What options of ours that are names may be."""

_CONFIG_FIELDS = {f.name for f in dataclasses.fields(POETXConfig)} | {"normalize_rows"}


def without_adoption(options: dict[str, Any]) -> dict[str, Any]:
    """The options with `adopt_linear` disabled: for a copy of a prepared model, whose layers that
    `prepare` left alone are not known to the backend."""
    names = options.get("disable_passes", ())
    names = (names,) if isinstance(names, str) else names
    return options | {"disable_passes": [*names, "adopt_linear"]}


@dataclasses.dataclass(frozen=True)
class BackendOptions:
    """Options of one `torch.compile(model, backend=poetx_backend, mode=..., options={...})`.

    Args:
        config: the fields of `POETXConfig` that were given: the configuration of adopted weights,
            and the compile-time choices (variant, formulation, memory_budget) of prepared ones.
        stage: what compiles the graph after the passes: ``"inductor"``, ``"aot_eager"`` or
            ``"eager"`` (for debugging; eager partitions nothing, so that variant and
            memory_budget change nothing there).
        unprepared: what becomes of a model that nobody prepared, once it is called for training:
            ``"adopt"``, or ``"refuse"`` to raise `AdoptionError`.
        keep_folded: how long folded weights are kept: for a ``"call"`` (and its backward), or for a
            ``"step"``, over the micro-batches of an accumulated step and the batches of an
            evaluation (`hoist_folds`).
        disable_passes: names of passes that are left out, or of a form of layers (``"folded"``,
            ``"input_centric"``) that `formulation` is not to choose.
        verify_passes: lint and check all metadata after each pass that rewrites something.
        cayley_batch_bytes: byte budget of one batch of rotations (`batch_cayley`).
        machine: the rates by which ``formulation="auto"`` chooses; a dict with any of ``flops``,
            ``bytes`` and ``launch`` (see `passes.cost.Machine`).
        inductor: Inductor's own settings, with those of `mode`.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    stage: str = "inductor"
    unprepared: str = "adopt"
    keep_folded: str = "call"
    disable_passes: tuple[str, ...] = ()
    verify_passes: bool = False
    cayley_batch_bytes: int = DEFAULT_BYTES
    machine: Machine = dataclasses.field(default_factory=Machine)
    inductor: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, mode: str | None, options: dict[str, Any] | None) -> BackendOptions:
        """Split and check what `torch.compile` hands over. Raises `ConfigError`."""
        given = dict(options or {})
        config = current_names({k: given.pop(k) for k in list(given) if k in _CONFIG_FIELDS})
        POETXConfig.from_dict(config)  # raises where a value is out of range
        own = {k: given.pop(k) for k in list(given) if k in _own_names()}
        own["disable_passes"] = _pass_names(own.get("disable_passes", ()))
        own["machine"] = _machine(own.get("machine", {}))
        parsed = cls(config=config, inductor=_inductor_settings(mode, given), **own)
        for name, allowed in CHOICES.items():
            if (value := getattr(parsed, name)) not in allowed:
                raise ConfigError(f"option {name} = {value!r} is not allowed: use one of {allowed}")
        budget, verify = parsed.cayley_batch_bytes, parsed.verify_passes
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
            raise ConfigError(
                f"option cayley_batch_bytes = {budget!r} is not allowed: use an int ≥ 1"
            )
        if not isinstance(verify, bool):
            raise ConfigError(f"option verify_passes = {verify!r} is not allowed: use a bool")
        if parsed.inductor and parsed.stage != "inductor":
            raise ConfigError(
                f"mode and Inductor's options ({', '.join(sorted(parsed.inductor))}) have no "
                f"effect at stage {parsed.stage!r}: leave them out, or use stage 'inductor'"
            )
        return parsed

    @property
    def cuda_graphs(self) -> bool:
        """Whether compiled graphs are captured as CUDA graphs."""
        captured = self.inductor.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs)
        return self.stage == "inductor" and bool(captured)

    def identity(self) -> dict[str, Any]:
        """JSON-able values that tell compiled artefacts of different options apart."""
        values = dataclasses.asdict(self)
        values.pop("inductor")  # Inductor's caches hash its settings themselves
        return values


def _own_names() -> list[str]:
    """The options of `poetx_backend` beside the fields of `POETXConfig` and those of Inductor."""
    names = (f.name for f in dataclasses.fields(BackendOptions))
    return [name for name in names if name not in ("config", "inductor")]


def _pass_names(names: str | Iterable[str]) -> tuple[str, ...]:
    if not isinstance(names, Iterable):
        raise ConfigError(
            f"option disable_passes = {names!r} is not allowed: a list of {', '.join(NAMES)}"
        )
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [n for n in names if n not in NAMES]
    if unknown:
        raise ConfigError(
            f"unknown pass(es) {', '.join(map(str, unknown))}; there are: {', '.join(NAMES)}"
        )
    return names


def _machine(rates: Any) -> Machine:
    if not isinstance(rates, dict):
        raise ConfigError(f"option machine = {rates!r} is not allowed: a dict of rates")
    known = [f.name for f in dataclasses.fields(Machine)]
    unknown = [k for k in rates if k not in known]
    if unknown:
        raise ConfigError(f"unknown rate(s) {unknown} in option machine; known: {known}")
    try:
        return Machine(**rates)
    except ValueError as error:
        raise ConfigError(f"option machine: {error}") from error


def _inductor_settings(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = dict(list_mode_options(mode)) if mode else {}
    known = set(list_options())
    names = {k.replace("-", "_"): v for k, v in options.items()}
    unknown = sorted(k for k in names if k not in known)
    if unknown:
        raise ConfigError(
            f"unknown option(s) {', '.join(unknown)}: use those of poetx_backend "
            f"({', '.join((*_own_names(), *sorted(_CONFIG_FIELDS)))}) or of "
            "torch._inductor.list_options()"
        )
    return settings | names
