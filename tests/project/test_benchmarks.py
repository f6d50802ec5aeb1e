"""The benchmarks of layers and ops at tiny sizes on the CPU: their rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import (
    cayley,
    drift,
    floors,
    gate,
    generate,
    layers,
    merge,
    merged,
    permute,
    pieces,
    rows,
)
from tests.helpers.benchmarks import FAST, read_back, small_machine


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    small_machine(monkeypatch)


def test_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = layers.main(
        [
            *("--device", "cpu", "--shapes", "48x80", "--tokens", "40", "--block-sizes", "16"),
            *("--variants", "fast,mem", "--formulations", "input_centric"),
            *("--stage", "aot_eager", "--output", str(tmp_path), *FAST),
        ]
    )
    keys = {"tokens", "in_features", "out_features", "block_size", "variant", "formulation"}
    keys |= {"permutation", "linear_ms", "frozen_ms", "saved_mib", "saved_output_mib"}
    keys |= {"linear_saved_mib", "floor_ms", "linear_floor_ms", "floor_ratio", "flop_ratio"}
    keys |= {"output_error", "gradient_error", "cuda_graphs"}
    read_back(tmp_path, "layers", found, keys)
    assert [(r["variant"], r["permutation"]) for r in found] == [
        ("fast", "random"), ("fast", "chunked"), ("mem", "random"), ("mem", "chunked"),
    ]  # fmt: skip
    for row in found:
        assert row["ratio"] == row["ms"] / row["linear_ms"]
        assert row["linear_saved_mib"] == 40 * 48 * 4 / 2**20  # x
        # fast: x and U; mem: x alone.
        kept = 40 * (48 + 80) if row["variant"] == "fast" else 40 * 48
        assert row["saved_mib"] == kept * 4 / 2**20
        assert 0 < row["gradient_error"] < 1e-5
    table = capsys.readouterr().out
    assert "linear_saved_mib" in table
    assert "4 rows in" in table


def test_layers_through_inductor(tmp_path: Path) -> None:
    found = layers.main(
        [
            *("--device", "cpu", "--shapes", "16x24", "--tokens", "6", "--block-sizes", "8"),
            *("--variants", "fast", "--permutations", "random"),
            *("--output", str(tmp_path), "--name", "two", *FAST),
        ]
    )
    read_back(tmp_path, "two", found, {"linear_ms"})
    assert len(found) == 1
    assert found[0]["linear_saved_mib"] == 6 * 16 * 4 / 2**20


def test_merged(tmp_path: Path) -> None:
    found = merged.main(
        [
            *("--device", "cpu", "--shapes", "48x80", "--tokens", "40", "--block-sizes", "16"),
            *("--turn-every", "1,2", "--stage", "eager", "--output", str(tmp_path), *FAST),
        ]
    )
    keys = {"linear_ms", "step_ms", "adamw_ms", "layer_ratio", "floor_ratio", "step_error"}
    read_back(tmp_path, "merged", found, keys | {"saved_mib", "gradient_error"})
    assert [row["turn_every"] for row in found] == [1, 2]
    assert all(row["step_error"] < 1e-3 for row in found)
    assert found[1]["floor_ms"] < found[0]["floor_ms"]
    costs = floors.merged(floors.Layer.of(8192, 4096, 4096, 512, 2))
    plain = floors.linear(floors.Layer.of(8192, 4096, 4096, 512, 2))
    assert floors.total_flops(costs) / floors.total_flops(plain) == pytest.approx(0.8, abs=0.05)


def test_pieces(tmp_path: Path) -> None:
    small = ("--shapes", "48x80", "--tokens", "40", "--block-sizes", "16")
    found = pieces.main(["--device", "cpu", *small, "--output", str(tmp_path), *FAST])
    read_back(tmp_path, "pieces", found, {"op", "tiling", "floor_ms", "error"})
    products = ["skew_block_products"] * 2
    steps = [*["orthogonalize_skew"] * 2, "muon_step", *["turn_weights_"] * 3]
    assert [row["op"] for row in found] == products + steps
    assert [row["tokens"] for row in found] == [40, 40, *[None] * 6]


def test_cayley(tmp_path: Path) -> None:
    found = cayley.main(
        [
            *("--device", "cpu", "--block-sizes", "5,8", "--blocks", "3", "--orders", "3,exact"),
            *("--output", str(tmp_path), *FAST),
        ]
    )
    keys = {"op", "blocks", "block_size", "order", "narrow", "floor_ms", "error"}
    read_back(tmp_path, "cayley", found, keys)
    assert [(r["op"], r["block_size"], r["order"], r["narrow"]) for r in found] == [
        (f"cayley {op}", b, order, narrow)
        for b in (5, 8)
        for order, narrow in ((3, False), (3, True), ("exact", False))
        for op in ("forward", "backward", "tangent")
    ]


def test_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "NORM_EVERY", 10)
    found = drift.main(
        [
            *("--device", "cpu", "--shape", "24x17", "--block-size", "8", "--rates", "0.01"),
            *("--steps", "3,30", "--output", str(tmp_path)),
        ]
    )
    assert rows.read(tmp_path / "drift-cpu.json") == found
    assert [(r["rounding"], r["steps"]) for r in found] == [
        (rounding, steps) for rounding in drift.ROUNDINGS for steps in (3, 30)
    ]
    by_rounding = {r["rounding"]: r for r in found if r["steps"] == 30}
    assert abs(by_rounding["float32"]["mean_drift"]) < 1e-5
    assert 1e-4 < by_rounding[drift.ALONE]["mean_drift"] < 0.1
    assert abs(by_rounding["stochastic"]["norm_drift"]) < 1e-3


def test_permute(tmp_path: Path) -> None:
    found = permute.main(
        [
            *("--device", "cpu", "--tokens", "7", "--widths", "96"),
            *("--output", str(tmp_path), *FAST),
        ]
    )
    keys = {"tokens", "width", "permutation", "copy_ms", "indexing_ms", "floor_ms"}
    read_back(tmp_path, "permute", found, keys)
    assert [r["permutation"] for r in found] == ["random", "chunked"]


def test_element_permutation_of_a_pair_over_chunks() -> None:
    pair = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert permute.element_permutation(pair, 3).tolist() == [2, 0, 1]
    assert permute.element_permutation(pair, 6).tolist() == [4, 5, 0, 1, 2, 3]


def test_merge(tmp_path: Path) -> None:
    found = merge.main(
        [
            *("--device", "cpu", "--shapes", "48x80", "--block-sizes", "16"),
            *("--merge-rotations", "polar,plain", "--permutations", "random"),
            *("--output", str(tmp_path), *FAST),
        ]
    )
    keys = {"in_features", "out_features", "block_size", "merge_rotation", "floor_ms", "error"}
    read_back(tmp_path, "merge", found, keys)
    assert [r["merge_rotation"] for r in found] == ["polar", "plain"]


def test_generate(tmp_path: Path) -> None:
    (row,) = generate.main(
        [
            *("--device", "cpu", "--presets", "tiny", "--block-sizes", "16", "--context", "4"),
            *("--output", str(tmp_path), *FAST),
        ]
    )
    assert rows.read(tmp_path / "generate-cpu.json") == [row]
    assert row["gain"] == row["kept"] / row["built"] > 1
    assert row["kept_mib"] == 2 * (4 * 128 * 128 + 3 * 128 * 384) * 4 / 2**20


def test_merge_is_not_timed_where_it_loses_the_permutations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets_the_weight(layer: nn.Module, redraw: bool) -> None:
        for skew in (p for p in layer.parameters() if p.requires_grad):
            skew.detach().zero_()

    monkeypatch.setattr(merge, "merge", forgets_the_weight)
    arguments = ["--device", "cpu", "--shapes", "48x80", "--block-sizes", "16"]
    with pytest.raises(gate.GateError, match="weight merged plainly"):
        merge.main([*arguments, "--output", str(tmp_path), *FAST])
    assert not list(tmp_path.iterdir())
