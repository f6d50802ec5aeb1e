"""`OrthogonalEquivalence`: the parametrization ``W = R W₀ P`` of one `nn.Linear` weight."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poetx_compile import ops
from poetx_compile.config import POETXConfig
from poetx_compile.errors import (
    IncompatibleStateError,
    InterruptedMergeError,
    ParallelismError,
)
from poetx_compile.ops.packing import packed_size
from poetx_compile.ops.permute import pair_index
from poetx_compile.ops.precision import rotation_dtype
from poetx_compile.permutation import Permutation
from poetx_compile.shards import is_sharded
from poetx_compile.wrappers import check_reduced

INTERRUPTED = (
    "a merge was cut off by an exception: some layers are merged, some are not. "
    "Load the last checkpoint into the model (load_state_dict) before going on."
)

NOT_GATHERED = (
    "the weight of a sharded layer was read outside of the forward of the module that was given to "
    "fully_shard: poetx_compile.diagnostics.effective_weight(linear) gathers it. (If the layer is "
    "split by tensor parallelism: that is not supported, leave it out of the plan.)"
)
CAST = (
    "a mixed precision policy of FSDP2 cast them. Call "
    "poetx_compile.fully_shard_rotations(module) before fully_shard(module, mp_policy=...)"
)

_FORMAT = 1
_KINDS = ("random", "chunked")

_alive: weakref.WeakValueDictionary[int, OrthogonalEquivalence] = weakref.WeakValueDictionary()
"""Every parametrization by its id, which is what a compiled graph knows of the module."""


def side_blocks(size: int, block_size: int) -> tuple[int, int]:
    """(number of blocks, b) of a side: a side shorter than b is one block; size 1 has no block."""
    b = min(size, block_size)
    return (0, 1) if size < 2 else (size // b, b)


class OrthogonalEquivalence(nn.Module):
    """Parametrization of a weight [n, m] by two block-diagonal rotations under permutations.

    ``W[perm_out][:, perm_in] = D_outᵀ S D_inᵀ``: S is the frozen weight, stored permuted once a
    merge; the rotations come from the packed skew parameters (POET, arXiv 2603.05500).

    Parameters:
        skew_in: [blocks_in, b_in(b_in−1)/2], float32 (float64 for a float64 weight); zero is the
            identity.
        skew_out: the same of the output side.

    Buffers:
        layout: int64 [7], saved: format, seed, draw, group of the input side, group of the output
            side, kind of permutation, order of the expansion (0: exact). The permutations
            themselves follow from it.

    Attributes:
        interrupted: a merge of this layer was cut off.
        adopted: the compiler made it, not `prepare`.
        takes_stored: the weight given to `right_inverse` is in its stored form already.
    """

    layout: Tensor

    def __init__(
        self, weight: Tensor, config: POETXConfig, perm_in: Permutation, perm_out: Permutation
    ):
        super().__init__()
        out_features, in_features = weight.shape
        self.blocks_in, self.block_in = side_blocks(in_features, config.block_in)
        self.blocks_out, self.block_out = side_blocks(out_features, config.block_out)
        self.order = config.order
        self.interrupted = False
        self.adopted = False
        self.takes_stored = False
        dtype = rotation_dtype(weight.dtype)

        def zeros(blocks: int, b: int) -> nn.Parameter:
            packed = torch.zeros(blocks, packed_size(b), dtype=dtype, device=weight.device)
            return nn.Parameter(packed, requires_grad=blocks > 0)  # FSDP2 reduces no empty gradient

        self.skew_in = zeros(self.blocks_in, self.block_in)
        self.skew_out = zeros(self.blocks_out, self.block_out)
        self.perm_in, self.perm_out = perm_in, perm_out
        self.register_buffer("layout", torch.zeros(7, dtype=torch.int64, device=weight.device))
        self.write_layout()
        self.configure(config)
        _alive[id(self)] = self

    def configure(self, config: POETXConfig) -> None:
        """Set the configuration; its blocks, order and permutations are those of this state."""
        self.config, self.merge_rotation = config, config.merge_rotation

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _alive[id(self)] = self

    def forward(self, stored: Tensor) -> Tensor:
        """The effective weight [n, m] of the stored one; differentiable in the skew parameters.

        Raises:
            ParallelismError: the parameters are sharded here and not gathered, or were cast.
        """
        for tensor in (stored, self.skew_in, self.skew_out):
            if is_sharded(tensor):
                raise ParallelismError(NOT_GATHERED)
        if self.skew_in.dtype not in (torch.float32, torch.float64):
            raise ParallelismError(f"rotations arrive in {self.skew_in.dtype}: {CAST}")
        if not torch.compiler.is_compiling():  # the backend does the same with what it compiles
            check_reduced(self.skew_in, self.skew_out)
        return self.effective(stored, self.skew_in, self.skew_out)

    def effective(self, stored: Tensor, skew_in: Tensor, skew_out: Tensor) -> Tensor:
        """The effective weight of tensors that stand for this layer's parameters."""
        if self.interrupted:
            raise InterruptedMergeError(INTERRUPTED)
        return ops.orthogonal_equivalence(
            stored,
            skew_in,
            skew_out,
            self.perm_in.pair,
            self.perm_out.pair,
            self.block_in,
            self.block_out,
            self.order,
        )

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The stored form of a new weight; the rotations go back to the identity."""
        if self.takes_stored:
            return weight
        with torch.no_grad():
            self.skew_in.zero_()
            self.skew_out.zero_()
            return self.permuted(weight)

    def permuted(self, weight: Tensor) -> Tensor:
        """``weight[perm_out][:, perm_in]``, contiguous."""
        n, m = weight.shape
        rows = weight.detach().index_select(0, pair_index(self.perm_out.pair, 0, n))
        return rows.index_select(1, pair_index(self.perm_in.pair, 0, m))

    @property
    def seed(self) -> int:
        """Seed of the permutations."""
        return self.perm_in.seed

    @property
    def draw(self) -> int:
        """Which draw of the permutations is in force: 0 is the identity, each merge adds one."""
        return self.perm_in.draw

    def _shared(self) -> list[int]:
        """What a checkpoint must share: groups of both sides, kind, order of the expansion."""
        kind = _KINDS.index(self.perm_in.kind)
        return [self.perm_in.group, self.perm_out.group, kind, self.order or 0]

    def layout_values(self) -> list[int]:
        """What the buffer `layout` says of the permutations in force."""
        return [_FORMAT, self.seed, self.draw, *self._shared()]

    def write_layout(self) -> None:
        """Bring the saved buffer up to date with the permutations."""
        values = torch.tensor(self.layout_values(), dtype=torch.int64, device="cpu")
        self.layout.copy_(values)

    def _apply(self, fn: Any, recurse: bool = True) -> OrthogonalEquivalence:
        # Rotations in half precision drift by tens of per cent (docs/numerics.md): a move to
        # another device is followed, a cast below fp32 is not.
        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            narrowed = t.is_floating_point() and moved.dtype != rotation_dtype(moved.dtype)
            return t.to(moved.device) if narrowed else moved

        return super()._apply(keep_precision, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.interrupted:
            raise InterruptedMergeError(INTERRUPTED)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        saved = state_dict.get(prefix + "layout")
        if saved is not None:
            version, seed, draw, *rest = saved.tolist()
            here = self._shared()
            if version != _FORMAT:
                errors.append(
                    f"{prefix}layout has format {version}, this version of poetx_compile reads "
                    f"{_FORMAT}: load it with the version that saved it, merge and export"
                )
                return
            if rest != here:
                errors.append(
                    f"{prefix}layout: permutation groups, kind and order {rest} were saved, the "
                    f"model has {here}: prepare the same model with the configuration of the "
                    "checkpoint and the same `shared`"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        if saved is not None:
            self.perm_in.redraw(seed, draw)
            self.perm_out.redraw(seed, draw)
            self.interrupted = False

    def extra_repr(self) -> str:
        return (
            f"in={self.blocks_in}x{self.block_in}, out={self.blocks_out}x{self.block_out}, "
            f"order={self.order}, draw={self.draw}"
        )


def equivalence_with_id(module_id: int | None) -> OrthogonalEquivalence | None:
    """The parametrization whose `id` a graph has noted, or ``None``."""
    return None if module_id is None else _alive.get(module_id)


def equivalence_of(module: nn.Module) -> OrthogonalEquivalence | None:
    """The parametrization of a prepared linear, or ``None``."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    chain = module.parametrizations["weight"]  # type: ignore[index]
    for parametrization in chain:  # type: ignore[union-attr]
        if isinstance(parametrization, OrthogonalEquivalence):
            return parametrization
    return None


def check_layouts(equivalences: Sequence[OrthogonalEquivalence]) -> None:
    """Raise `IncompatibleStateError` where a saved layout is not that of the permutations in force.

    DDP gives every process the buffers of rank 0, these among them: a process that was prepared
    with another seed, or merged when the others did not, finds out without any communication.
    """
    by_device: dict[torch.device, list[OrthogonalEquivalence]] = defaultdict(list)
    for equivalence in equivalences:
        by_device[equivalence.layout.device].append(equivalence)
    for group in by_device.values():
        saved = torch.stack([e.layout for e in group]).tolist()
        for e, values in zip(group, saved, strict=True):
            if values != e.layout_values():
                raise IncompatibleStateError(
                    f"the permutations of this process (layout {e.layout_values()}) are not those "
                    f"of rank 0 ({values}): prepare the model in every process alike, with one "
                    "configuration and seed"
                )


def prepared_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear, OrthogonalEquivalence]]:
    """(name, module, parametrization) of every prepared linear of `model`, each once."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (equivalence := equivalence_of(module)) is not None:
            yield name, module, equivalence


def share_permutations_with(
    equivalences: Iterable[OrthogonalEquivalence],
) -> list[OrthogonalEquivalence]:
    """The layers outside of `equivalences` that have a permutation of theirs.

    A merge draws a permutation again for all layers that have it: they are merged together.
    """
    inside = set(equivalences)
    permutations = {p for e in inside for p in (e.perm_in, e.perm_out)}
    outside = [e for e in _alive.values() if e not in inside]
    return [e for e in outside if e.perm_in in permutations or e.perm_out in permutations]


class PreparedLayers(nn.ModuleList):
    """Prepared linears, of any modules, as one model: for `merge` and what else takes a model."""


def stored_weight(module: nn.Module) -> nn.Parameter:
    """S: the frozen parameter of a prepared linear."""
    return module.parametrizations["weight"].original  # type: ignore[index, union-attr, return-value]
