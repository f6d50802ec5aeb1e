"""Random sequences of what users do, on a compiled, an eager and a plain copy (`tests.play`).

More by hand: ``python -m tests.play --seeds 100-999``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from poetx_compile.compile import folds
from poetx_compile.layers import effective
from poetx_compile.layers.parametrization import OrthogonalEquivalence
from poetx_compile.layers.prepared import stored_weight
from poetx_compile.optim import merge as merge_module
from poetx_compile.optim.schedule import MergeSchedule
from tests.play.actions import ACTIONS
from tests.play.invariants import Broken
from tests.play.runner import Call, Sequence, play, shrunk

SEEDS = (2759, 3365, 3507, 3787)
"""Together they play every action, all kinds of optimisers and gains, and both stages."""

FOUND = {
    # A cast from fp64 to bf16 left the rotations in fp64.
    "cast to bf16": Sequence.of(
        "cast(dtype='bfloat16')",
        "train(steps=1, micro=1, clip=None, closure=False, zeros=False)",
        config={"block_size": 4},
    ),
    # The guard starts anew after a load of weights alone; a run resumed in between did not know.
    "saved after a load of a layer": Sequence.of(
        "set_rates(of='dense', factor=0.0)",
        "train(steps=1, micro=1, clip=None, closure=False, zeros=False)",
        "load_plain_weights(part='q')",
        "resume(how='save_checkpoint')",
        "interrupt_a_merge()",
        config={"block_size": 4, "max_angle": 0.25},
        optimizer="adopt SGD",
    ),
    "saved after a load of all weights": Sequence.of(
        "train(steps=2, micro=1, clip=None, closure=False, zeros=False)",
        "load_plain_weights(part='all')",
        "resume(how='state_dict')",
        config={"block_size": 4, "max_angle": 0.25},
    ),
    # What is refused, and how the message says to go on.
    "a followed group is split": Sequence.of(
        "change_groups(to='split')",
        "resume(how='state_dict')",
        config={"block_size": 4},
        optimizer="adopt RAdam",
    ),
    "a followed group is deleted": Sequence.of(
        "change_groups(to='delete')",
        "roll_back(how='save_checkpoint')",
        "train(steps=2, micro=1, clip=None, closure=True, zeros=False)",
        config={"block_size": 4},
        optimizer="adopt AdamW",
    ),
    "other blocks than an adopted model was compiled for": Sequence.of(
        "train(steps=1, micro=1, clip=None, closure=False, zeros=False)",
        "unload()",
        "prepare_again(kind='attach Adagrad', block_size=3, first=False)",
        config={"block_size": 4},
        optimizer="adopt RMSprop",
        adopted=True,
    ),
}
"""Sequences that failed once, shrunk."""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_sequence_keeps_all_that_must_hold(seed: int) -> None:
    assert play(Sequence.drawn(seed, 10)) > 5


@pytest.mark.parametrize("name", FOUND)
def test_a_sequence_that_failed_once_does_not_fail_again(name: str) -> None:
    assert play(FOUND[name]) == len(FOUND[name].calls)


def test_the_seeds_play_every_action() -> None:
    sequences = [Sequence.drawn(seed, 10) for seed in SEEDS]
    assert {call.name for sequence in sequences for call in sequence.calls} == set(ACTIONS)
    setups = [sequence.setup for sequence in sequences]
    kinds = {setup.optimizer.partition(" ")[0] for setup in setups}
    assert kinds == {"POETXAdamW", "POETXMuon", "attach", "adopt"}
    assert {setup.options["stage"] for setup in setups} == {"eager", "aot_eager"}
    assert {setup.adopted for setup in setups} == {True, False}
    assert {setup.config["gains"] for setup in setups} == {"none", "rows", "both"}


def test_a_sequence_is_read_as_it_is_printed() -> None:
    for seed in range(20):
        sequence = Sequence.drawn(seed, 10)
        assert Sequence.parse(str(sequence)) == sequence


# --- planted faults -------------------------------------------------------------------------------

TRAIN = "train(steps=2, micro=1, clip=None, closure=False, zeros=False)"
EVALUATE = "evaluate(mode='no_grad', training=False, rows=3)"


def forget_a_permutation(patch: pytest.MonkeyPatch) -> None:
    real = merge_module.redraw_all

    def forgetful(permutations: Any) -> Any:
        indices = real(permutations)
        first = next(iter(indices))
        return indices | {first: torch.arange(first.size)}

    patch.setattr(merge_module, "redraw_all", forgetful)


def merge_rotations_that_shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(merge_module, "polar_factor", lambda matrix: matrix)


def keep_a_weight_that_was_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(effective.Sources, "are_those_of", lambda *_: True)


def keep_a_fold_that_was_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(folds.Cached, "are_those_of", lambda *_: True)


def forget_the_counters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MergeSchedule, "_after_load", lambda *_: None)


def decay_the_frozen_weights(patch: pytest.MonkeyPatch) -> None:
    real = MergeSchedule._after_step

    def decaying(self: MergeSchedule, *args: Any) -> None:
        for linear, _ in self._layers:
            with torch.no_grad():
                stored_weight(linear).mul_(0.999)
        real(self, *args)

    patch.setattr(MergeSchedule, "_after_step", decaying)


def cut_a_gradient(patch: pytest.MonkeyPatch) -> None:
    real = OrthogonalEquivalence.effective
    patch.setattr(
        OrthogonalEquivalence,
        "effective",
        lambda self, stored, skew_in, *rest: real(self, stored, skew_in.detach(), *rest),
    )


PLANTED: dict[Any, tuple[str, ...]] = {
    forget_a_permutation: ("force_a_merge()",),
    merge_rotations_that_shrink: (TRAIN, "force_a_merge()"),
    keep_a_weight_that_was_written: (EVALUATE, "write(way='assign', layer='q')"),
    keep_a_fold_that_was_written: (EVALUATE, "write(way='index', layer='q')"),
    forget_the_counters: (TRAIN, "resume(how='state_dict')"),
    decay_the_frozen_weights: (TRAIN,),
    cut_a_gradient: (),
}


def planted(*calls: str) -> Sequence:
    options = {"stage": "eager", "formulation": "folded", "keep_folded": "step"}
    return Sequence.of(*calls, config={"block_size": 4}, options=options)


def test_without_planted_faults_their_sequences_pass() -> None:
    play(planted(*(call for calls in PLANTED.values() for call in calls)))


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(Broken):
        play(planted(*PLANTED[plant]))


def test_a_failure_is_shrunk_to_the_actions_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_a_weight_that_was_written(monkeypatch)
    sequence = Sequence.of(
        EVALUATE,
        "set_rates(of='all', factor=0.5)",
        "write(way='assign', layer='q')",
        config={"block_size": 4},
    )
    least = [call.name for call in shrunk(sequence).calls]
    assert least == ["evaluate", "write"]
    assert Call.parse(str(sequence.calls[2])) == sequence.calls[2]
