"""Which sides of which linears share one permutation: siblings by rule, others as declared.

Sharing a permutation is always correct. It is worth declaring where two sides meet: what one layer
scatters and the next gathers by the same permutation, neither has to (pass `cancel_permutations`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError
from poetx_compile.layers.eligibility import trained_by
from poetx_compile.layers.permutation import Permutation
from poetx_compile.layers.prepared import equivalence_of, prepared_linears, stored_weight

SIDES = ("in", "out")
_ALREADY = "merge_and_unload(model) first, then prepare it with everything that shares"


@dataclasses.dataclass
class SharedGroup:
    """One group of declared sides: those that match one declaration below one module.

    Attributes:
        label: the declaration and the module, for messages.
        members: name and module of each linear, and which of its sides.
        permutation: what they share, once the first of them has it.
    """

    label: str
    members: list[tuple[str, nn.Linear, str]] = dataclasses.field(default_factory=list)
    permutation: Permutation | None = None


class Groups:
    """Hands out the permutation of each side; ids count up in the order of the model's modules.

    A side is in a declared group, or else an input side is with its siblings (linears of one parent
    module with the same number of inputs), or else it has a permutation of its own.

    Args:
        model: some of it may be prepared already.
        config: seed and kind of the permutations.
        draw: the draw that new permutations start from.
        shared: the declarations (see `prepare`).
        found: the linears of `model` by name.
        reasons: why a linear is not going to be trained, by name; ``None`` for those that are.

    Raises:
        ConfigError: a declaration that names nothing, or sides that cannot share.
    """

    def __init__(
        self,
        model: nn.Module,
        config: POETXConfig,
        draw: int,
        shared: Sequence[Sequence[str]],
        found: dict[str, nn.Linear],
        reasons: dict[str, str | None],
    ):
        self.config, self.draw = config, draw
        self.declared: dict[tuple[int, str], SharedGroup] = {}
        for group in _resolve(shared, found, reasons):
            self._declare(group)
        self.siblings: dict[tuple[str, int], Permutation] = {}
        self.next = 0
        for name, module, e in prepared_linears(model):
            if (id(module), "in") not in self.declared:
                self.siblings[_sibling_key(name, module)] = e.perm_in
            self.next = max(self.next, *(1 + side.permutation.group for side in e.sides))

    def _declare(self, group: SharedGroup) -> None:
        """Check a declared group against the others and against what is prepared already."""
        _check_alike(group)
        permutations = []
        for name, module, side in group.members:
            other = self.declared.setdefault((id(module), side), group)
            if other is not group:
                raise ConfigError(
                    f"shared: {name}.{side} is in two groups, {other.label} and {group.label}: "
                    "make one of them"
                )
            if (e := equivalence_of(module)) is not None:
                permutations.append(e.perm_in if side == "in" else e.perm_out)
        if not permutations:
            return
        group.permutation = permutations[0]
        if any(p is not permutations[0] for p in permutations):
            raise ConfigError(
                f"shared: sides of {group.label} were prepared with permutations of their own: "
                + _ALREADY
            )
        if len(permutations) < len(group.members) and group.permutation.draw != self.draw:
            raise ConfigError(
                f"shared: some sides of {group.label} have been merged since they were prepared, "
                f"the others would join them at another draw: {_ALREADY}"
            )

    def permutations(self, name: str, module: nn.Linear) -> tuple[Permutation, Permutation]:
        """The permutations of the input and of the output side of a linear to be prepared."""
        device = module.weight.device
        perm_in, perm_out = (
            self._of_group(module, "in", module.in_features),
            self._of_group(module, "out", module.out_features),
        )
        if perm_in is None:
            key = _sibling_key(name, module)
            perm_in = self.siblings.get(key)
            if perm_in is None or perm_in.draw != self.draw or perm_in.pair.device != device:
                perm_in = self.siblings[key] = self._new(module.in_features, device)
        return perm_in, perm_out or self._new(module.out_features, device)

    def _of_group(self, module: nn.Linear, side: str, size: int) -> Permutation | None:
        group = self.declared.get((id(module), side))
        if group is None:
            return None
        if group.permutation is None:
            group.permutation = self._new(size, module.weight.device)
        return group.permutation

    def _new(self, size: int, device: torch.device) -> Permutation:
        group, self.next = self.next, self.next + 1
        c = self.config
        return Permutation(
            size,
            group,
            seed=c.seed,
            draw=self.draw,
            kind=c.permutation,
            block=c.smallest_block,
            device=device,
        )


def _sibling_key(name: str, module: nn.Linear) -> tuple[str, int]:
    return name.rpartition(".")[0], module.in_features


def _resolve(
    shared: Sequence[Sequence[str]],
    found: dict[str, nn.Linear],
    reasons: dict[str, str | None],
) -> Iterator[SharedGroup]:
    """The groups that the declarations make of the model's linears, in order."""
    trained = trained_by(found, reasons)
    for number, patterns in enumerate(shared):
        where = f"shared[{number}]"
        groups: dict[tuple[str, ...], SharedGroup] = {}
        seen: dict[tuple[str, ...], set[str]] = {}
        for pattern, parts, side in _parse(patterns, where):
            matches = list(_matches(parts, found))
            if not matches:
                raise ConfigError(
                    f"{where}: {pattern!r} matches no nn.Linear: write the end of its name, `*` "
                    "for a part that varies, and .in or .out for the side"
                )
            for name, prefix in matches:
                module = found[name]
                if id(module) not in trained:
                    raise ConfigError(
                        f"{where}: {pattern!r} names {name}, which is not trained through "
                        f"rotations ({reasons[name]}): leave that side out"
                    )
                label = f"{where} below {'.'.join(prefix) or 'the model'}"
                group = groups.setdefault(prefix, SharedGroup(label))
                seen.setdefault(prefix, set()).add(pattern)
                if not any(m is module and s == side for _, m, s in group.members):
                    group.members.append((name, module, side))
        for prefix, group in groups.items():
            if missing := [p for p in patterns if p not in seen[prefix]]:
                raise ConfigError(
                    f"{group.label}: nothing there matches {missing[0]!r}: declare it apart"
                )
        if all(len(group.members) == 1 for group in groups.values()):
            raise ConfigError(
                f"{where}: every group has one side, so nothing is shared: what precedes a match "
                "makes the group, write what varies within it as `*`"
            )
        yield from groups.values()


def _parse(patterns: Sequence[str], where: str) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(pattern, the parts of the name, side) of each pattern of one declaration."""
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(
            f"{where} = {patterns!r} is not allowed: give a sequence of sides, as in "
            "shared=[('gate_proj.out', 'up_proj.out', 'down_proj.in')]"
        )
    for pattern in patterns:
        *parts, side = pattern.split(".")
        if side not in SIDES or not parts or not all(parts):
            raise ConfigError(f"{where}: {pattern!r} is no side: name.in or name.out is")
        yield pattern, tuple(parts), side


def _matches(
    parts: tuple[str, ...], found: dict[str, nn.Linear]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, what precedes the match) of the linears whose names end in `parts`."""
    for name in found:
        path = tuple(name.split("."))
        prefix, end = path[: -len(parts)], path[-len(parts) :]
        if len(end) == len(parts) and all(map(fnmatch.fnmatchcase, end, parts)):
            yield name, prefix


def _check_alike(group: SharedGroup) -> None:
    """Raise unless all sides of a group have one size and are on one device."""

    def shown(what: dict[str, str]) -> str:
        return ", ".join(f"{side}: {value}" for side, value in what.items())

    sizes, devices = {}, {}
    for name, module, side in group.members:
        size = module.in_features if side == "in" else module.out_features
        weight = module.weight if equivalence_of(module) is None else stored_weight(module)
        sizes[f"{name}.{side}"] = str(size)
        devices[f"{name}.{side}"] = str(weight.device)
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"{group.label}: sides of different sizes ({shown(sizes)}): declare them apart"
        )
    if len(set(devices.values())) > 1:
        raise ConfigError(
            f"{group.label}: sides on different devices ({shown(devices)}): declare them apart"
        )
