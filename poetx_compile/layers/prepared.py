"""The prepared linears of a model, and what of them belongs together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from poetx_compile.distributed.wrappers import user_name
from poetx_compile.errors import ConfigError
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.permutation import Permutation
from poetx_compile.layers.registry import registry

Layer = tuple[nn.Linear, OrthogonalEquivalence]
"""A prepared linear and its parametrization."""


def equivalence_of(module: nn.Module) -> OrthogonalEquivalence | None:
    """The parametrization of a prepared linear, or ``None``."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    chain = module.parametrizations["weight"]  # type: ignore[index]
    for parametrization in chain:  # type: ignore[union-attr]
        if isinstance(parametrization, OrthogonalEquivalence):
            return parametrization
    return None


def redrawn(equivalences: Iterable[OrthogonalEquivalence]) -> list[Permutation]:
    """The permutations that a redraw changes: those of which a side gains by it.

    A side whose one block covers it turns in all its planes under every permutation.
    """
    sides = (side for e in equivalences for side in e.sides)
    return list(dict.fromkeys(s.permutation for s in sides if s.permutation.size > s.block))


def prepared_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear, OrthogonalEquivalence]]:
    """(name, module, parametrization) of every prepared linear of `model`, each once.

    The names are the user's, without wrappers of compiled parts.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (equivalence := equivalence_of(module)) is not None:
            yield user_name(name), module, equivalence


def share_permutations_with(
    equivalences: Iterable[OrthogonalEquivalence],
) -> list[OrthogonalEquivalence]:
    """The layers outside of `equivalences` that have a permutation of theirs.

    A redraw is one of all layers that have a permutation: they are merged together.
    """
    inside = set(equivalences)
    permutations = {side.permutation for e in inside for side in e.sides}
    outside = [e for e in registry.layers() if e not in inside]
    return [e for e in outside if any(side.permutation in permutations for side in e.sides)]


def check_alone(equivalences: Iterable[OrthogonalEquivalence]) -> None:
    """Raise `ConfigError` where other layers have permutations of these."""
    if others := share_permutations_with(equivalences):
        raise ConfigError(
            f"{len(others)} layer(s) outside of these share permutations with them, and a merge of "
            "one is a merge of all: merge the whole model, give the linears that share an input to "
            "one optimiser, and declare nothing `shared` between parts that have several"
        )


class PreparedLayers(nn.ModuleList):
    """Prepared linears, of any modules, as one model: for `merge` and what else takes a model."""


def stored_weight(module: nn.Module) -> nn.Parameter:
    """S: the frozen parameter of a prepared linear."""
    # Where it is: a step asks for those of all layers, and a module's own look-ups take long.
    chain = module._modules["parametrizations"]._modules["weight"]  # type: ignore[union-attr]
    return chain._parameters["original"]  # type: ignore[union-attr, return-value]


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a prepared linear's effective weight."""
    equivalence = equivalence_of(module)
    assert equivalence is not None
    scale = equivalence.scale
    return stored_weight(module).dtype if scale is None else scale.dtype


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of `model` that train: unfrozen, and no frozen weight of a prepared layer.

    Those do not train whatever their `requires_grad` says.
    """
    stored = {stored_weight(m) for _, m, _ in prepared_linears(model)}
    return [p for p in model.parameters() if p.requires_grad and p not in stored]
