"""`POETXMuon`: orthogonalised momentum on the skew blocks, AdamW on everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from poetx_compile import ops
from poetx_compile._torch import _disable_dynamo
from poetx_compile.config import POETXConfig
from poetx_compile.distributed.shards import is_sharded, local
from poetx_compile.errors import ConfigError
from poetx_compile.ops.muon_step import Part, fused, muon_steps
from poetx_compile.optim import momentum as stored
from poetx_compile.optim.adamw import adamw_step, fusible
from poetx_compile.optim.blocks import ROTATIONS_BYTES, BlockKind, bounded, by_kind, chunks, gather
from poetx_compile.optim.early import StandIns
from poetx_compile.optim.groups import BLOCK, ensure_prepared, param_groups
from poetx_compile.optim.schedule import MergeSchedule, attach
from poetx_compile.optim.turning import Steps


class POETXMuon(torch.optim.Optimizer):
    """Orthogonalised momentum on the skew blocks, and AdamW for the rest; merges in `step()`.

    For each skew block: ``m ← m + (1 − μ)(g − m)``, ``n = g + μ(m − g)`` (Nesterov), n unpacked to
    a skew matrix N, ``Q ← Q − poetx_lr · msign(N)``. Every plane of a block turns by about the same
    angle, 1.5 to 2.1 times `poetx_lr`, and one moment is stored instead of two. Blocks of a size
    are orthogonalised together, in bf16 on CUDA and in fp32 elsewhere. Sharded skew parameters
    hold whole blocks in each process, which turns its own; nothing is communicated.

    With ``turn_every=k`` both momenta of a layer go on in every step, and each of its sides turns
    in every k-th one, at k times the rate: never both at once, and as many of a model in each step.
    A step then orthogonalises a k-th of the blocks, and turns a weight of the merged form from one
    side, in one pass. Rotations grow as fast as without, on average.

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
        turn_every: k, steps from one turn of a side to its next, at ``k · poetx_lr``. Whose turn it
            is follows from the number of the step, which is saved.
        betas, eps, weight_decay: of AdamW; `weight_decay` for dense parameters with two dimensions
            or more.
        fused: default: AdamW's fused kernel where every dense parameter is on a CUDA device.

    Attributes:
        schedule: the `MergeSchedule`.

    Raises:
        ConfigError: `config` is not the one the model was prepared with; `momentum`,
            `momentum_dtype` or `turn_every` out of range.
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
        turn_every: int = 1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool | None = None,
    ):
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum = {momentum!r} is not allowed: use a number in [0, 1)")
        self.momentum_dtype = stored.parse_dtype(momentum_dtype)
        if type(turn_every) is not int or turn_every < 1:
            raise ConfigError(
                f"turn_every = {turn_every!r} is not allowed: use a whole number of at least 1"
            )
        self.turn_every = turn_every
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
        self.schedule.compile_early(self._rehearse, turn_every)
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
        resting = set() if schedule is None else schedule.resting(self.turn_every)
        if schedule is None or schedule.turner is None:
            for group in self.param_groups:
                if BLOCK in group:
                    self._turn(group, resting)
            self._step_dense()
        else:
            self._step_merged(schedule, resting)
        return loss

    @_disable_dynamo  # where Dynamo compiles `step`, none of this is in its graphs
    def _step_merged(self, schedule: MergeSchedule, resting: Collection[nn.Parameter]) -> None:
        """The step of the merged form, which writes no rotation."""
        owners = {p: g for g in self.param_groups if BLOCK in g for p in g["params"]}
        schedule.turn_by(self, partial(self._steps, owners, resting), self.turn_every)
        self._step_dense()

    def _step_dense(self) -> None:
        self._adamw.param_groups = [g for g in self.param_groups if BLOCK not in g]
        self._adamw.state = self.state
        adamw_step(self._adamw)

    def _turn(self, group: dict[str, Any], resting: Collection[nn.Parameter]) -> None:
        """Bring the rotations of a group on by a step; of those that rest the momentum alone."""
        keep = 1 - self._rate(group) * group["weight_decay"]
        trained = _trained(group["params"])
        for batch in bounded(trained, lambda skew: local(skew).nbytes, ROTATIONS_BYTES):
            for steps, _, skews in self._of_group(group, resting, batch):
                turned = [local(skew) for skew in skews]
                if keep != 1:
                    torch._foreach_mul_(turned, keep)
                torch._foreach_add_(turned, list(steps.split([len(skew) for skew in turned])))

    def _steps(
        self,
        owners: dict[nn.Parameter, dict[str, Any]],
        resting: Collection[nn.Parameter],
        skews: Sequence[nn.Parameter],
    ) -> Steps:
        """The steps of these rotations from zero, by the groups that have them."""
        of_group: dict[int, list[nn.Parameter]] = {}
        for skew in _trained(skews):
            if (owner := owners.get(skew)) is not None:
                of_group.setdefault(id(owner), []).append(skew)
        several = of_group.values()
        return [s for some in several for s in self._of_group(owners[some[0]], resting, some)]

    def _rehearse(self, stand_ins: StandIns) -> Steps:
        """The steps of stand-ins, by one of this class without parameters, state or schedule."""
        made = object.__new__(type(self))
        made.momentum_dtype, made.state = self.momentum_dtype, defaultdict(dict)
        steps: list[tuple[Tensor, int, Sequence[Tensor]]] = []
        for group in self.param_groups:
            if BLOCK in group:
                some = _trained([stand_ins[p] for p in group["params"] if p in stand_ins])
                steps += made._of_group({**group, "lr": 0.0}, (), some)
        return steps

    def _of_group(
        self,
        group: dict[str, Any],
        resting: Collection[nn.Parameter],
        skews: Sequence[nn.Parameter],
    ) -> Iterator[tuple[Tensor, int, Sequence[Tensor]]]:
        """Bring momenta up to date; the steps of what turns, as `Steps`."""
        sharded = is_sharded(*skews)
        b, rate = group[BLOCK], self._rate(group)
        here = []
        for skew in skews:
            state = self.state[skew]
            if not state:
                stored.create(state, skew, self.momentum_dtype)
            if not sharded or len(local(skew)):  # uneven shards may be empty
                here.append((skew, b))
        for kind, alike in by_kind(here).items():
            turning: list[Tensor] = []
            others: list[Tensor] = []
            for one in alike:
                (others if one in resting else turning).append(one)
            parts = [_part(skew, self.state[skew], sharded) for skew in (*turning, *others)]
            given = group["momentum"], rate
            if kind.dtype == torch.float32 and fused(parts, b):
                steps = muon_steps(parts, len(turning), b, *given, *self._counters())
            else:
                steps = self._by_torch(turning, others, kind, *given)
            if turning:
                yield steps, b, turning

    def _by_torch(
        self,
        turning: Sequence[Tensor],
        others: Sequence[Tensor],
        kind: BlockKind,
        mu: float,
        rate: float,
    ) -> Tensor:
        """What `muon_steps` does, which this defines."""
        for _ in self._directions(others, kind, mu, False):
            pass
        steps = []
        for direction in self._directions(turning, kind, mu, True):
            steps.append(ops.orthogonalize_skew(direction, kind.size).mul_(-rate))
        return steps[0] if len(steps) == 1 else torch.cat(steps) if steps else torch.empty(0)

    def _rate(self, group: dict[str, Any]) -> Any:
        """Of what turns."""
        schedule = getattr(self, "schedule", None)  # a copy for a trial has none, and turns all
        return group["lr"] * (1 if schedule is None else self.turn_every)

    def _counters(self) -> tuple[int, int]:
        """Seed and step: what the rounding of a narrow momentum follows from."""
        schedule = getattr(self, "schedule", None)  # a copy for a trial has none
        return (0, 0) if schedule is None else (schedule.config.seed, schedule.step)

    def _directions(
        self, alike: Sequence[Tensor], kind: BlockKind, mu: float, wanted: bool
    ) -> Iterator[Tensor]:
        """Bring momenta up to date; the directions that follow, batch by batch, where `wanted`."""
        states = [self.state[p] for p in alike]
        gradients = [local(p.grad) for p in alike if p.grad is not None]
        # Gradients are bf16 where the user has set `Tensor.grad_dtype`.
        narrow = self.momentum_dtype != torch.float32 or any(
            g.dtype != kind.dtype for g in gradients
        )
        directions: Sequence[Tensor] = ()
        if not narrow and gradients:
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
                yield direction

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


def _trained(skews: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those with blocks and a gradient."""
    return [p for p in skews if p.grad is not None and p.numel() > 0]


def _part(skew: Tensor, state: stored.State, sharded: bool) -> Part:
    """What this process has of a rotation."""
    gradient, momentum, scale = skew.grad, state[stored.BUFFER], state.get(stored.SCALE)
    assert gradient is not None
    if sharded:
        gradient, momentum = local(gradient), local(momentum)
        scale = None if scale is None else local(scale)
    return Part(gradient.contiguous(), momentum, scale)


def _fit_momentum(optimizer: torch.optim.Optimizer) -> None:
    """After a load, which has cast the momenta to the dtype of the rotations."""
    assert isinstance(optimizer, POETXMuon)
    for group in optimizer.param_groups:
        for skew in group["params"] if BLOCK in group else ():
            state = optimizer.state.get(skew)
            if state:
                stored.fit(state, skew, optimizer.momentum_dtype)
