"""What `prepare` does to the weights: `POETXConfig.init`, its range and its scale."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError
from poetx_compile.layers.initialise import with_spectrum
from poetx_compile.layers.prepare import merge_and_unload, prepare
from poetx_compile.layers.prepared import prepared_linears
from tests.helpers.models import MLP
from tests.helpers.tolerances import assert_close

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def changed(linear: nn.Linear, **config) -> Tensor:
    """The weight after `prepare`, of a copy."""
    linear = copy.deepcopy(linear)
    prepare(linear, POETXConfig(block_size=4, **config))
    return linear.weight.detach().clone()


def series(n: int, m: int, ratio: float) -> Tensor:
    k = min(n, m)
    values = torch.tensor([ratio ** (i / (k - 1)) for i in range(k)], dtype=torch.float64)
    return values * math.sqrt(n) / values.norm()


@dtypes
def test_rows_get_norm_one_and_a_zero_row_stays_zero(dtype) -> None:
    linear = nn.Linear(40, 7, dtype=dtype)
    with torch.no_grad():
        linear.weight[3] = 0
    norms = changed(linear, init="rows").double().norm(dim=1)
    expected = torch.ones(7, dtype=torch.float64)
    expected[3] = 0
    assert norms[3] == 0
    assert_close(norms, expected, dtype)


@dtypes
@pytest.mark.parametrize(("n", "m"), [(7, 13), (13, 7), (8, 8)])
def test_a_spectrum_keeps_singular_vectors_and_the_norm_of_normalised_rows(n, m, dtype) -> None:
    linear = nn.Linear(m, n, dtype=dtype)
    new = changed(linear, init="spectrum", init_range=0.2).double()
    u, _, vt = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    assert_close(new, u @ torch.diag(series(n, m, 0.2)) @ vt, dtype)
    assert_close(new.norm(), changed(linear.double(), init="rows").norm(), dtype)


def test_one_singular_value_and_a_low_rank_stay_what_they_are() -> None:
    row = torch.randn(1, 9, dtype=torch.float64)
    assert_close(with_spectrum(row, 0.1), row / row.norm())
    thin = torch.randn(8, 3) @ torch.randn(3, 9)
    values = torch.linalg.svdvals(with_spectrum(thin, 0.25))
    expected = torch.zeros(8, dtype=torch.float64)
    expected[:3] = series(8, 3, 0.25)
    assert_close(values, expected, torch.float32)


@pytest.mark.parametrize("init", ["keep", "rows", "spectrum"])
def test_the_scale_multiplies_and_is_reported(init: str) -> None:
    linear = nn.Linear(13, 7)
    once = changed(linear, init=init)
    assert torch.equal(once, linear.weight) == (init == "keep")
    assert_close(changed(linear, init=init, init_scale=3.0), 3 * once)
    report = prepare(
        MLP(), POETXConfig(block_size=4, init=init, init_scale=3, exclude_modules=["up"])
    )
    notes = {row.name: row.reason for row in report}
    said = {
        "keep": "",
        "rows": "rows normalised, ",
        "spectrum": "singular values a series 1 to 0.1, ",
    }
    assert notes["down"] == f"{said[init]}times 3; left over until the next redraw: 2 in"
    assert notes["up"] == "excluded by name: up"


def test_what_is_prepared_already_is_left_alone() -> None:
    model = MLP()
    prepare(model.up, config := POETXConfig(block_size=4, init="spectrum"))
    before = model.up.weight.detach().clone()
    prepare(model, config)
    assert torch.equal(model.up.weight, before)
    assert_close(model.down.weight.detach().norm(), torch.tensor(12.0).sqrt())


@pytest.mark.parametrize("config", [{"init": "rows"}, {"init": "spectrum"}, {"init_scale": 2.0}])
def test_weights_without_values_are_refused_before_anything_is_changed(config) -> None:
    config = POETXConfig(block_size=4, **config)
    with torch.device("meta"):
        meta = MLP()
    with pytest.raises(ConfigError, match="needs the values of the weights, and up is on"):
        prepare(meta, config)
    model = MLP()
    with torch.no_grad():
        model.down.weight[2, 3] = math.nan
    before = model.up.weight.detach().clone()
    with pytest.raises(ConfigError, match="weight of down has values that are not finite: give"):
        prepare(model, config)
    assert torch.equal(model.up.weight, before)
    assert not list(prepared_linears(meta))
    assert not list(prepared_linears(model))
    with FakeTensorMode():  # `estimate` counts bytes, of weights that have no values
        prepare(MLP(), config)


def test_a_weight_that_a_graph_adopted_is_initialised_before_its_first_backward() -> None:
    model = MLP()
    before = copy.deepcopy(model)
    compiled = torch.compile(model, backend="poetx", options={"stage": "eager", "block_size": 4})
    compiled(torch.randn(3, 12))
    prepare(model, POETXConfig(block_size=4, init="rows"))
    merge_and_unload(model)
    for linear, plain in ((model.up, before.up), (model.down, before.down)):
        assert_close(linear.weight, nn.functional.normalize(plain.weight, dim=1))
