"""`OrthogonalEquivalence`: the parametrization ``W = R W₀ P`` of one `nn.Linear` weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from poetx_compile import ops
from poetx_compile.config import POETXConfig
from poetx_compile.distributed.shards import is_sharded
from poetx_compile.distributed.wrappers import check_reduced
from poetx_compile.errors import InterruptedMergeError, ParallelismError
from poetx_compile.layers import effective
from poetx_compile.layers.aside import Aside, set_aside
from poetx_compile.layers.integrity import (
    INTERRUPTED,
    check_layouts,
    check_stored_weights,
    readable,
)
from poetx_compile.layers.layout import SIZE, Layout
from poetx_compile.layers.permutation import Permutation
from poetx_compile.layers.registry import registry
from poetx_compile.layers.resting import zero_skews
from poetx_compile.layers.seal import Seal
from poetx_compile.layers.sides import Side, side_blocks
from poetx_compile.ops.dequantize import groups_of, norm, quantize
from poetx_compile.ops.gains import GAINS
from poetx_compile.ops.packing import packed_size
from poetx_compile.ops.permute import pair_index
from poetx_compile.ops.precision import rotation_dtype

_SKEWS = ("skew_in", "skew_out")

QUANTISED = ("reference_norm", "scale", "merges")
"""The buffers of a layer whose stored weight is int8."""

NOT_GATHERED = (
    "the weight of a sharded layer was read outside of the forward of the module that was given to "
    "fully_shard. With `from poetx_compile.inspect.diagnostics import effective_weight`, "
    "effective_weight(linear) gathers it. (If the layer is split by tensor parallelism: that is "
    "not supported, leave it out of the plan.)"
)
NOT_ASSIGNED = (
    "the weight of a sharded layer cannot be assigned: give the whole weight to "
    "model.load_state_dict({'name.weight': tensor}, strict=False), which keeps each process's part"
)
CAST = (
    "a mixed precision policy of FSDP2 cast them. Call "
    "poetx_compile.fully_shard_rotations(module) before fully_shard(module, mp_policy=...)"
)


def norm_of(weight: Tensor) -> Tensor:
    """The Frobenius norm of a weight, summed in fp32 at least."""
    return torch.linalg.vector_norm(weight.detach(), dtype=rotation_dtype(weight.dtype))


def mark_interrupted(layers: Iterable[OrthogonalEquivalence], interrupted: bool) -> None:
    """Set `interrupted` of many layers."""
    more = 0
    try:
        for e in layers:
            aside = vars(e)["_aside"]
            more += interrupted - aside["_interrupted"]
            aside["_interrupted"] = interrupted
    finally:
        registry.note_interrupted(more)


class OrthogonalEquivalence(nn.Module):
    """Parametrization of a weight [n, m] by two block-diagonal rotations under permutations.

    ``W[perm_out][:, perm_in] = D_outᵀ S D_inᵀ``: S is the frozen weight, stored permuted; the
    rotations come from the packed skew parameters (POET, arXiv 2603.05500). With gains the weight
    is ``diag(gain_out) W diag(gain_in)``, in the natural order of the coordinates.

    In the *merged form* (``merge_interval=1``) the weight is stored in its natural order and *is*
    the effective weight. The skew parameters are zero whenever the model runs, share the memory of
    one zero (`rest`), are not saved, and hold values within an optimiser's step alone.

    Parameters:
        skew_in: [blocks_in, b_in(b_in−1)/2], float32 (float64 for a float64 weight); zero is the
            identity.
        skew_out: the same of the output side.
        gain_in: [m] of the same dtype, or ``None``; one is the identity.
        gain_out: [n], the same.

    Buffers:
        layout: int64 [11], saved (`Layout`): the permutations follow from it.
        reference_norm: in the merged form and with ``base="int8"``, saved: the Frobenius norm that
            the weight was given, a scalar of the rotations' dtype, NaN until it has values. Steps
            and merges keep it but for rounding (`diagnostics`).
        scale: with ``base="int8"`` alone, saved: the scales of the stored weight, [n, ⌈m/64⌉]
            (`ops.dequantize`). Their dtype is that of the effective weight.
        merges: beside it, saved: how often the stored weight was merged, int64, a counter of
            stochastic rounding.

    Attributes:
        interrupted: a merge or a load of this layer was cut off.
        adopted: the compiler made it, not `prepare`.
        written: the weight has been stored since an optimiser last looked at it.
        takes_stored: the weight given to `right_inverse` is in its stored form already.
        loads: how often a state was loaded; rotations are others then than an optimiser made them.
    """

    layout: Tensor
    reference_norm: Tensor
    scale: Tensor | None
    merges: Tensor | None
    gain_in: nn.Parameter | None
    gain_out: nn.Parameter | None

    # What steps, merges and loads change.
    written = Aside()
    takes_stored = Aside()
    loads = Aside()
    _interrupted = Aside()
    _layout_version = Aside()
    _seal = Aside()
    _has_norm = Aside()

    def __init__(
        self, weight: Tensor, config: POETXConfig, perm_in: Permutation, perm_out: Permutation
    ):
        super().__init__()
        out_features, in_features = weight.shape
        self.blocks_in, self.block_in = side_blocks(in_features, config.block_in)
        self.blocks_out, self.block_out = side_blocks(out_features, config.block_out)
        self.order = config.order
        self._interrupted = False
        self.adopted = False
        self.takes_stored = False
        self.loads = 0
        self._layout_version = None
        self._seal = None
        self._zeros: Tensor | None = None
        self._rests: list[Tensor] | None = None  # the views of it that the parameters are at rest
        self._has_norm = False
        dtype = rotation_dtype(weight.dtype)
        sizes = [
            (self.blocks_in, packed_size(self.block_in)),
            (self.blocks_out, packed_size(self.block_out)),
        ]
        zeros, self._zeros = zero_skews(sizes, dtype, weight.device, rest=config.merged)
        # FSDP2 reduces no empty gradient.
        self.skew_in = nn.Parameter(zeros[0], requires_grad=self.blocks_in > 0)
        self.skew_out = nn.Parameter(zeros[1], requires_grad=self.blocks_out > 0)
        for side, size in (("in", in_features), ("out", out_features)):
            gain = torch.ones(size, dtype=dtype, device=weight.device)
            gained = side in config.gained_sides
            self.register_parameter(f"gain_{side}", nn.Parameter(gain) if gained else None)
        self.perm_in, self.perm_out = perm_in, perm_out
        self.register_buffer("layout", torch.zeros(SIZE, dtype=torch.int64, device=weight.device))
        scale = merges = None
        if config.base == "int8":
            scale = weight.new_ones(out_features, groups_of(in_features), requires_grad=False)
            merges = torch.zeros((), dtype=torch.int64, device=weight.device)
        self.register_buffer("scale", scale)
        self.register_buffer("merges", merges)
        self.configure(config)
        self.write_layout()

    def configure(self, config: POETXConfig) -> None:
        """Set the configuration; its blocks, order and permutations are those of this state."""
        self.config, self.merge_rotation = config, config.merge_rotation
        self.merged = config.merged  # no property: Dynamo guards those of a class at every call
        if self.merged or self._zeros is not None:  # adopted with a configuration of the other form
            self.rest()
        if self.drifts != ("reference_norm" in self._buffers):
            self._note_form()
        self._announce()

    def _note_form(self) -> None:
        """Have the buffer that the form has."""
        if not self.drifts:
            del self.reference_norm
            return
        unknown = torch.full((), math.nan, dtype=self.skew_in.dtype, device=self.skew_in.device)
        self.register_buffer("reference_norm", unknown)
        self._has_norm = False

    def note_norm(self, stored: Tensor) -> None:
        """Note the norm of the stored weight where it drifts, unless it is noted already."""
        if not self._has_norm and self.drifts and readable(stored):
            with torch.no_grad():
                self.reference_norm.copy_(self.norm(stored))
            self._has_norm = True

    @property
    def interrupted(self) -> bool:
        """Whether a merge, a step or a load of this layer was cut off."""
        return bool(self._interrupted)

    @interrupted.setter
    def interrupted(self, interrupted: bool) -> None:
        mark_interrupted([self], interrupted)

    @property
    def drifts(self) -> bool:
        """Whether rounding adds up in the stored weight."""
        return self.merged or self.quantised

    def norm(self, stored: Tensor) -> Tensor:
        """The Frobenius norm of the stored weight."""
        return norm_of(stored) if self.scale is None else norm(stored, self.scale)

    def rest(self) -> None:
        """Let the skew parameters be zeros: in the merged form those that take no bytes."""
        skews = self.skews
        if is_sharded(*skews):
            return
        dtype, device = skews[0].dtype, skews[0].device
        zeros = self._rests
        if zeros is None or not self.merged or (zeros[0].dtype, zeros[0].device) != (dtype, device):
            zeros, self._zeros = zero_skews(
                [skew.shape for skew in skews], dtype, device, rest=self.merged, kept=self._zeros
            )
            self._rests = None if self._zeros is None else zeros
        for skew, zero in zip(skews, zeros, strict=True):
            skew.data = zero

    def _announce(self) -> None:
        """Be found, and let those who look after layers look again."""
        self.written = True
        self._own = id(self.skew_in), id(self.layout)
        registry.announce(self)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_zeros": None, "_rests": None, "_aside": dict(vars(self)["_aside"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_aside()
        for name in GAINS:
            self._parameters.setdefault(name, None)  # pickled before there were any
        for name in ("scale", "merges"):
            self._buffers.setdefault(name, None)
        self._layout_version = None  # a copy counts its versions anew
        if self.merged:
            self.rest()
        self._announce()

    def _set_aside(self) -> None:
        """Have what an older version pickled, where it is now."""
        own = vars(self)
        own["merged"] = self.config.merged
        if "interrupted" in own:
            own["_interrupted"] = own.pop("interrupted")
        set_aside(self)
        registry.note_interrupted(self.interrupted)

    def forward(self, stored: Tensor) -> Tensor:
        """The effective weight [n, m] of the stored one; differentiable in the skew parameters.

        Raises:
            ParallelismError: the parameters are sharded here and not gathered, or were cast.
        """
        if is_sharded(stored, self.skew_in, self.skew_out):
            raise ParallelismError(NOT_GATHERED)
        if self.skew_in.dtype not in (torch.float32, torch.float64):
            raise ParallelismError(f"rotations arrive in {self.skew_in.dtype}: {CAST}")
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            parameters = self.skew_in, self.skew_out, self.gain_in, self.gain_out
            return self.effective(stored, *parameters)
        check_reduced(self.skew_in, self.skew_out)  # the backend does so with what it compiles
        if self.interrupted:
            raise InterruptedMergeError(INTERRUPTED)
        return effective.read(self, stored)

    def effective(
        self,
        stored: Tensor,
        skew_in: Tensor,
        skew_out: Tensor,
        gain_in: Tensor | None,
        gain_out: Tensor | None,
    ) -> Tensor:
        """The effective weight of tensors that stand for this layer's parameters."""
        # Compiled code is guarded by one flag, not by the mark of each layer.
        if registry.some_interrupted and self.interrupted:
            raise InterruptedMergeError(INTERRUPTED)
        # FSDP2 reduces no empty gradient, also after `requires_grad_(True)`.
        if skew_in.requires_grad and not self.blocks_in:
            skew_in = skew_in.detach()
        if skew_out.requires_grad and not self.blocks_out:
            skew_out = skew_out.detach()
        if self.merged:
            return ops.identity_equivalence(
                stored,
                skew_in,
                skew_out,
                self.perm_in.pair,
                self.perm_out.pair,
                self.block_in,
                self.block_out,
                gain_in,
                gain_out,
            )
        return ops.orthogonal_equivalence(
            stored,
            skew_in,
            skew_out,
            self.perm_in.pair,
            self.perm_out.pair,
            self.block_in,
            self.block_out,
            self.order,
            gain_in,
            gain_out,
            self.scale,
        )

    def holds(self, stored: Tensor) -> bool:
        """Whether parameters of this layer's own are in force: no stand-ins, none just gathered."""
        ours = isinstance(stored, nn.Parameter) and self._own[0] == id(self.skew_in)
        return ours and not (stored.is_inference() or self.skew_in.is_inference())

    @property
    def skews(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The packed skew parameters of the input and of the output side."""
        own = self._parameters  # as in `stored_weight`
        return own["skew_in"], own["skew_out"]  # type: ignore[return-value]

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The permutation pairs of the input and of the output side, as they are now."""
        perms = self._modules  # as in `stored_weight`
        return perms["perm_in"]._buffers["pair"], perms["perm_out"]._buffers["pair"]  # type: ignore[union-attr, return-value]

    @property
    def gains(self) -> dict[str, nn.Parameter]:
        """The gains there are, by name."""
        found = {name: getattr(self, name) for name in GAINS}
        return {name: gain for name, gain in found.items() if gain is not None}

    @property
    def sides(self) -> tuple[Side, Side]:
        """The input and the output side, as they are now."""
        return (
            Side("in", self.skew_in, self.perm_in, self.blocks_in, self.block_in),
            Side("out", self.skew_out, self.perm_out, self.blocks_out, self.block_out),
        )

    @property
    def trains(self) -> bool:
        """Whether a rotation of this layer takes gradients."""
        return self.skew_in.requires_grad or self.skew_out.requires_grad

    def train(self, mode: bool = True) -> OrthogonalEquivalence:
        effective.free(self)
        return super().train(mode)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The stored form of a new weight; rotations and gains go back to the identity.

        Raises:
            ValueError: a weight of another shape.
            ParallelismError: the parameters are sharded.
        """
        if self.takes_stored:
            return weight
        if is_sharded(self.skew_in):
            raise ParallelismError(NOT_ASSIGNED)
        with torch.no_grad():
            stored = self.stored_form(weight)
            if self.quantised:
                stored = self.quantise(stored)
            if not self.merged:
                self.skew_in.zero_()
                self.skew_out.zero_()
            self._put_gains_to_one()
        if not torch.compiler.is_compiling():  # Dynamo would guard the number
            self.assigned()
            self.note_norm(stored)
        self._seal = None
        return stored

    def _put_gains_to_one(self) -> None:
        for gain in self.gains.values():
            gain.fill_(1)

    def assigned(self) -> None:
        """The weight has got other values: let those who look after layers look again."""
        registry.changed()
        self.written = True
        self._has_norm = False

    def stored_form(self, weight: Tensor) -> Tensor:
        """A copy of a weight as it is stored: ``weight[perm_out][:, perm_in]``, contiguous, on the
        device of `weight`; in the merged form in its natural order.

        Raises:
            ValueError: a weight of another shape.
        """
        n, m = shape = (self.perm_out.size, self.perm_in.size)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"a weight of shape {list(weight.shape)} is not one of {[n, m]}: assign one of the "
                "layer's shape"
            )
        if self.merged:
            return weight.detach().clone(memory_format=torch.contiguous_format)
        rows = pair_index(self.perm_out.pair_on(weight.device), 0, n)
        columns = pair_index(self.perm_in.pair_on(weight.device), 0, m)
        return weight.detach().index_select(0, rows).index_select(1, columns)

    @property
    def quantised(self) -> bool:
        """Whether the stored weight is int8 (``base="int8"``)."""
        return self.scale is not None

    @torch.no_grad()
    def quantise(self, stored: Tensor) -> Tensor:
        """A weight in stored order as int8, to the nearest; its scales become the layer's."""
        assert self.scale is not None
        quantised, scale = quantize(stored, self.scale.dtype)
        self.scale.copy_(scale)
        return quantised

    def dequantised(self, stored: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The stored weight in floating point, as it is where it is dense."""
        if self.scale is None:
            return stored
        return ops.dequantize(stored, self.scale, dtype or self.scale.dtype)

    @property
    def seed(self) -> int:
        """Seed of the permutations."""
        return self.perm_in.seed

    @property
    def draw(self) -> int:
        """The newest draw in force: 0 is the identity, each redraw adds one.

        A permutation that a redraw leaves alone (`redrawn`) stays at the draw it has.
        """
        return max(self.perm_in.draw, self.perm_out.draw)

    @property
    def here(self) -> Layout:
        """The layout in force."""
        p, q = self.perm_in, self.perm_out
        blocks = self.config.block_in, self.config.block_out
        drawn = p.seed, p.draw, q.draw, p.group, q.group, p.kind
        return Layout(*drawn, self.order, *blocks, natural=self.merged)

    def layout_values(self) -> list[int]:
        """What the buffer `layout` says of the permutations in force."""
        return self.here.values()

    def write_layout(self) -> None:
        """Bring the saved buffer up to date with the permutations."""
        self.layout.copy_(self.here.tensor())
        self._layout_version = None if self.layout.is_inference() else self.layout._version

    def check_layout(self) -> None:
        """Raise `IncompatibleStateError` where something else has written the saved buffer.

        It is read, which waits for the device, only after it was written.
        """
        if self._own[1] != id(self.layout):
            return  # the stand-in of a functional call
        version = None if self.layout.is_inference() else self.layout._version
        if version is None or version != self._layout_version:
            check_layouts([self])
            self._layout_version = version

    def seal(self, stored: Tensor) -> None:
        """Note what the stored weight is: this package has just written it, or trusts it."""
        self._seal = None if self.merged else Seal.of(stored)

    def seal_broken(self, stored: Tensor) -> Tensor | None:
        """Whether the stored weight has changed since; ``None`` where that cannot be told."""
        return None if self._seal is None else self._seal.broken(stored)

    def check_stored(self, stored: Tensor) -> None:
        """`check_stored_weights` of this layer, where it can be looked at now."""
        if readable(stored):
            check_stored_weights([(self, stored)])

    def _apply(self, fn: Any, recurse: bool = True) -> OrthogonalEquivalence:
        # Rotations in half precision drift by tens of per cent (docs/numerics.md): a move to
        # another device is followed, a cast below fp32 is not, nor one of the layout. The scales of
        # an int8 weight have the dtype of the effective one.
        scale = self.scale

        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            if t is scale:
                return moved
            dtype = rotation_dtype(moved.dtype) if t.is_floating_point() else t.dtype
            return moved if moved.dtype == dtype else t.to(moved.device, dtype)

        was_meta = self.skew_in.is_meta
        applied = super()._apply(keep_precision, recurse)
        self._layout_version = None
        came_from_meta = was_meta and not self.skew_in.is_meta
        if self.merged or came_from_meta:  # `to_empty`: there was no rotation to lose
            self.rest()
        if came_from_meta:
            with torch.no_grad():
                self._put_gains_to_one()
                self.write_layout()
            self._seal = None
            self._has_norm = False
        self._announce()  # torch may be told to make new parameters
        return applied

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.interrupted:
            raise InterruptedMergeError(INTERRUPTED)
        self.check_layout()
        parent = prefix[:-1].rpartition(".")[
            0
        ]  # the list of parametrizations, which is saved first
        stored = destination.get(f"{parent}.original" if parent else "original")
        if stored is not None:
            self.check_stored(stored)
            self.note_norm(stored)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _SKEWS if self.merged else ():
            del destination[prefix + name]

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        # What does not fit has been refused before anything was written (`loading`).
        resting = {name: self._parameters.pop(name) for name in _SKEWS if self.merged}
        try:
            super()._load_from_state_dict(
                state_dict, prefix, metadata, strict, missing, unexpected, errors
            )
        finally:
            self._parameters.update(resting)
        if self.merged and self.skew_in.dtype != self.reference_norm.dtype:  # `assign=True`
            for skew in self.skews:
                skew.data = skew.data.to(self.reference_norm.dtype)
            self.rest()
        for side in self.sides:
            if side.permutation.pair.is_meta:
                side.permutation.move_to(side.skew.device)
        self._announce()  # `assign=True` has made new parameters
        self._seal = None
        self.loads += 1
        if prefix + "layout" in state_dict:
            self._has_norm = True
            self._layout_version = None
            self.check_layout()
            self.interrupted = False

    def extra_repr(self) -> str:
        blocks = ", ".join(f"{side.name}={side.blocks}x{side.block}" for side in self.sides)
        gains = f", gains={self.config.gains}" if self.gains else ""
        return f"{blocks}, order={self.order}, draw={self.draw}{gains}"
