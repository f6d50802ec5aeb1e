"""`load_state_dict` of a prepared model: checked as a whole before anything of it is written.

A hook in front of torch's own loading, on every module that holds prepared layers. Three kinds of
state may meet a prepared layer:

- **its own**, saved by a prepared model: taken over with its permutations, if the layout fits. One
  of the other form (``merge_interval`` 1 or larger) is converted: the coordinates are the same, so
  that moments go on;
- **a plain weight** (``x.weight``, of a model that was never prepared, or of `plain_state_dict`):
  stored permuted, with rotations and gains back at the identity. Where the model is sharded, every
  process gives the whole weight and keeps its part;
- **none** (``strict=False``): the layer stays as it is.

A dense weight, of either kind, is quantised where the layer's is int8 (``base="int8"``), layer by
layer; an int8 one of a prepared model is dequantised where it is dense.

What cannot be taken over is refused with every reason, and the model is what it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poetx_compile._torch import is_traceable_wrapper_subclass
from poetx_compile.distributed.shards import shard_like
from poetx_compile.distributed.wrappers import user_name
from poetx_compile.errors import IncompatibleStateError
from poetx_compile.layers.layout import Layout
from poetx_compile.layers.parametrization import QUANTISED, OrthogonalEquivalence, norm_of
from poetx_compile.layers.permutation import Permutation
from poetx_compile.layers.prepared import equivalence_of, share_permutations_with, stored_weight
from poetx_compile.ops.dequantize import dequantize, groups_of, norm, quantize
from poetx_compile.ops.gains import GAINS
from poetx_compile.ops.precision import rotation_dtype

CONVERT = (
    "What was trained is kept by loading poetx.plain_state_dict(state) instead: the effective "
    "weights, with new rotations at the identity."
)

State = dict[str, Any]


def guard_loads(model: nn.Module) -> None:
    """Check and convert what is loaded into the prepared layers of `model`, also through a part."""
    for module in _holders(model):
        if not any(hook.hook is _before_load for hook in _hooks(module).values()):
            module.register_load_state_dict_pre_hook(_before_load)


def unguard_loads(model: nn.Module) -> None:
    """Leave no hook on modules that hold no prepared layer any more."""
    holders = set(_holders(model))
    for module in model.modules():
        if module not in holders:
            for key, hook in list(_hooks(module).items()):
                if hook.hook is _before_load:
                    del _hooks(module)[key]


def _hooks(module: nn.Module) -> dict[int, Any]:
    return module._load_state_dict_pre_hooks  # copies of a module have it too, and no handle of it


def _holders(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` that are prepared layers or hold some."""
    found: dict[nn.Module, bool] = {}

    def holds(module: nn.Module) -> bool:
        if module not in found:
            found[module] = isinstance(module, nn.Linear) and equivalence_of(module) is not None
            for child in module.children():
                found[module] |= holds(child)
        return found[module]

    holds(model)
    yield from (module for module, held in found.items() if held)


def fit_names(state: State, model: nn.Module, prefix: str = "") -> None:
    """Rename what was saved with other parts of the model compiled than are compiled now.

    ``torch.compile`` of a part puts ``_orig_mod`` into the names of all that is in it.
    """
    here = {user_name(name): name for name, _ in model.named_modules(remove_duplicate=False)}
    if not any("_orig_mod" in name for name in (*here.values(), *state)):
        return
    start = user_name(prefix)
    for key in list(state):
        path = user_name(key).removeprefix(start).split(".")
        if not user_name(key).startswith(start):
            continue
        depth = next(d for d in reversed(range(len(path))) if ".".join(path[:d]) in here)
        name = ".".join([*filter(None, [here[".".join(path[:depth])]]), *path[depth:]])
        if (name := prefix + name) not in state:
            state[name] = state.pop(key)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One name of a prepared layer, and where a state dict has its tensors."""

    name: str
    linear: nn.Module
    equivalence: OrthogonalEquivalence

    @property
    def plain(self) -> str:
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def own(self) -> dict[str, Tensor]:
        """The layer's saved tensors by their keys."""
        return self.tensors(self.equivalence.merged, self.equivalence.quantised)

    def tensors(self, merged: bool, quantised: bool) -> dict[str, Tensor]:
        """The tensors that this layer would save in either form, by their keys; the layout last.

        Those of an int8 weight stand in for others where there is none.
        """
        e = self.equivalence
        chain = self.linear.parametrizations["weight"]  # type: ignore[index]
        number = next(i for i, p in enumerate(chain) if p is e)  # type: ignore[arg-type]
        prefix = f"{self.name}." if self.name else ""
        prefix += "parametrizations.weight."
        if merged:
            between = {"reference_norm": getattr(e, "reference_norm", torch.zeros(()))}
        else:
            between = {"skew_in": e.skew_in, "skew_out": e.skew_out}
        if quantised:
            n, m = e.perm_out.size, e.perm_in.size
            number_like = torch.zeros(())
            have = number_like, torch.empty((n, groups_of(m)), device="meta"), number_like
            if e.quantised:
                have = e.reference_norm, e.scale, e.merges  # type: ignore[assignment]
            between |= zip(QUANTISED, have, strict=True)
        return {
            f"{prefix}original": stored_weight(self.linear),
            **{f"{prefix}{number}.{name}": tensor for name, tensor in between.items()},
            f"{prefix}{number}.layout": e.layout,
        }

    @property
    def gain_keys(self) -> dict[str, str]:
        """The names of gains by the keys that they have, or would have; the same in both forms."""
        *_, layout = self.own
        return {layout.removesuffix("layout") + name: name for name in GAINS}

    @property
    def quantised_keys(self) -> list[str]:
        """The keys that what belongs to an int8 weight has, or would have."""
        *_, layout = self.own
        return [layout.removesuffix("layout") + name for name in QUANTISED]

    @property
    def gains(self) -> dict[str, Tensor]:
        """The layer's gains by their keys."""
        found = self.equivalence.gains
        return {key: found[name] for key, name in self.gain_keys.items() if name in found}


def _before_load(
    module: nn.Module, state: State, prefix: str, metadata: Any, strict: bool, *_: Any
) -> None:
    fit_names(state, module, prefix)
    load = _Load(module, state, prefix)
    if load.problems:
        problems = (problem.replace("_orig_mod.", "") for problem in dict.fromkeys(load.problems))
        raise IncompatibleStateError("nothing has been loaded:\n  " + "\n  ".join(problems))
    if not prefix and any(equivalence.interrupted for equivalence in load.equivalences):
        # Dynamo leaves a frame uncompiled for good once tracing it has met the refusal.
        torch.compiler.reset()
    for equivalence in load.equivalences:
        equivalence.interrupted = True  # until its tensors have been written
    for permutation, (seed, draw) in load.draws.items():
        permutation.redraw(seed, draw)
    if equivalence_of(module) is not None:
        for layer in load.plain:
            _convert(layer, state)
        for layer, layout in load.other_form:
            _convert_form(layer, layout, state)
        for layer in load.other_base:
            _convert_base(layer, state)


class _Load:
    """What a state dict does to the prepared layers below a module.

    Attributes:
        problems: why it cannot be loaded.
        equivalences: of the layers that it writes.
        plain: the layers for which it holds a plain weight.
        other_form: the layers whose tensors it holds in the other form, and their layout.
        other_base: the layers of which it holds a dense weight where theirs is int8, or an int8
            one where theirs is dense.
        draws: seed and draw of the permutations that change.
    """

    def __init__(self, module: nn.Module, state: State, prefix: str):
        self.problems: list[str] = []
        self.equivalences: set[OrthogonalEquivalence] = set()
        self.plain: list[_Layer] = []
        self.other_form: list[tuple[_Layer, Layout]] = []
        self.other_base: list[_Layer] = []
        self.draws: dict[Permutation, tuple[int, int]] = {}
        saved: dict[OrthogonalEquivalence, Layout] = {}
        names: dict[OrthogonalEquivalence, str] = {}
        for layer in _layers(module, prefix):
            self._read(layer, state, saved)
            names.setdefault(layer.equivalence, layer.name)
        if not self.problems:
            self._draw(saved, names)
        self.equivalences.update(saved)

    def _read(self, layer: _Layer, state: State, saved: dict[Any, Layout]) -> None:
        e, own = layer.equivalence, layer.own
        found = [key for key in layer.tensors(merged=False, quantised=False) if key in state]
        int8 = state[found[0]].dtype == torch.int8 if found else False
        if layer.plain in state and not found:
            if reason := _unfit(state[layer.plain], layer):
                self.problems.append(reason)
            self.plain.append(layer)
            self.equivalences.add(e)
        elif found:
            gains = [key for key in layer.gain_keys if key in state]
            if gains != [*layer.gains]:
                there = ", ".join(key.rpartition(".")[2] for key in gains) or "no gains"
                self.problems.append(
                    f"{layer.name}: {there} in the state, and gains={e.config.gains!r} here: "
                    f"prepare the same model with the configuration of the checkpoint. {CONVERT}"
                )
                return
            *_, key = own
            layout = Layout.of(state[key], key) if key in state and not state[key].is_meta else None
            if layout is not None:
                own = layer.tensors(layout.natural, int8)
            if missing := [key for key in own if key not in state]:
                self.problems.append(
                    f"{layer.name}: the state has {found[0]} and not {', '.join(missing)}, "
                    "and a part of them means nothing: load all of them"
                )
                return
            if layout is None:
                return
            if different := e.here.differences(layout):
                self.problems.append(
                    f"{layer.name}: {'; '.join(different)}: prepare the same model with the "
                    f"configuration of the checkpoint and the same `shared`. {CONVERT}"
                )
                return
            for key, tensor in (own | layer.gains).items():
                if state[key].shape != tensor.shape:
                    self.problems.append(
                        f"{key}: size mismatch: {list(state[key].shape)} was saved, the model has "
                        f"{list(tensor.shape)}: build the model that was saved"
                    )
            if layout.natural != e.merged or int8 != e.quantised:
                if any(is_traceable_wrapper_subclass(state[key]) for key in own):
                    self.problems.append(
                        f"{layer.name}: its tensors are sharded and of the other form "
                        "(merge_interval=1, or a larger one; base), to which whole tensors alone "
                        "are converted: load a gathered state"
                    )
                elif layout.natural != e.merged:
                    self.other_form.append((layer, layout))
                else:
                    self.other_base.append(layer)
            saved[e] = layout

    def _draw(self, saved: dict[OrthogonalEquivalence, Layout], names: dict[Any, str]) -> None:
        """Find the permutations that change; all layers of such a one have to change with it."""
        wanted: dict[Permutation, dict[tuple[int, int], str]] = {}
        for e, layout in saved.items():
            for side in e.sides:
                draws = wanted.setdefault(side.permutation, {})
                draws.setdefault((layout.seed, layout.draw(side.name)), names[e])
        outside = share_permutations_with(saved)
        for permutation, draws in wanted.items():
            first, *others = draws.items()
            if others:
                self.problems.append(
                    f"{first[1]} and {others[0][1]} share a permutation and were saved at "
                    f"different draws of it, {first[0]} and {others[0][0]} (seed, draw): load "
                    "what was saved together"
                )
            elif first[0] != (permutation.seed, permutation.draw):
                left = [e for e in outside if any(permutation is s.permutation for s in e.sides)]
                if left:
                    known = [names[e] for e in left if e in names]
                    self.problems.append(
                        f"{first[1]} was saved at another draw of a permutation than the model "
                        f"has, and {known[0] if known else f'{len(left)} layer(s)'} sharing it "
                        "would keep a weight in the old order: load the whole model, or "
                        "poetx.plain_state_dict of the part's state"
                    )
                self.draws[permutation] = first[0]


def _layers(module: nn.Module, prefix: str) -> Iterator[_Layer]:
    """Every prepared layer of `module` under every name it has."""
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, nn.Linear) and (e := equivalence_of(part)) is not None:
            yield _Layer(f"{prefix}{name}".rstrip("."), part, e)


def _unfit(weight: Any, layer: _Layer) -> str | None:
    """Why a plain weight cannot be stored in a layer, or ``None``."""
    shape = list(stored_weight(layer.linear).shape)
    if is_traceable_wrapper_subclass(weight):
        return (
            f"{layer.plain} is a {type(weight).__name__}, which cannot be permuted: give the whole "
            "weight, in every process"
        )
    if list(weight.shape) != shape:
        return f"{layer.plain}: size mismatch: {list(weight.shape)} for a weight of {shape}"
    return None


def _convert(layer: _Layer, state: State) -> None:
    """Put the prepared form of a plain weight in its place in the state dict."""
    weight, e = state.pop(layer.plain), layer.equivalence
    dtype, device = rotation_dtype(weight.dtype), weight.device
    if e.merged:
        between = [norm_of(weight)]
    else:
        between = [torch.zeros(skew.shape, dtype=dtype, device=device) for skew in e.skews]
    stored = e.stored_form(weight)
    if e.merges is not None:
        stored, *of_int8 = _quantised(stored, e)
        between += of_int8
    values = (stored, *between, e.here.tensor().to(device))
    for (key, own), value in zip(layer.own.items(), values, strict=True):
        state[key] = shard_like(value, own)
    for key, own in layer.gains.items():  # those of the other form stay
        ones = torch.ones(own.shape, dtype=dtype, device=device)
        state.setdefault(key, shard_like(ones, own))


@torch.no_grad()
def _convert_form(layer: _Layer, layout: Layout, state: State) -> None:
    """Put a layer's tensors in the form of the model in the place of those of the other one.

    The permutations are those that were saved, and in force by now.
    """
    stored, *skews, _ = (state.pop(key) for key in layer.tensors(layout.natural, quantised=False))
    _, scale, _ = (state.pop(key, None) for key in layer.quantised_keys)
    state[layer.plain] = layout.effective(stored, *skews, scale=scale)
    _convert(layer, state)


@torch.no_grad()
def _convert_base(layer: _Layer, state: State) -> None:
    """Put a layer's weight in the form that the model stores it in, in the place of the other."""
    e, (original, *_) = layer.equivalence, layer.own
    if e.quantised:
        made = _quantised(state[original], e)
        state.update(zip((original, *layer.quantised_keys), made, strict=True))
    else:
        _, scale, _ = (state.pop(key) for key in layer.quantised_keys)
        state[original] = dequantize(state[original], scale, scale.dtype)


def _quantised(stored: Tensor, e: OrthogonalEquivalence) -> list[Tensor]:
    """A weight in stored order as int8, and what belongs to it, in the order of `QUANTISED`."""
    assert e.merges is not None
    weight, scale = quantize(stored, stored.dtype)
    return [weight, norm(weight, scale), scale, e.merges.clone()]
