"""What must hold whatever has been done, and how it is found out."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.prepared import prepared_linears, stored_weight
from poetx_compile.optim import merge as merge_module
from poetx_compile.optim import schedule as schedule_module
from poetx_compile.optim.angle import ANGLE, ANGLE_STEP, TRAVEL, UNDERESTIMATE, AngleGuard
from poetx_compile.optim.schedule import STEP
from tests.helpers import references
from tests.helpers.tolerances import relative_error, tolerance
from tests.play.world import PRODUCTS, Copy, World, loss_of


class Broken(AssertionError):
    """Something that must hold does not."""


def require(condition: Any, message: str) -> None:
    if not condition:
        raise Broken(message)


def close(actual: Tensor, expected: Tensor, allowed: float, what: str, scale: float = 0.0) -> None:
    """Equal within `allowed`, relative to the norm of `expected` or to `scale`, if that is more."""
    require(actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}")
    require(torch.isfinite(actual).all(), f"{what}: not finite")
    error = relative_error(actual, expected)
    norm = expected.detach().double().norm().item() or 1.0
    error *= norm / max(norm, scale)
    require(error <= allowed, f"{what}: relative error {error:.3g} exceeds {allowed:.3g}")


def same(actual: Any, expected: Any, what: str, but: Collection[str] = ()) -> None:
    """The same values, bit for bit, through dicts and lists."""
    if isinstance(expected, Mapping):
        require(set(actual) - set(but) == set(expected) - set(but), f"{what}: other keys")
        for key in expected:
            if key not in but:
                same(actual[key], expected[key], f"{what}.{key}")
    elif isinstance(expected, list | tuple):
        require(len(actual) == len(expected), f"{what}: {len(actual)} for {len(expected)} items")
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            same(a, e, f"{what}.{i}")
    elif isinstance(expected, Tensor):
        require(isinstance(actual, Tensor) and actual.dtype == expected.dtype, f"{what}: dtype")
        equal = torch.equal(actual, expected) or (actual.isnan() & expected.isnan()).all()
        require(equal, f"{what}: changed by {relative_error(actual, expected):.3g}")
    else:
        require(actual == expected, f"{what}: {actual} is not {expected}")


# --- what a copy is -------------------------------------------------------------------------------


def state(copy: Copy) -> dict[str, Any]:
    """All that a copy is made of, as clones: tensors, optimiser, what takes gradients."""
    saved = copy.optimizer.state_dict()
    moments = {
        i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
        for i, values in saved["state"].items()
    }
    groups = [
        {
            k: v.clone() if isinstance(v, Tensor) else v
            for k, v in group.items()
            if k not in AngleGuard.fresh()
        }
        for group in saved["param_groups"]
    ]
    guard = [
        {k: group[k] for k in AngleGuard.fresh()}
        for group in saved["param_groups"]
        if ANGLE in group
    ]
    return {
        "model": {k: v.clone() for k, v in copy.model.state_dict().items()},
        "optimizer": {"state": moments, "groups": groups},
        "guard": guard,
        "requires_grad": {n: p.requires_grad for n, p in copy.model.named_parameters()},
        "draws": copy.draws(),
    }


def guard_is_anew(copy: Copy) -> None:
    """The angle guard will start from what there is, as after a load of weights alone."""
    angle = poetx.diagnostics(copy.model)["angle_max"]
    for group in copy.optimizer.state_dict()["param_groups"]:
        if ANGLE in group:
            known, step = group[ANGLE], group[STEP]
            what = f"{copy.name}: the guard at step {step}"
            require(group[ANGLE_STEP] == step, f"{what} measured at {group[ANGLE_STEP]}")
            require(group[TRAVEL] == 0.0, f"{what} has travelled {group[TRAVEL]}")
            near = max(known, angle) <= UNDERESTIMATE * min(known, angle)
            require(near, f"{what} knows {known}, the angle is {angle}")


def plain_state(copy: Copy) -> dict[str, Tensor]:
    """The tensors of the plain model, as clones."""
    return {k: v.clone() for k, v in poetx.plain_state_dict(copy.model).items()}


@contextlib.contextmanager
def unchanged(world: World, but: Collection[str] = ()) -> Iterator[None]:
    """Nothing that a copy is made of changes, but these parts of `state`."""
    before = [state(copy) for copy in world.copies]
    unsettled = world.unsettled
    yield
    for copy, then in zip(world.copies, before, strict=True):
        if copy is world.compiled and unsettled != world.unsettled:
            continue  # adopted in between
        same(state(copy), then, f"{copy.name}", but)


def stores(copy: Copy) -> set[int]:
    """The ids of the frozen weights."""
    return {id(stored_weight(linear)) for _, linear, _ in copy.layers()}


def trained(copy: Copy) -> list[nn.Parameter]:
    """The parameters that take gradients."""
    frozen = stores(copy)
    parameters = copy.model.parameters()
    return [p for p in parameters if p.requires_grad and p.numel() and id(p) not in frozen]


def no_gradients_where_none_belong(copy: Copy, after_backward: bool = False) -> None:
    """Frozen parameters have none, and no group; `after_backward` the others have one each."""
    frozen = stores(copy)
    held = {id(p) for group in copy.optimizer.param_groups for p in group["params"]}
    require(not held & frozen, f"{copy.name}: the optimiser holds frozen weights")
    for name, p in copy.model.named_parameters():
        if id(p) in frozen or not p.requires_grad:
            require(p.grad is None, f"{copy.name}: {name} has a gradient and should have none")
        elif after_backward and p.numel():
            require(p.grad is not None, f"{copy.name}: {name} trains and has no gradient")
            require(torch.isfinite(p.grad).all(), f"{copy.name}: gradient of {name} not finite")


# --- the naive layer ------------------------------------------------------------------------------


def naive_weight(linear: nn.Linear, e: OrthogonalEquivalence) -> tuple[Tensor, Tensor, Tensor]:
    """The effective weight by dense matrices in fp64, and the two skew parameters it is made of."""
    skews = [s.detach().double().requires_grad_() for s in (e.skew_in, e.skew_out)]
    g_in, g_out = (
        references.cayley(skew, b, e.order)
        for skew, b in zip(skews, (e.block_in, e.block_out), strict=True)
    )
    pairs = e.perm_in.pair, e.perm_out.pair
    weight = references.effective_weight(_permuted(linear, e), g_in, g_out, *pairs)
    return weight, skews[0], skews[1]


def _permuted(linear: nn.Linear, e: OrthogonalEquivalence) -> Tensor:
    """The stored weight in the coordinates of its permutations, in fp64."""
    stored = stored_weight(linear).detach().double()
    if not e.merged:
        return stored
    n, m = stored.shape
    rows, columns = references.expand(e.perm_out.pair, n), references.expand(e.perm_in.pair, m)
    return stored[rows[0]][:, columns[0]]


def with_gains(weight: Tensor, gains: Mapping[str, Tensor]) -> Tensor:
    """A weight with the gains of its layer, by dense matrices in fp64."""
    if "gain_out" in gains:
        weight = gains["gain_out"].double().diag() @ weight
    return weight @ gains["gain_in"].double().diag() if "gain_in" in gains else weight


# --- after each action ----------------------------------------------------------------------------


def check(world: World) -> None:
    """Compiled is eager is plain: states, outputs, gradients."""
    eager, compiled = world.copies
    for copy in world.copies:
        no_gradients_where_none_belong(copy)
    if not world.unsettled:
        same(state(compiled), state(eager), "compiled")
    require(
        eager.model.training == compiled.model.training, "one copy trains, the other is evaluated"
    )
    allowed = PRODUCTS * tolerance(world.dtype)
    plain = world.plain().to(world.dtype).train(eager.model.training)
    plain.load_state_dict(poetx.plain_state_dict(eager.model))
    tokens = world.batch()
    for name, linear, e in eager.layers():
        weight, _, _ = naive_weight(linear, e)
        own = plain.get_submodule(name).weight
        weight = with_gains(weight, e.gains)
        close(own, weight, tolerance(world.dtype), f"effective weight of {name}")
    with torch.no_grad():
        expected = plain(tokens)
        # The compiled copy where it is being evaluated: another graph takes as long as all else.
        evaluated = world.unsettled or not (compiled.model.training and trained(eager))
        for copy in world.copies if evaluated else (eager,):
            close(copy.run(tokens), expected, allowed, f"outputs of {copy.name}, no_grad")
    if world.unsettled or not trained(eager):
        return
    expected_loss = loss_of(plain(tokens), tokens)
    gradients = dict(
        zip(
            (n for n, _ in plain.named_parameters()),
            torch.autograd.grad(expected_loss, list(plain.parameters())),
            strict=True,
        )
    )
    expected_of = _expected_gradients(eager, gradients)
    scale = gradient_scale(gradients, world.dtype)
    for copy in world.copies:
        loss = loss_of(copy.run(tokens), tokens)
        close(loss, expected_loss, allowed, f"loss of {copy.name}")
        named = {n: p for n, p in copy.model.named_parameters() if p.requires_grad and p.numel()}
        taken = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, _), gradient in zip(named.items(), taken, strict=True):
            what = f"gradient of {name}, {copy.name}"
            if name not in expected_of:  # the frozen weight
                require(gradient is None, f"{what}: there is one")
                continue
            require(gradient is not None, f"{what}: there is none")
            close(gradient, expected_of[name], 2 * allowed, what, scale)


def gradient_scale(gradients: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """The norm that errors of small gradients are relative to.

    A gradient is a sum over tokens that may cancel, and keeps the rounding of its terms.
    """
    largest = max(g.double().norm().item() for g in gradients.values())
    return largest * (1 if dtype == torch.bfloat16 else 1e-3)


def _expected_gradients(eager: Copy, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the prepared model from those of the plain one."""
    layers = {name: (linear, e) for name, linear, e in eager.layers()}
    expected = {}
    for name, gradient in gradients.items():
        owner = name.removesuffix(".weight")
        if owner not in layers:
            expected[name] = gradient
            continue
        linear, e = layers[owner]
        weight, skew_in, skew_out = naive_weight(linear, e)
        gains = {n: gain.detach().double().requires_grad_() for n, gain in e.gains.items()}
        made = {"skew_in": skew_in, "skew_out": skew_out, **gains}
        leaves = [leaf for leaf in made.values() if leaf.numel()]
        weight = with_gains(weight, gains)
        taken = list(torch.autograd.grad(weight, leaves, gradient.double()))
        for own_name, leaf in made.items():
            value = taken.pop(0) if leaf.numel() else leaf
            expected[f"{owner}.parametrizations.weight.0.{own_name}"] = value
    return expected


# --- merges ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched_merges() -> Iterator[None]:
    """Check every merge that an optimiser asks for."""
    with mock.patch.object(schedule_module, "merge", checked_merge):
        yield


def checked_merge(model: nn.Module, *, redraw: bool = False, then: Any = None) -> None:
    """Merge, and check what it did to each layer.

    A plane that Q turns by θ is scaled by ``|1 − (iθ)^(k+1)|``, off 1 by ``δ ≤ θ^(k+1)``, which the
    polar factor takes out on either side: ``‖W' − W‖ ≤ (2δ + δ²) ‖S‖`` and the rounding.
    """
    layers = list(prepared_linears(model))
    before = []
    for _, linear, e in layers:
        weight, skew_in, skew_out = naive_weight(linear, e)
        before.append((weight.detach(), _merged(linear, e), _delta(e, skew_in, skew_out)))
    sides = [side for _, _, e in layers for side in e.sides]
    expected_draws = {side.permutation: side.permutation.draw for side in sides}
    gains = {side.permutation for side in sides if side.permutation.size > side.block}
    for permutation in gains if redraw else ():
        expected_draws[permutation] += 1
    merge_module.merge(model, redraw=redraw, then=then)
    for permutation, draw in expected_draws.items():
        require(permutation.draw == draw, f"{permutation}: not draw {draw} after a merge")
    for (name, linear, e), (weight, expected, delta) in zip(layers, before, strict=True):
        what = f"{name} after a merge"
        rounding = tolerance(stored_weight(linear).dtype)
        require(not e.skew_in.any() and not e.skew_out.any(), f"{what}: rotations are left")
        after, _, _ = naive_weight(linear, e)
        bound = rounding + 2 * delta + delta**2
        moved = ((after - weight).norm() / stored_weight(linear).double().norm()).item()
        require(moved <= bound, f"{what}: weight moved by {moved:.3g}, bound {bound:.3g}")
        close(after, expected, rounding, what)


def _rotated(e: OrthogonalEquivalence) -> bool:
    """Whether merges make the rotations orthogonal first."""
    return e.merge_rotation == "polar" and e.order is not None


def _merged(linear: nn.Linear, e: OrthogonalEquivalence) -> Tensor:
    """The effective weight with the rotations' polar factors, by singular value decompositions."""
    factors = []
    for skew, b in ((e.skew_in, e.block_in), (e.skew_out, e.block_out)):
        g = references.cayley(skew.detach().double(), b, e.order)
        if _rotated(e):
            u, _, vh = torch.linalg.svd(g)
            g = u @ vh
        factors.append(g)
    stored = _permuted(linear, e)
    return references.effective_weight(stored, *factors, e.perm_in.pair, e.perm_out.pair)


def _delta(e: OrthogonalEquivalence, skew_in: Tensor, skew_out: Tensor) -> float:
    if not _rotated(e):
        return 0.0
    norms = [0.0]
    for skew, b in ((skew_in, e.block_in), (skew_out, e.block_out)):
        if skew.numel():
            q = references.unpack(skew.detach(), b)
            norms.append(torch.linalg.matrix_norm(q, ord=2).max().item())
    assert e.order is not None
    return max(norms) ** (e.order + 1)
