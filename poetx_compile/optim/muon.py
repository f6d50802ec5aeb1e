"""`POETXMuon`: orthogonalised momentum on the skew blocks, AdamW on everything else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from poetx_compile import ops
from poetx_compile.config import POETXConfig
from poetx_compile.distributed.shards import local
from poetx_compile.errors import ConfigError
from poetx_compile.ops.muon_step import Part, fused, muon_step
from poetx_compile.optim import momentum as stored
from poetx_compile.optim.adamw import adamw_step, fusible
from poetx_compile.optim.blocks import ROTATIONS_BYTES, BlockKind, by_kind, chunks, gather
from poetx_compile.optim.groups import BLOCK, ensure_prepared, param_groups
from poetx_compile.optim.schedule import MergeSchedule, attach


class POETXMuon(torch.optim.Optimizer):
    """Orthogonalised momentum on the skew blocks, and AdamW for the rest; merges in `step()`.

    For each skew block: ``m ← m + (1 − μ)(g − m)``, ``n = g + μ(m − g)`` (Nesterov), n unpacked to
    a skew matrix N, ``Q ← Q − poetx_lr · msign(N)``. Every plane of a block turns by about the same
    angle, 1.5 to 2.1 times `poetx_lr`, and one moment is stored instead of two. Blocks of a size
    are orthogonalised together, in bf16 on CUDA and in fp32 elsewhere. Sharded skew parameters
    hold whole blocks in each process, which turns its own; nothing is communicated.

    With `alternate` both momenta of a layer go on in every step, and one of its sides turns, at
    twice the rate: the inputs of every other layer and the outputs of the rest, then the others.
    A step then orthogonalises half of the blocks, and turns a weight of the merged form from one
    side, in one pass; how fast that is on a GPU has not been measured yet. Rotations grow as fast
    as without, on average.

    Args:
        model: prepared here, with `config`, if nobody has; compiled or not.
        lr: learning rate of the dense parameters.
        poetx_lr: of the skew parameters: the growth of θ in a step; default ``2 · lr`` from b = d/2
            on to ``3 · lr`` at d/16 (`param_groups`).
        config: ``None``, or the configuration of the model.
        momentum: μ in [0, 1). It is what torch's OneCycleLR and CyclicLR cycle; `betas` stay.
        momentum_dtype: in which the momentum of the rotations is kept: ``torch.float32`` (fp64
            where they are), ``torch.bfloat16``, or ``torch.int8`` with a scale for each 256 values;
            or their names. The narrow ones are rounded stochastically. A saved state is converted.
        alternate: turn one side of each layer in a step, in turn, at ``2 · poetx_lr``. Whose turn
            it is follows from the number of the step, which is saved.
        betas, eps, weight_decay: of AdamW; `weight_decay` for dense parameters with two dimensions
            or more.
        fused: default: AdamW's fused kernel where every dense parameter is on a CUDA device.
        fused_rotations: on a CUDA device, momentum, direction and rotations of eight parameters in
            one pass each, where they are fp32, for the rest as without it. Experimental: its
            kernels have run in Triton's interpreter and not yet on a device.

    Attributes:
        schedule: the `MergeSchedule`.

    Raises:
        ConfigError: `config` is not the one the model was prepared with; `momentum` or
            `momentum_dtype` out of range.
    """

    schedule: MergeSchedule
    poetx_rule = "muon"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        poetx_lr: float | None = None,
        config: POETXConfig | None = None,
        *,
        momentum: float = 0.95,
        momentum_dtype: torch.dtype | str = torch.float32,
        alternate: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool | None = None,
        fused_rotations: bool = False,
    ):
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum = {momentum!r} is not allowed: use a number in [0, 1)")
        self.momentum_dtype = stored.parse_dtype(momentum_dtype)
        self.alternate = alternate
        self.fused_rotations = fused_rotations
        model = ensure_prepared(model, config)
        groups = param_groups(
            model, lr=lr, poetx_lr=poetx_lr, weight_decay=weight_decay, rule=self.poetx_rule
        )
        dense = [group for group in groups if BLOCK not in group]
        # The inner optimiser has no groups or state of its own: `step` lends it ours.
        self._adamw = torch.optim.AdamW(
            [dict(group) for group in dense] or [{"params": []}],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=fused if fused is not None else fusible(dense),
        )
        # OneCycleLR and CyclicLR cycle `betas` where the defaults have them, else `momentum`.
        defaults = {key: value for key, value in self._adamw.defaults.items() if key != "betas"}
        super().__init__(groups, {**defaults, "momentum": momentum})
        self.schedule = attach(self, model, config)
        self.register_load_state_dict_post_hook(_fit_momentum)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group of dense parameters without `betas` gets those of the others."""
        if BLOCK not in param_group:
            param_group.setdefault("betas", self._adamw.defaults["betas"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; with a closure it is called first, with gradients enabled, and returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        schedule = getattr(self, "schedule", None)  # a copy for a trial has none
        resting = schedule.resting() if self.alternate and schedule is not None else set()
        if schedule is None or schedule.turner is None:
            self._update(resting)
        else:
            schedule.turn_by_batches(self, partial(self._update, resting), resting)
        return loss

    def _update(self, resting: Collection[nn.Parameter] = ()) -> None:
        """One step of all that is in the groups; of `resting` rotations the momentum alone."""
        for group in self.param_groups:
            if BLOCK in group:
                self._turn(group, resting)
        self._adamw.param_groups = [g for g in self.param_groups if BLOCK not in g]
        self._adamw.state = self.state
        adamw_step(self._adamw)

    def _turn(self, group: dict[str, Any], resting: Collection[nn.Parameter]) -> None:
        skews = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
        for skew in skews:
            state = self.state[skew]
            if not state:
                stored.create(state, skew, self.momentum_dtype)
        mu, b = group["momentum"], group[BLOCK]
        rate = group["lr"] * (2 if resting else 1)  # a side turns in every other step
        for turns in (False, True):
            some = [skew for skew in skews if (skew not in resting) == turns]
            for kind, alike in by_kind([(skew, b) for skew in some]).items():
                keep = 1 - rate * group["weight_decay"]
                if self.fused_rotations and self._by_kernels(alike, b, mu, rate, keep, turns):
                    continue
                turned = [local(p) for p in alike] if turns else []
                if turned and keep != 1:
                    torch._foreach_mul_(turned, keep)
                for batch, direction in self._directions(alike, kind, mu, turns):
                    update = ops.orthogonalize_skew(direction, b).mul_(rate)
                    counts = [rows.stop - rows.start for _, rows in batch]
                    torch._foreach_sub_(
                        [turned[i][rows] for i, rows in batch], update.split(counts)
                    )

    def _by_kernels(
        self, alike: Sequence[Tensor], b: int, mu: float, rate: float, keep: float, turns: bool
    ) -> bool:
        """The same, where kernels take these rotations; whether they did."""
        parts = [_part(skew, self.state[skew]) for skew in alike]
        if not fused(parts, b):
            return False
        # As many as the merged form turns at once.
        for batch in chunks([part.skew for part in parts], b, ROTATIONS_BYTES):
            some = [parts[i].of(rows) for i, rows in batch]
            muon_step(some, b, mu, rate, keep, *self._counters(), turns)
        return True

    def _counters(self) -> tuple[int, int]:
        """Seed and step: what the rounding of a narrow momentum follows from."""
        schedule = getattr(self, "schedule", None)  # a copy for a trial has none
        return (0, 0) if schedule is None else (schedule.config.seed, schedule.step)

    def _directions(
        self, alike: Sequence[Tensor], kind: BlockKind, mu: float, wanted: bool
    ) -> Iterator[tuple[stored.Batch, Tensor]]:
        """Bring momenta up to date; the directions that follow, batch by batch, where `wanted`."""
        states = [self.state[p] for p in alike]
        gradients = [local(p.grad) for p in alike if p.grad is not None]
        # Gradients are bf16 where the user has set `Tensor.grad_dtype`.
        narrow = self.momentum_dtype != torch.float32 or any(
            g.dtype != kind.dtype for g in gradients
        )
        directions: Sequence[Tensor] = ()
        if not narrow:
            momenta = [local(state[stored.BUFFER]) for state in states]
            torch._foreach_lerp_(momenta, gradients, 1 - mu)
            if not wanted:
                return
            directions = torch._foreach_lerp(gradients, momenta, mu)
        for batch in chunks(gradients, kind.size):
            if narrow:
                gradient = gather(gradients, batch).to(kind.dtype)
                direction = self._narrow_direction(states, gradient, batch, mu)
            else:
                direction = gather(directions, batch)
            if wanted:
                yield batch, direction

    def _narrow_direction(
        self,
        states: Sequence[stored.State],
        gradient: Tensor,
        batch: Sequence[tuple[int, slice]],
        mu: float,
    ) -> Tensor:
        """The directions of a batch of blocks, whose momentum is brought up to date."""
        momentum = stored.read(states, batch, gradient.dtype).lerp_(gradient, 1 - mu)
        noise = stored.rounding_noise(momentum.shape[1], *self._counters(), momentum.device)
        stored.store(states, batch, momentum, noise)
        return gradient.lerp(momentum, mu)


def _part(skew: Tensor, state: stored.State) -> Part:
    """What this process has of a rotation."""
    assert skew.grad is not None
    scale = local(state[stored.SCALE]) if stored.SCALE in state else None
    return Part(local(skew), local(skew.grad).contiguous(), local(state[stored.BUFFER]), scale)


def _fit_momentum(optimizer: torch.optim.Optimizer) -> None:
    """After a load, which has cast the momenta to the dtype of the rotations."""
    assert isinstance(optimizer, POETXMuon)
    for group in optimizer.param_groups:
        for skew in group["params"] if BLOCK in group else ():
            state = optimizer.state.get(skew)
            if state:
                stored.fit(state, skew, optimizer.momentum_dtype)
