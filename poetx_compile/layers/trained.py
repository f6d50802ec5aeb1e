"""How much of a model trains through rotations, and which weights train densely."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from torch import nn

from poetx_compile.config import POETXConfig
from poetx_compile.layers.eligibility import linears, other_weights
from poetx_compile.layers.law import notice
from poetx_compile.layers.prepared import equivalence_of, stored_weight
from poetx_compile.layers.sides import side_blocks
from poetx_compile.layers.tables import compact


@dataclasses.dataclass(frozen=True)
class DenseWeights:
    """Weights of one shape that train densely for one reason."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    count: int
    reason: str

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{', '.join(self.names)}: {sizes}, {self.count:,} parameters, {self.reason}"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What trains, in numbers of parameters.

    Attributes:
        layers: `nn.Linear` that train through rotations.
        linears: all of them.
        total: of the plain model.
        rotated: of weights that train through rotations.
        rotations: of these rotations.
        dense: of everything else that takes gradients.
        weights: of two dimensions or more that train densely, the largest first.
        gains: of the rotated weights.
    """

    layers: int
    linears: int
    total: int
    rotated: int
    rotations: int
    dense: int
    weights: tuple[DenseWeights, ...]
    gains: int = 0

    @property
    def share(self) -> float:
        """The part of the plain model's parameters that trains through rotations, in per cent."""
        return 100 * self.rotated / max(self.total, 1)

    @property
    def trainable(self) -> int:
        """The number of parameters that an optimiser holds."""
        return self.rotations + self.gains + self.dense

    def __str__(self) -> str:
        gains = f"{self.gains:,} gains + " if self.gains else ""
        known = notice(self.rotations, self.rotated)
        return (
            f"{self.share:.1f} % of {self.total:,} parameters ({self.layers} of {self.linears} "
            "nn.Linear) train by rotations\n"
            f"trainable: {self.trainable:,} = {self.rotations:,} of rotations + "
            f"{gains}{self.dense:,} dense"
        ) + (f"\n{known}" if known else "")


def trained(model: nn.Module, config: POETXConfig, left: Mapping[str, str]) -> Trained:
    """What of a model trains, and how.

    Args:
        config: of the blocks of linears that are not prepared, and are going to be adopted.
        left: the linears that are neither, by name, and why.
    """
    layers = rotated = rotations = gains = total = 0
    inside: set[int] = set()  # what belongs to rotations
    dense: list[tuple[str, tuple[int, ...], str]] = []
    seen: set[int] = set()
    found = linears(model)
    for name, module in found.items():
        if id(module) in seen:
            continue
        seen.add(id(module))
        if (e := equivalence_of(module)) is not None:
            weight = stored_weight(module)
            skews = [skew for skew in e.skews if skew.requires_grad]
            inside |= {id(weight), *map(id, (*e.skews, *e.gains.values()))}
            gains += sum(gain.numel() for gain in e.gains.values() if gain.requires_grad)
            rotations += sum(skew.numel() for skew in skews)
            rotated += weight.numel() if skews else 0
            layers += bool(skews)
            total += weight.numel()
        elif name not in left:
            layers += 1
            inside.add(id(module.weight))
            rotated += module.weight.numel()
            total += module.weight.numel()
            rotations += sum(_packed(*pair) for pair in _sides(module, config))
            sizes = {"in": module.in_features, "out": module.out_features}
            gains += sum(sizes[side] for side in config.gained_sides)
        elif nn.parameter.is_lazy(module.weight):
            continue  # it has no shape yet
        elif isinstance(module.weight, nn.Parameter) and module.weight.requires_grad:
            dense.append((name or "(root)", tuple(module.weight.shape), left[name]))
    dense += [(w.name, w.shape, w.reason) for w in other_weights(model) if w.trains]
    rest = [p for p in model.parameters() if id(p) not in inside and not nn.parameter.is_lazy(p)]
    return Trained(
        layers,
        len({id(module) for module in found.values()}),
        total + sum(p.numel() for p in rest),
        rotated,
        rotations,
        sum(p.numel() for p in rest if p.requires_grad),
        tuple(sorted(_grouped(dense), key=lambda weights: -weights.count)),
        gains,
    )


def _sides(module: nn.Linear, config: POETXConfig) -> Iterator[tuple[int, int]]:
    yield side_blocks(module.in_features, config.block_in)
    yield side_blocks(module.out_features, config.block_out)


def _packed(blocks: int, b: int) -> int:
    return blocks * b * (b - 1) // 2


def _grouped(dense: list[tuple[str, tuple[int, ...], str]]) -> Iterator[DenseWeights]:
    alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for name, shape, reason in dense:
        alike.setdefault((shape, reason), []).append(name)
    for (shape, reason), names in alike.items():
        count = len(names) * math.prod(shape)
        yield DenseWeights(tuple(compact(names)), shape, count, reason)
