"""`POETXConfig`: values that are refused, and the JSON round trip."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import pytest

from poetx_compile.compile.options import BackendOptions
from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError, POETXError

PAIR = "an int ≥ 2, or a pair (in, out) of them"
NATURAL = "an int ≥ 1"
ANGLE = "None, or radians in (0, 1)"
FRACTION = "None, or a fraction in (0, 1]"
SEED = "an int in [0, 2⁶³)"
TARGET = "None, a regular expression or a list of names"
NAMES = "a list of names"
FORMER = "normalize_rows is deprecated: use init='rows' instead of True"
NAN = float("nan")

BAD = [
    *(("block_size", v, PAIR) for v in (1, 0, -4, 8.0, True, "8", None, (8,), (8, 1), (8, 8, 8))),
    *(("block_size", v, PAIR) for v in ([4], [], (), (4, 2.0))),
    *(("neumann_order", v, NATURAL) for v in (0, -1, 1.0, True, None, "3")),
    *(("merge_interval", v, NATURAL) for v in (0, 2.5, None)),
    *(("redraw_interval", v, "None, or an int ≥ 1") for v in (0, 2.5, True)),
    *(("max_angle", v, ANGLE) for v in (0, 1, -0.1, 1.5, "0.2", True, NAN, float("inf"))),
    *(("memory_budget", v, FRACTION) for v in (0, 1.1, -1, NAN, "half", True)),
    *(("seed", v, SEED) for v in (-1, 2**63, 0.0, None, True)),
    *(("keep_in_eval", v, "a bool") for v in (0, 1, None, "yes")),
    *(("init_range", v, "a ratio in (0, 1]") for v in (0, 1.1, -1, NAN, None, True, "0.1")),
    *(("init_scale", v, "a number above 0") for v in (0, -1.0, NAN, float("inf"), None, True)),
    *(("target_modules", v, TARGET) for v in (3, [""], [1], {"q_proj"})),
    ("target_modules", "q_proj(", "a valid regular expression"),
    *(("exclude_modules", v, NAMES) for v in (None, "lm_head", [""], [1])),
    *(("cayley", v, "one of 'neumann', 'exact'") for v in ("taylor", None, ["neumann"])),
    ("merge_rotation", "qr", "one of 'polar', 'plain'"),
    ("moments", "drop", "one of 'transport', 'keep', 'reset'"),
    ("permutation", "none", "one of 'random', 'chunked'"),
    ("variant", "slow", "one of 'fast', 'mem'"),
    ("formulation", "dense", "one of 'auto', "),
    *(("init", v, "one of 'keep', 'rows', 'spectrum'") for v in ("svd", None, True)),
    ("gains", "columns", "one of 'none', 'rows', 'both'"),
    ("base", "int4", "one of 'dense', 'int8'"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD)
def test_a_bad_value_names_field_value_and_allowed_range(field, value, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        POETXConfig(**{field: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, POETXError)
    shown = tuple(value) if field == "block_size" and isinstance(value, list) else value
    assert f"POETXConfig.{field} = {shown!r} is not allowed: use {allowed}" in str(caught.value)


def test_every_field_has_a_bad_value_above() -> None:
    assert {f.name for f in dataclasses.fields(POETXConfig)} == {field for field, _, _ in BAD}


OTHER = {
    "block_size": (4, 8),
    "neumann_order": 5,
    "cayley": "exact",
    "merge_interval": 7,
    "redraw_interval": None,
    "max_angle": None,
    "merge_rotation": "plain",
    "moments": "reset",
    "permutation": "random",
    "variant": "mem",
    "formulation": "input_centric",
    "seed": 2**63 - 1,
    "target_modules": ["q_proj", "layers.0.up"],
    "exclude_modules": [],
    "init": "spectrum",
    "init_range": 0.05,
    "init_scale": 2.0,
    "gains": "both",
    "keep_in_eval": False,
    "base": "int8",
}


@pytest.mark.parametrize("values", [{}, OTHER, {"target_modules": r"layers\.\d+\.q_proj"}])
def test_json_round_trip(values) -> None:
    config = POETXConfig(**values)
    again = POETXConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_the_round_trip_covers_every_field_with_another_value() -> None:
    default, other = POETXConfig().to_dict(), POETXConfig(**OTHER).to_dict()
    same = {name for name in default if default[name] == other[name]}
    assert same == {"memory_budget"}  # not with variant "mem"


def test_int8_and_a_merge_at_every_step_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"base = 'int8' is not allowed: use 'dense' with merge"):
        POETXConfig(base="int8", merge_interval=1)


def test_a_budget_survives_json_and_contradicts_variant_mem() -> None:
    config = POETXConfig(memory_budget=0.5)
    assert POETXConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"memory_budget = 0.5 is not allowed: use None with var"):
        POETXConfig(memory_budget=0.5, variant="mem")


def test_normalize_rows_is_an_alias_that_warns() -> None:
    with pytest.warns(DeprecationWarning, match=FORMER) as caught:
        assert POETXConfig(normalize_rows=True) == POETXConfig(init="rows")
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=FORMER):
        assert POETXConfig(normalize_rows=False) == POETXConfig()
    with pytest.raises(ConfigError, match="normalize_rows = 1 is not allowed: use init='rows'"):
        POETXConfig(normalize_rows=1)  # type: ignore[arg-type]
    with (
        pytest.warns(DeprecationWarning, match=FORMER),
        pytest.raises(ConfigError, match="init = 'spectrum' is not allowed: use 'rows' with"),
    ):
        POETXConfig(init="spectrum", normalize_rows=True)


def test_configurations_of_earlier_versions_load() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each of them says False
        assert POETXConfig.from_dict({"normalize_rows": False, "seed": 3}) == POETXConfig(seed=3)
        assert BackendOptions.parse(None, {"normalize_rows": False}).config == {}
    with pytest.warns(DeprecationWarning, match=FORMER):
        assert POETXConfig.from_dict({"normalize_rows": True}) == POETXConfig(init="rows")
    with pytest.warns(DeprecationWarning, match=FORMER):
        assert BackendOptions.parse(None, {"normalize_rows": True}).config == {"init": "rows"}


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown POETXConfig field\(s\) blocksize; known: base"):
        POETXConfig.from_dict({"blocksize": 4})
    with pytest.raises(ConfigError, match="None is no dict of the fields"):
        POETXConfig.from_dict(None)  # type: ignore[arg-type]


def test_block_size_of_each_side() -> None:
    assert (POETXConfig(block_size=8).block_in, POETXConfig(block_size=8).block_out) == (8, 8)
    pair = POETXConfig(block_size=(4, 8))
    assert (pair.block_in, pair.block_out) == (4, 8)


def test_order_of_the_ops() -> None:
    assert POETXConfig(neumann_order=5).order == 5
    assert POETXConfig(neumann_order=5, cayley="exact").order is None


def test_it_cannot_be_changed_behind_a_prepared_model() -> None:
    config = POETXConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 4  # type: ignore[misc]
    assert copy.deepcopy(config) == config
