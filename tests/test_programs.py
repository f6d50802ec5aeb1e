"""Random programs of nested regions: compiled is eager, with every gradient and every ``None``.

A dozen; more by hand (`tests.programs`).
"""

from __future__ import annotations

import pytest

from tests.programs import Trial

SEEDS = range(12)


@pytest.mark.parametrize("first", SEEDS[::4])
def test_random_programs_are_right_prepared_and_adopted(first):
    for seed in range(first, first + 4):
        trial = Trial(seed)
        assert trial.runs()
        assert trial.failures() == [], trial.source


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_random_programs_are_right_from_the_first_call_on(seed):
    trial = Trial(seed)
    assert trial.of_compiled(stage="eager") == [], trial.source


@pytest.mark.parametrize(
    "options", [{"variant": "fast"}, {"variant": "mem"}, {"memory_budget": 0.5}], ids=str
)
@pytest.mark.parametrize("seed", [2, 11])
def test_random_programs_are_right_whatever_the_backward_recomputes(seed, options):
    trial = Trial(seed)
    assert trial.of_compiled(stage="aot_eager", **options) == [], trial.source
