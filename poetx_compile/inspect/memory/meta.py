"""Copies of a model on the meta device: sizes and dtypes without memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from poetx_compile._torch import FakeTensorMode
from poetx_compile.config import POETXConfig
from poetx_compile.layers.prepare import prepare
from poetx_compile.layers.prepared import prepared_linears, weight_dtype

_WORTH_CUTTING = 4
"""Layers in a run from which on it is shortened."""


def copied(model: nn.Module, device: str = "meta", without: Iterable[nn.Module] = ()) -> nn.Module:
    """A deep copy whose parameters and buffers are new, empty tensors of `device`.

    Tied parameters stay tied, prepared layers stay prepared, and nothing of the model is read. In
    the place of modules that it is to be `without` there are empty ones.
    """
    memo: dict[int, object] = {id(module): nn.Identity() for module in without}
    for tensor in (*model.parameters(), *model.buffers()):
        empty: Tensor = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
        )
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def prepared(
    model: nn.Module, config: POETXConfig, shared: Sequence[Sequence[str]] = ()
) -> nn.Module:
    """A copy on the meta device, prepared as `prepare` would do it."""
    with FakeTensorMode():  # `prepare` refuses meta weights, which nothing can be computed from
        fake = copied(model, "cpu")
        prepare(fake, config, shared=shared)
    return copied(fake)


def unprepared(model: nn.Module) -> nn.Module:
    """A copy on the meta device, plain, whose weights train.

    Its prepared linears are replaced: torch makes a class for each parametrized module, which a
    copy shares with its original, and to unload the copy would unload the class.
    """
    plain = copied(model)
    replaced = {id(module): _plain(module) for _, module, _ in prepared_linears(plain)}
    for parent in list(plain.modules()):
        for name, child in list(parent._modules.items()):  # a shared one under all its names
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
    return replaced.get(id(plain), plain)


def _plain(module: nn.Linear) -> nn.Linear:
    dtype = weight_dtype(module)
    with torch.device("meta"):
        linear = nn.Linear(module.in_features, module.out_features, bias=False, dtype=dtype)
    linear.bias = module.bias
    return linear


@dataclasses.dataclass(frozen=True)
class Run:
    """Equal neighbours in a `nn.ModuleList`: `count` layers from number `start` on."""

    name: str
    start: int
    count: int


def runs_of_layers(model: nn.Module) -> list[Run]:
    """The longest run of each outermost list of layers, where it is worth tracing it shorter."""
    found: list[Run] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        if any(name.startswith(f"{run.name}.") for run in found):
            continue
        run = _longest_run(name, module)
        if run.count >= _WORTH_CUTTING:
            found.append(run)
    return found


def _longest_run(name: str, layers: nn.ModuleList) -> Run:
    signatures = [_signature(layer) for layer in layers]
    best = Run(name, 0, 0)
    start = 0
    for i in range(len(signatures) + 1):
        if i == len(signatures) or signatures[i] != signatures[start]:
            if i - start > best.count:
                best = Run(name, start, i - start)
            start = i
    return best


def _signature(layer: nn.Module) -> tuple[object, ...]:
    modules = tuple((name, type(m).__qualname__) for name, m in layer.named_modules())
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return modules, tuple((name, t.shape, t.dtype) for name, t in tensors)


def shortened(model: nn.Module, counts: dict[Run, int]) -> nn.Module:
    """A copy on the meta device with fewer layers in some runs."""
    lists = {run.name: list(model.get_submodule(run.name).children()) for run in counts}
    short = copied(
        model,
        without=[
            layer
            for run, count in counts.items()
            for layer in lists[run.name][run.start + count : run.start + run.count]
        ],
    )
    for run, count in counts.items():
        layers = short.get_submodule(run.name)
        assert isinstance(layers, nn.ModuleList)
        del layers[run.start + count : run.start + run.count]
    return short
