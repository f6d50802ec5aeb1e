"""Whether an optimiser can train rotations, found by trying a copy of it on small parameters.

A merge sets the rotations back to zero, and the optimiser is not asked. Moments of gradients mean
the same afterwards; what an optimiser remembers of the *values* of its parameters does not: an
average, a copy to return to, the point where it started. No list of classes could know them all, so
`probe` looks at what a copy of the optimiser does, with its class and options and a few parameters
of a few entries in the place of its own. The real one is not touched.

- Two copies are given the same gradients from different starting points, and are then put at one
  and the same point. After the next step they have to agree in parameters and in all they remember.
- Nothing they remember may be a copy of a parameter.
- Nor may it be a vector of all parameters together.
- A step may not be an orthogonal matrix: packed skew parameters are no matrices.

The same copies tell how the state of a parameter is made that of a fresh optimiser, and which of
its tensors are first moments: a copy in the mirror, whose parameters and gradients have the other
sign, has those with the other sign as well, and second moments with the same one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from poetx_compile.distributed.shards import local
from poetx_compile.errors import AdoptionError, ConfigError
from poetx_compile.optim.groups import BLOCK
from poetx_compile.optim.hooks import step_hooks
from poetx_compile.optim.momentum import values

log = logging.getLogger("poetx_compile")

SHAPES = ((2, 3), (3, 3))
"""Of the parameters in each group: packed blocks of b = 3. All entries together, 15 for each group,
are the size of nothing that belongs to one parameter, such as a covariance of its rows."""

STEPS = 8
"""Taken before and after a merge: RAdam changes its rule at the sixth step."""

MOST_STEPS = 100
"""Steps that are taken at most for the sake of an option that is a number of steps."""

ORTHOGONAL = 0.5
"""Ratio of the singular values of a step that was orthogonalised, at least; Muon's is 0.6."""

_COPIES = (
    "it remembers values of the parameters ({what}), and rotations go back to zero at each merge: "
    "use an optimiser that remembers gradients alone, and average effective weights "
    "(poetx_compile.plain_state_dict) if an average is wanted"
)
_TOGETHER = (
    "its history is of one vector of all parameters, and means nothing after a merge: use an "
    "optimiser that treats parameters one by one"
)
_ORTHOGONALISES = (
    "it orthogonalises matrices, and packed skew parameters are none: build "
    "poetx_compile.POETXMuon(model), or give it only what stays dense"
)


@dataclasses.dataclass(frozen=True)
class Probed:
    """What `probe` has found out.

    Attributes:
        reset: how the state of a parameter becomes that of a fresh optimiser: ``"zero"`` in place,
            which compiled steps do not notice, or ``"drop"`` it.
        early: the optimiser makes the state of its parameters when it is built.
        signed: the tensors of a parameter's shape in its state, by key: whether they turn with the
            gradient, as first moments do.
    """

    reset: str = "zero"
    early: bool = False
    signed: Mapping[str, bool] = dataclasses.field(default_factory=dict)


def probe(optimizer: Optimizer, parameters: Iterable[Tensor], moments: str) -> Probed:
    """Find out whether `optimizer` can train rotations in the groups that hold `parameters`.

    Args:
        optimizer: it is not changed.
        parameters: the rotations, or the weights whose groups they are to join.
        moments: `POETXConfig.moments`; with ``"reset"`` a way to do that is looked for, with
            ``"transport"`` what is to move.

    Raises:
        AdoptionError: it cannot, with the reason.
        ConfigError: nothing makes the state of a parameter that of a fresh optimiser, or a tensor
            of it cannot move.
    """
    wanted = set(parameters)
    if not any(p in wanted for group in optimizer.param_groups for p in group["params"]):
        return Probed()
    devices = {p.device for p in wanted if p.is_cuda}
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng([d.index for d in devices]),
    ):
        try:
            make, early = _maker(optimizer, wanted)
        except _NotCopied as error:
            log.warning(
                "%s cannot be tried on small parameters (%s): look whether it remembers "
                "values of its parameters, which are wrong after a merge. At a redraw its moments "
                "stay where they are",
                type(optimizer).__name__,
                error,
            )
            return Probed()
        if reason := _reason(make):
            raise AdoptionError(f"{_name(optimizer)} cannot train rotations: {reason}")
        reset = _way_to_reset(make) if moments == "reset" else "zero"
        signed = _signs(make) if moments == "transport" else {}
    if isinstance(signed, str):
        raise ConfigError(
            f"moments = 'transport' is not possible with {_name(optimizer)}: {signed} is neither a "
            "first nor a second moment of one parameter, so a redraw cannot move it with its "
            "planes. Use moments='keep', or 'reset'"
        )
    if reset is None:
        raise ConfigError(
            f"moments = 'reset' is not possible with {_name(optimizer)}: the state of a parameter "
            "cannot be made that of a fresh optimiser, since it is made with the optimiser or kept "
            "in its groups. Use moments='keep'"
        )
    return Probed(reset, early, signed)


def reset_state(optimizer: Optimizer, parameters: Iterable[Tensor], how: str) -> None:
    """Make the state of `parameters` that of a fresh optimiser, in the way that `probe` found."""
    for parameter in parameters:
        if how == "drop":
            optimizer.state.pop(parameter, None)
            continue
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, int | float) and not isinstance(value, bool):
                state[key] = type(value)(0)


# --- what is looked for ---------------------------------------------------------------------------


def _reason(make: Callable[[int], _Copy]) -> str | None:
    """Why rotations cannot be trained, or ``None``."""
    one, other = make(1), make(2)
    total = sum(p.numel() for p in one.parameters)
    orthogonal = True
    for number in range(one.steps):
        before = [p.clone() for p in one.parameters]
        one.step(number)
        other.step(number)
        if number == 1 and any(t.numel() == total for _, t in one.tensors()):
            return _TOGETHER
        if orthogonal:
            moved = [p - q for p, q in zip(one.parameters, before, strict=True)]
            orthogonal = all(_is_orthogonal(m) for m in moved)
        if orthogonal and number == 2:
            return _ORTHOGONALISES
    for path, tensor in one.tensors():
        if any(tensor.shape == p.shape and torch.equal(tensor, p) for p in one.parameters):
            return _COPIES.format(what=path)
    for it in (one, other):
        it.place(3)
        it.step(one.steps)
    where = _difference(one, other)
    return None if where is None else _COPIES.format(what=where)


def _is_orthogonal(step: Tensor) -> bool:
    values = torch.linalg.svdvals(step.float().cpu())
    return bool(values[0] > 0 and values[-1] > ORTHOGONAL * values[0])


def _way_to_reset(make: Callable[[int], _Copy]) -> str | None:
    """The way in which a state becomes a fresh one."""
    fresh = make(3)
    for number in range(fresh.steps):
        fresh.step(number)
    for how in ("zero", "drop"):
        used = make(1)
        for number in range(used.steps):
            used.step(number + used.steps)
        reset_state(used.optimizer, used.parameters, how)
        used.place(3)
        try:
            for number in range(used.steps):
                used.step(number)
        except Exception:  # the state of a parameter is made with the optimiser: no other will be
            continue
        if _difference(fresh, used) is None:
            return how
    return None


def _signs(make: Callable[[int], _Copy]) -> dict[str, bool] | str:
    """`Probed.signed`; or the name of a tensor of a parameter's shape that cannot be moved."""
    one, mirror = make(1), make(1)
    for parameter in mirror.parameters:
        parameter.neg_()
    for number in range(one.steps):
        one.step(number)
        mirror.step(number, -1)
    shapes = {p.shape for p in one.parameters}
    signed: dict[str, bool] = {}
    known: set[int] = set()
    for own, other in zip(one.parameters, mirror.parameters, strict=True):
        state, mirrored = one.state(own), mirror.state(other)
        for key, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.shape == own.shape:
                known.add(tensor.data_ptr())
                value, other_value = values(state, key), values(mirrored, key)
                turns = torch.equal(other_value, -value)
                moves = value.is_floating_point() and (turns or torch.equal(other_value, value))
                if not moves or signed.setdefault(key, turns) != turns:
                    return f"its state {key!r}"
    for path, tensor in one.tensors():
        if tensor.shape in shapes and tensor.data_ptr() not in known:
            return repr(path)
    return signed


def _difference(one: _Copy, other: _Copy) -> str | None:
    """Where two copies differ, in what they remember or in parameters, or ``None``."""
    mine, theirs = dict(one.memory()), dict(other.memory())
    for path in mine | theirs:
        a, b = mine.get(path), theirs.get(path)
        same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        if not same:
            return path
    alike = map(torch.equal, one.parameters, other.parameters)
    return None if all(alike) else "its next step shows it"


def _name(optimizer: Optimizer) -> str:
    kind = type(optimizer)
    return f"torch.optim.{kind.__name__}" if kind.__module__.startswith("torch.") else kind.__name__


# --- copies ---------------------------------------------------------------------------------------


class _NotCopied(Exception):
    """An optimiser cannot be copied."""


def _maker(optimizer: Optimizer, wanted: set[Tensor]) -> tuple[Callable[[int], _Copy], bool]:
    """What makes copies of `optimizer`, each at a starting point by number; and `Probed.early`."""

    error: Exception | None = None
    for with_state in (False, True):
        if with_state and not any(p in optimizer.state for p in wanted):
            break
        make = functools.partial(_Copy, optimizer, wanted, with_state)
        try:
            make(1).step(0)
        except _NotCopied:
            raise
        except Exception as why:
            error = why
        else:
            return make, with_state
    raise AdoptionError(
        f"{_name(optimizer)} cannot train rotations: its step fails on small parameters with dense "
        f"gradients, {type(error).__name__}: {error}"
    ) from error


class _Copy:
    """A copy of an optimiser, with small parameters in its groups.

    Args:
        optimizer: the real one.
        wanted: parameters of it; only groups that hold one are copied.
        with_state: give the small ones a state like theirs; else it is made at the first step.
        start: number of the point at which the small parameters are.
    """

    def __init__(self, optimizer: Optimizer, wanted: set[Tensor], with_state: bool, start: int):
        self.parameters: list[Tensor] = []
        memo: dict[int, Any] = {id(p): None for g in optimizer.param_groups for p in g["params"]}
        groups, state = [], defaultdict(dict)  # type: ignore[var-annotated]
        for group in optimizer.param_groups:
            mine = [p for p in group["params"] if p in wanted]
            if not mine:
                continue
            small = [_small(mine[0], shape) for shape in SHAPES]
            self.parameters += small
            memo |= {id(p): q for p, q in zip(mine, small, strict=False)}
            for parameter in small if with_state else ():
                state[parameter] = _like(optimizer.state.get(mine[0], {}), mine[0], parameter)
            memo[id(group)] = _small_group(group, small)
            memo[id(group["params"])] = memo[id(group)]["params"]
            groups.append(memo[id(group)])
        memo[id(optimizer.param_groups)], memo[id(optimizer.state)] = groups, state
        try:
            self.optimizer: Optimizer = _copied(optimizer, memo)
        except Exception as error:
            raise _NotCopied(f"{type(error).__name__}: {error}") from error
        step_hooks.trials.add(self.optimizer)
        if callable(train := getattr(self.optimizer, "train", None)):
            train()  # schedule-free ones want to be told
        self.steps = max(STEPS, min(MOST_STEPS, 1 + _largest_count(optimizer)))
        device = self.parameters[0].device
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index])
        self.place(start)

    def place(self, number: int) -> None:
        """Put the parameters at a point by its number."""
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(_random(parameter.shape, 1000 * number + i))

    def state(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter, also where an optimiser in the optimiser has it."""
        inner = getattr(self.optimizer, "optim", self.optimizer)
        return inner.state.get(parameter, {})

    def step(self, number: int, sign: int = 1) -> None:
        """Take a step with the gradients of that number: much of one `sign`, for all singular
        values of a matrix but one to be small."""
        gradients = [
            sign * (1 + _random(p.shape, 10**6 + 1000 * number + i))
            for i, p in enumerate(self.parameters)
        ]

        def closure() -> Tensor:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient.to(parameter)
            return torch.zeros((), device=self.parameters[0].device)

        closure()
        for generator in self._generators:
            generator.manual_seed(number)
        step = type(self.optimizer).step
        takes_closure = len(inspect.signature(step).parameters) > 1
        step(self.optimizer, *([closure] if takes_closure else []))  # type: ignore[arg-type]

    def memory(self) -> Iterator[tuple[str, Any]]:
        """(where, value) of every tensor and number that the optimiser has."""
        names = {id(p): str(i) for i, p in enumerate(self.parameters)}
        yield from _leaves(vars(self.optimizer), "", names, set())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the values that are tensors, in memory of their own."""
        own = {p.data_ptr() for p in self.parameters}
        for path, value in self.memory():
            if isinstance(value, Tensor) and value.data_ptr() not in own:
                yield path, value


def _random(shape: Sequence[int], seed: int) -> Tensor:
    """Entries in ±0.25, by a generator of their own."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32) / 2 - 0.25


def _small(real: Tensor, shape: Sequence[int]) -> nn.Parameter:
    device = "cpu" if real.is_meta else real.device
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))


def _like(state: dict[str, Any], real: Tensor, small: Tensor) -> dict[str, Any]:
    """A state of a small parameter like one of a real parameter."""
    like = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == real.shape:
            like[key] = small.new_full(small.shape, local(value).flatten()[0].item())
        else:
            like[key] = copy.deepcopy(value)
    return like


def _small_group(group: dict[str, Any], small: list[nn.Parameter]) -> dict[str, Any]:
    """A group with the options of another: a rate that moves something, and no decay."""
    options = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
    changes = {"lr": 1e-2, "weight_decay": 0.0, BLOCK: small[0].shape[1]}
    for key, value in changes.items():
        if isinstance(options.get(key), Tensor):
            options[key] = torch.full_like(options[key], value)
        elif options.get(key) is not None:
            options[key] = value
    return {"params": list(small), **options}


_NOT_COPIED = ("step", "schedule", "__reduce_ex__")
"""Attributes of an instance that lead back to the real one: schedulers put a `step` there."""


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, through optimisers as well: their own copies are made for pickling."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Optimizer):
        made = memo[id(value)] = object.__new__(type(value))
        if "param_groups" in vars(value):
            memo.setdefault(id(value.param_groups), _groups(value.param_groups, memo))
            memo.setdefault(id(value.state), defaultdict(dict))
        for key, inner in vars(value).items():
            if key.endswith("_hooks"):
                vars(made)[key] = OrderedDict()
            elif key not in _NOT_COPIED and not key.startswith("_poetx"):
                vars(made)[key] = _copied(inner, memo)
        return made
    if isinstance(value, nn.Module):
        return value
    if type(value) is list:
        return [c for v in value if (c := _copied(v, memo)) is not None or v is None]
    if type(value) is dict:
        return {_copied(k, memo): _copied(v, memo) for k, v in value.items()}
    return copy.deepcopy(value, memo)


def _groups(groups: list[dict[str, Any]], memo: dict[int, Any]) -> list[dict[str, Any]]:
    """The groups of an inner optimiser, where they are other dicts than those of the outer one."""
    return [
        memo.get(id(group), _small_group(group, small))
        for group in groups
        if (small := [q for p in group["params"] if (q := memo.get(id(p))) is not None])
    ]


def _largest_count(optimizer: Optimizer) -> int:
    """The largest whole number among the options: what it does every so many steps is seen too."""
    options = [(k, v) for group in optimizer.param_groups for k, v in group.items()]
    numbers = [v for k, v in [*options, *vars(optimizer).items()] if not k.startswith("poetx_")]
    return max((v for v in numbers if type(v) is int), default=0)


def _leaves(
    value: Any, path: str, names: dict[int, str], seen: set[int]
) -> Iterator[tuple[str, Any]]:
    if id(value) in names:  # a parameter
        return
    if isinstance(value, Tensor | int | float):
        yield path, value
        return
    if not isinstance(value, dict | list | tuple | Optimizer) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Optimizer):
        value = vars(value)
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        here = names.get(id(key), key) if isinstance(key, Tensor) else key
        yield from _leaves(inner, f"{path}.{here}" if path else str(here), names, seen)
