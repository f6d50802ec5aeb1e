"""The benchmarks at tiny sizes on the CPU: rows, gate, floors, saved bytes, plots, the peer."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poetx_compile as poetx
from benchmarks import (
    cayley,
    drift,
    floors,
    gate,
    generate,
    layers,
    machine,
    merge,
    merged,
    options,
    peer,
    permute,
    pieces,
    plot,
    rows,
    step,
    step_worker,
)
from benchmarks.saved import saved_bytes
from benchmarks.timing import Timer, training_step

CPU = torch.device("cpu")
CEILINGS = floors.Ceilings(bytes_per_s=1e12, flops_per_s=1e15, fp32_flops_per_s=1e14)
ENVIRONMENT = {"gpu", "torch", "triton", "dtype"}
FAST = ("--warmup-ms", "0", "--rep-ms", "1", "--rounds", "1")


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine._COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(machine._PRODUCT_SIZE, "cpu", 32)


def read_back(folder: Path, name: str, found: list[rows.Row], keys: set[str]) -> None:
    """The rows are what the file holds, and have the keys, with times that are times."""
    assert rows.read(folder / f"{name}-cpu.json") == found
    for row in found:
        assert ENVIRONMENT | keys <= set(row)
        assert row["ms"] > 0
        assert row["ratio"] > 0


# --- the benchmarks -------------------------------------------------------------------------------


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
            *("--device", "cpu", "--shapes", "24x16", "--tokens", "8", "--block-sizes", "8"),
            *("--variants", "fast", "--permutations", "random"),
            *("--output", str(tmp_path), "--name", "two", *FAST),
        ]
    )
    read_back(tmp_path, "two", found, {"linear_ms"})
    assert len(found) == 1
    assert found[0]["linear_saved_mib"] == 8 * 24 * 4 / 2**20


def test_merged(tmp_path: Path) -> None:
    found = merged.main(
        [
            *("--device", "cpu", "--shapes", "48x80", "--tokens", "40", "--block-sizes", "16"),
            *("--sides", "both,one", "--stage", "eager", "--output", str(tmp_path), *FAST),
        ]
    )
    keys = {"linear_ms", "step_ms", "adamw_ms", "layer_ratio", "floor_ratio", "step_error"}
    read_back(tmp_path, "merged", found, keys | {"saved_mib", "gradient_error"})
    assert [row["sides"] for row in found] == ["both", "one"]
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


def test_drift(tmp_path: Path) -> None:
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
    assert 1e-4 < by_rounding["stochastic"]["mean_drift"] < 0.1
    assert abs(by_rounding["stochastic norm"]["norm_drift"]) < 1e-3


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


STEP = (
    *("--device", "cpu", "--presets", "tiny", "--vocabulary", "32", "--batch", "1"),
    *("--length", "8", "--block-sizes", "32", "--permutations", "random", "--variants", "fast"),
    *("--stage", "eager", "--warmup", "0", "--steps", "1", "--rounds", "1", "--lr", "1e-3"),
)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without a process of their own: seconds faster."""

    def run(case: step_worker.StepCase) -> rows.Row:
        torch._dynamo.reset()
        return step_worker.run(case)

    monkeypatch.setattr(step, "in_process", run)


@pytest.mark.usefixtures("in_this_process")
def test_step(tmp_path: Path) -> None:
    found = step.main([*STEP, "--output", str(tmp_path), "--merge-interval", "10"])
    keys = {"method", "tokens", "block_size", "variant", "formulation", "tokens_per_s"}
    keys |= {"linear_ms", "first_step_s", "weights_mib", "gradients_mib", "optimizer_mib"}
    keys |= {"activations_mib", "peak_mib", "merge_ms", "merge_share", "early_merges", "loss_error"}
    keys |= {"speed_ratio", "first_step_ratio", "peak_ratio"}
    read_back(tmp_path, "step", found, keys)
    dense, ours = found
    assert (dense["method"], dense["block_size"], dense["ratio"]) == ("dense", None, 1.0)
    assert (ours["method"], ours["block_size"]) == ("poetx", 32)
    assert ours["linear_ms"] == dense["ms"]
    assert ours["ms"] == pytest.approx(ours["step_ms"] + ours["merge_ms"] / 10)
    # Two blocks of 4 projections (128 → 128) and 3 of 128 and 384, embedding, head, 5 norms.
    weights = 2 * (4 * 128 * 128 + 3 * 128 * 384)
    rest = 2 * 32 * 128 + 5 * 128
    assert dense["gradients_mib"] == (weights + rest) * 4 / 2**20
    sides = 2 * (4 * (128 + 128) + 3 * (128 + 384)) // 32
    assert ours["gradients_mib"] == (sides * (32 * 31 // 2) + rest) * 4 / 2**20
    assert ours["optimizer_mib"] < 0.5 * dense["optimizer_mib"]


@pytest.mark.usefixtures("in_this_process")
def test_step_of_the_merged_form(tmp_path: Path) -> None:
    arguments = ["--merge-interval", "1", "--optimizers", "muon", "--gains", "rows"]
    arguments += ["--layers", "1", "--by-layer"]
    arguments += ["--sides", "both,one", "--output", str(tmp_path)]
    dense, ours, one = step.main([*STEP, *arguments])
    assert (dense["sides"], ours["sides"], one["sides"]) == (None, "both", "one")
    assert (dense["merge_interval"], ours["merge_interval"], ours["merge_ms"]) == (None, 1, 0)
    assert (dense["gains"], ours["gains"]) == (None, "rows")
    assert (ours["layers"], ours["by_layer"]) == (1, True)
    assert ours["ms"] == ours["step_ms"]
    assert ours["gradients_mib"] < 0.6 * dense["gradients_mib"]


@pytest.mark.usefixtures("in_this_process")
def test_step_accumulates_with_folded_weights_kept_or_not(tmp_path: Path) -> None:
    more = ["--formulations", "folded", "--accumulation", "2", "--keep-folded", "call,step"]
    dense, made_anew, kept = step.main([*STEP, *more, "--output", str(tmp_path)])
    tokens = 2 * 8
    assert [row["tokens"] for row in (dense, made_anew, kept)] == [tokens] * 3
    assert [row["keep_folded"] for row in (dense, made_anew, kept)] == [None, "call", "step"]
    assert kept["tokens_per_s"] == pytest.approx(1e3 * tokens / kept["ms"])
    assert kept["last_loss"] == pytest.approx(made_anew["last_loss"], rel=1e-4)


@pytest.mark.usefixtures("in_this_process")
def test_step_has_a_row_for_each_memory_budget(tmp_path: Path) -> None:
    arguments = [*STEP, "--stage", "aot_eager", "--output", str(tmp_path)]
    rows = step.main([*arguments, "--memory-budgets", "0.8"])
    asked = [(row["variant"], row["memory_budget"]) for row in rows]
    assert asked == [(None, None), ("fast", None), ("fast", 0.8)]
    arguments += ["--variants", "mem,fast", "--memory-budgets", "0.9,0.8"]
    cases = [c for c in step.cases(step._parser().parse_args(arguments)) if c.method == "poetx"]
    asked = [(case.variant, case.memory_budget) for case in cases]
    assert asked == [("mem", None), ("fast", None), ("fast", 0.9), ("fast", 0.8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cuda-graphs"], "--cuda-graphs needs --stage inductor"),
        (["--optimizers", "sgd,muon"], "--optimizers sgd: use some of adamw,muon"),
        (["--sides", "one"], "--sides one: only POETXMuon takes turns"),
        (["--keep-folded", "call,ever"], "--keep-folded ever: use some of call,step"),
        (["--memory-budgets", "0.5,2"], "argument --memory-budgets: invalid list of fraction"),
        (["--memory-budgets", "0.5", "--keep-folded", "step"], "--memory-budgets keep less"),
    ],
)
def test_step_refuses_options_that_cannot_be(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        step.main([*STEP, *arguments])
    assert message in capsys.readouterr().err


def test_a_worker_is_a_process_with_empty_caches(tmp_path: Path) -> None:
    case = step_worker.StepCase(
        method="dense", preset="tiny", vocabulary=8, batch=1, length=4, device="cpu",
        dtype="float32", stage="eager", warmup=0, steps=1, rounds=1, lr=1e-3,
    )  # fmt: skip
    row = step.in_process(case)
    assert row["method"] == "dense"
    assert row["tokens"] == 4


def test_step_has_no_row_where_training_does_not_lower_the_loss() -> None:
    case = step_worker.StepCase(
        method="dense", preset="tiny", vocabulary=8, batch=1, length=4, device="cpu",
        dtype="float32", stage="eager", warmup=0, steps=1, rounds=1, lr=0.0,
    )  # fmt: skip
    with pytest.raises(gate.GateError, match="the loss went from"):
        step_worker.run(case)


def test_step_has_no_row_where_the_compiled_model_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = step_worker.build

    def broken(*arguments: Any) -> step_worker.Trained:
        trained = build(*arguments)
        forward = trained.forward
        trained.forward = lambda *batch: 1.001 * forward(*batch)
        return trained

    monkeypatch.setattr(step_worker, "build", broken)
    case = step_worker.StepCase(
        method="dense", preset="tiny", vocabulary=8, batch=1, length=4, device="cpu",
        dtype="float32", stage="eager", warmup=0, steps=1, rounds=1, lr=1e-3,
    )  # fmt: skip
    with pytest.raises(gate.GateError, match="loss of the compiled model"):
        step_worker.run(case)


# --- the gate -------------------------------------------------------------------------------------


@pytest.fixture
def layer() -> nn.Linear:
    """24 → 16, blocks of 8, rotations that are not the identity, a bias."""
    module = nn.Linear(24, 16)
    poetx.prepare(module, poetx.POETXConfig(block_size=8))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "skew" in name:
            gate.random_skew_(parameter.data, 8, generator)
    return module


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return torch.randn(10, 24, requires_grad=True), torch.randn(10, 16)


def test_the_gate_passes_the_layer_itself(layer: nn.Linear, data: tuple[Tensor, Tensor]) -> None:
    errors = gate.check_layer(layer, layer, *data)
    assert set(errors) == {"output_error", "gradient_error"}
    assert 0 < errors["output_error"] < 1e-5
    assert all(p.grad is None for p in (data[0], *layer.parameters()))


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 1.001 * grads[0]


def test_the_gate_fails_a_wrong_output(layer: nn.Linear, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(gate.GateError, match="output: relative error"):
        gate.check_layer(lambda x: 1.001 * layer(x), layer, *data)


def test_the_gate_fails_a_wrong_input_gradient(
    layer: nn.Linear, data: tuple[Tensor, Tensor]
) -> None:
    with pytest.raises(gate.GateError, match="gradient of x: relative error"):
        gate.check_layer(lambda x: layer(_ScaledGradient.apply(x)), layer, *data)


def test_the_gate_fails_a_wrong_rotation_gradient(
    layer: nn.Linear, data: tuple[Tensor, Tensor]
) -> None:
    def wrong(x: Tensor) -> Tensor:
        weight = layer.weight
        weight.register_hook(lambda grad: 1.001 * grad)
        return nn.functional.linear(x, weight, layer.bias)

    with pytest.raises(gate.GateError, match=r"gradient of parametrizations.*skew"):
        gate.check_layer(wrong, layer, *data)


def test_the_gate_fails_rotations_that_get_no_gradient(
    layer: nn.Linear, data: tuple[Tensor, Tensor]
) -> None:
    def frozen(x: Tensor) -> Tensor:
        return nn.functional.linear(x, layer.weight.detach(), layer.bias)

    with pytest.raises(gate.GateError, match="skew_in is missing"):
        gate.check_layer(frozen, layer, *data)


def test_the_gate_fails_what_is_not_finite_or_has_another_shape() -> None:
    x = torch.ones(3)
    with pytest.raises(gate.GateError, match="relative error nan"):
        gate.check(x * torch.nan, x, torch.float32, "it")
    with pytest.raises(gate.GateError, match=r"shape \[1, 3\], not \[3\]"):
        gate.check(x[None], x, torch.float32, "it")


def test_random_rotations_stay_below_the_angle_guard() -> None:
    b, skew = 64, torch.zeros(4, 64 * 63 // 2)
    gate.random_skew_(skew, b, torch.Generator().manual_seed(0))
    upper = torch.zeros(4, b, b)
    upper[:, *torch.triu_indices(b, b, 1)] = skew
    angle = torch.linalg.matrix_norm(upper - upper.mT, 2).max()
    assert 0.1 < angle < 0.2


# --- floors ---------------------------------------------------------------------------------------


def test_floors_of_a_linear_by_hand() -> None:
    sizes = floors.Layer.of(2048, 4096, 14336, 256, 2)
    costs = floors.linear(sizes)
    assert floors.total_flops(costs) == 6 * 2048 * 4096 * 14336
    # One GEMM: 2.405e11 FLOPs, 1.929e8 bytes; at 1e15 FLOP/s and 1e12 B/s compute takes longer.
    assert costs[0].bytes == 2 * (2048 * 4096 + 2048 * 14336 + 4096 * 14336) == 192937984
    assert floors.total_ms(costs, CEILINGS) == pytest.approx(3 * 0.240518168576)
    assert floors.total_flops(floors.linear(sizes, trained=False)) == 4 * 2048 * 4096 * 14336


@pytest.mark.parametrize("fold_in", [False, True])
@pytest.mark.parametrize("fold_out", [False, True])
def test_flops_of_poetx_by_hand(fold_in: bool, fold_out: bool) -> None:
    t, m, n, b = 100, 32, 48, 16
    sizes = floors.Layer.of(t, m, n, b, 2)
    # Order 3: two products forward and four backward, for 2 + 3 blocks. The gradient of a folded
    # rotation takes the forward's again, and one with the inverse.
    side_in = 2 * b * m * n + 2 * t * b * m if fold_in else 6 * t * b * m
    side_out = 2 * b * m * n + 2 * t * b * n if fold_out else 6 * t * b * n
    products = 2 * (9 if fold_in else 6) + 3 * (9 if fold_out else 6)
    expected = 4 * t * m * n + side_in + side_out + products * 2 * b**3
    fast = floors.poetx(sizes, "fast", fold_in=fold_in, fold_out=fold_out)
    assert floors.total_flops(fast) == expected
    again = 2 * b * m * n if fold_in else 2 * t * b * m
    again += 2 * b * m * n if fold_out else 2 * t * m * n
    mem = floors.poetx(sizes, "mem", fold_in=fold_in, fold_out=fold_out)
    assert floors.total_flops(mem) == expected + again


def test_floors_of_sides_that_the_block_size_does_not_divide() -> None:
    # 35 = 2·16 + 3: the last three coordinates are not rotated; 7 is one block.
    wide, narrow = floors.Side(35, 16), floors.Side(7, 16)
    assert (wide.blocks, wide.b, wide.rotated) == (2, 16, 32)
    assert (narrow.blocks, narrow.b, narrow.rotated) == (1, 7, 7)
    costs = floors.poetx(floors.Layer(10, wide, narrow, 4), "fast", fold_in=False, fold_out=True)
    rotation = next(cost for cost in costs if cost.name == "rotation")
    assert rotation.flops == 2 * 10 * 16 * 32
    assert rotation.bytes == 2 * 10 * 35 * 4 + 4 * 2 * 16 * 16


def test_floors_of_rotations_permutations_and_merges_by_hand() -> None:
    side = floors.Side(512, 256)
    forward, backward = floors.cayley(side, 3)
    assert (forward.flops, backward.flops) == (2 * 2 * 2 * 256**3, 2 * 4 * 2 * 256**3)
    assert forward.bytes == 4 * 2 * (256 * 255 // 2 + 256 * 256)
    assert forward.ms(CEILINGS) == pytest.approx(1e3 * 134217728 / 1e14)  # the precise rate
    narrow = floors.cayley(side, 3, precise=False)[0]
    assert narrow.ms(CEILINGS) == pytest.approx(1e3 * max(134217728 / 1e15, forward.bytes / 1e12))
    assert floors.tangent(side, 3).flops == 2 * (2 + 1 + 4) * 2 * 256**3
    assert floors.tangent(side, None).flops == 6 * 2 * 256**3
    with pytest.raises(ValueError, match="no floor is known for order 7: use 1 to 6"):
        floors.cayley(side, 7)
    assert floors.permute(8192, 4096, 2).ms(CEILINGS) == pytest.approx(0.134217728)
    costs = floors.merge(floors.Layer.of(0, 512, 512, 256, 2))
    assert costs[-1].flops == 4 * 256 * 512 * 512
    assert costs[-1].bytes == 2 * 2 * 512 * 512
    plain = floors.merge(floors.Layer.of(0, 512, 512, 256, 2), "plain")
    assert floors.total_flops(costs) - floors.total_flops(plain) == 4 * 2 * 4 * 256**3


def test_auto_is_the_cheapest_choice_of_sides() -> None:
    sizes = floors.Layer.of(512, 4096, 14336, 256, 2)
    auto, rotated, folded = (
        floors.total_ms(floors.poetx_of(sizes, "fast", name, CEILINGS), CEILINGS)
        for name in ("auto", "input_centric", "folded")
    )
    assert auto <= min(rotated, folded)
    many = floors.Layer.of(16384, 4096, 14336, 256, 2)
    both_folded = floors.poetx(many, "fast", fold_in=True, fold_out=True)
    assert floors.poetx_of(many, "fast", "auto", CEILINGS) == both_folded


# --- saved bytes, timing, rows, options -----------------------------------------------------------


class _TanhLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def test_saved_bytes_tell_the_output_apart_and_leave_parameters_out() -> None:
    module, x = _TanhLinear(), torch.randn(7, 6, requires_grad=True)
    saved = saved_bytes(module, module, x)
    assert (saved.total, saved.output) == (4 * 7 * (6 + 5), 4 * 7 * 5)
    saved = saved_bytes(module.linear, module, x)
    assert (saved.total, saved.output) == (4 * 7 * 6, 0)


def test_the_timer_takes_turns_and_orders_what_it_times() -> None:
    calls: list[str] = []

    def sleeper(name: str, seconds: float) -> Any:
        def sleep() -> None:
            calls.append(name)
            time.sleep(seconds)

        return sleep

    timer = Timer(CPU, warmup_ms=0, rep_ms=0, rounds=2)
    times = timer.compare({"a": sleeper("a", 0.001), "b": sleeper("b", 0.004)})
    assert [c for i, c in enumerate(calls) if i == 0 or calls[i - 1] != c] == ["a", "b"] * 2
    assert 1 <= times["a"].low <= times["a"].ms <= times["a"].high
    assert times["b"].low >= 4
    assert times["a"].ms < times["b"].ms


def test_cuda_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device"):
        Timer(CPU, cuda_graphs=True)


def test_a_training_step_makes_all_gradients_anew() -> None:
    module, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    run = training_step(module, module, x, torch.ones(4, 2))
    run()
    first = [p.grad.clone() for p in (x, *module.parameters()) if p.grad is not None]
    run()
    assert len(first) == 3
    for leaf, gradient in zip((x, *module.parameters()), first, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)  # not accumulated


def test_the_machine_has_ceilings() -> None:
    ceilings = machine.measure(Timer(CPU, 0, 1, 1), torch.float32)
    assert min(ceilings.bytes_per_s, ceilings.flops_per_s, ceilings.fp32_flops_per_s) > 1e5


def test_files_and_tables_of_rows(tmp_path: Path) -> None:
    path = rows.result_path(tmp_path / "new", "layers", "NVIDIA H200 (x)")
    assert path.name == "layers-nvidia-h200-x.json"
    written = [{"a": 1, "b": None}, {"a": 22, "b": 0.123456}]
    rows.write(path, written)
    assert rows.read(path) == written
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert rows.table(written, ("a", "b", "c")) == textwrap.dedent(
        """\
         a       b  c
        --  ------  -
         1       -  -
        22  0.1235  -"""
    )
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="no list of rows"):
        rows.read(path)


def test_options_are_lists_and_wrong_ones_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = options.parser("layers", "")
    options.add_shapes(parser)
    args = parser.parse_args(["--shapes", "4096x14336, 8x9", "--tokens", "1,2"])
    assert args.shapes == ((4096, 14336), (8, 9))
    assert args.tokens == (1, 2)
    for wrong in (["--shapes", "4096"], ["--tokens", "0"], ["--tokens", "1,"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
    assert "invalid list of positive value: '0'" in capsys.readouterr().err


# --- plots ----------------------------------------------------------------------------------------


def layer_rows() -> list[rows.Row]:
    constant = {"gpu": "NVIDIA H200", "torch": "2.11", "dtype": "bfloat16", "cuda_graphs": False}
    constant |= {"formulation": "auto", "permutation": "chunked", "flop_ratio": 0.7}
    return [
        constant
        | {"in_features": m, "out_features": 4096, "tokens": t, "block_size": b, "variant": v}
        | {"ratio": 0.8 + b / 1e4 + t / 1e6, "floor_ratio": 0.7}
        for m in (4096, 14336)
        for t in (8192, 2048)
        for b in (128, 256)
        for v in ("fast", "mem")
    ]


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows.write(tmp_path / "layers-x.json", layer_rows())
    paths = plot.main([str(tmp_path / "layers-x.json"), "--output", str(tmp_path / "images")])
    assert [p.name for p in paths] == ["layers-x-tokens.png", "layers-x-blocks.png"]
    assert all(p.stat().st_size > 10_000 for p in paths)
    assert capsys.readouterr().out.split() == [str(p) for p in paths]


def test_a_plot_has_a_panel_for_each_shape_and_a_line_with_its_floor_for_each_choice() -> None:
    pytest.importorskip("matplotlib")
    figure = plot.ratio_figure(layer_rows(), "tokens", "block_size", 256)
    assert [panel.get_title() for panel in figure.axes] == ["4096 → 4096", "14336 → 4096"]
    lines = figure.axes[0].get_lines()
    labels = [line.get_label() for line in lines if not line.get_label().startswith("_")]
    assert labels == ["fast, auto, chunked", "mem, auto, chunked"]
    assert len(lines) == 2 * 3 + 1
    assert lines[0].get_xdata().tolist() == [2048, 8192]
    assert lines[0].get_ydata() == pytest.approx([0.8 + 256 / 1e4 + t / 1e6 for t in (2048, 8192)])
    assert lines[1].get_ydata().tolist() == [0.7, 0.7]
    with pytest.raises(ValueError, match=r"no row with block_size = 64; there are \[128, 256\]"):
        plot.ratio_figure(layer_rows(), "tokens", "block_size", 64)


# --- the peer -------------------------------------------------------------------------------------

PEER = '''
import torch

class POETLinear(torch.nn.Module):
    """The interface of a peer's layer over one rotation of the inputs."""

    def __init__(self, m, n, block_size=256, device=None, dtype=None, mem_efficient_mode=False):
        super().__init__()
        self.b = block_size
        self.weight = torch.nn.Parameter(torch.empty(n, m, dtype=dtype), requires_grad=False)
        blocks = (m + n) // block_size
        size = block_size * (block_size - 1) // 2
        self.oft_R = torch.nn.Parameter(torch.zeros(blocks, size, dtype=dtype))

    def get_effective_weight(self):
        return self.weight * (1 + self.oft_R.sum()) * {factor}

    def forward(self, x):
        return x @ (self.weight * (1 + self.oft_R.sum())).T

class POETConfig:
    def __init__(self, block_size, mem_efficient_mode, base_lr, poet_lr):
        self.lr = base_lr

class POETModel(torch.nn.Module):
    def __init__(self, model, config):
        super().__init__()
        self.base_model, self.merges = model, 0

    def forward(self, *args):
        return self.base_model(*args)

    def merge(self):
        self.merges += 1

def get_poet_optimizer(model, config):
    return torch.optim.AdamW(model.parameters(), lr=config.lr)
'''


@pytest.fixture
def peer_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "peer"
    (folder / peer.PACKAGE).mkdir(parents=True)
    (folder / peer.PACKAGE / "__init__.py").write_text(PEER.replace("{factor}", "1"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    sys.modules.pop(peer.PACKAGE, None)


LAYERS_WITH_PEER = (
    *("--device", "cpu", "--shapes", "16x8", "--tokens", "4", "--block-sizes", "8"),
    *("--variants", "mem", "--permutations", "random", "--stage", "aot_eager", *FAST),
)


def test_a_peer_runs_beside_a_layer(peer_folder: Path, tmp_path: Path) -> None:
    arguments = [*LAYERS_WITH_PEER, "--output", str(tmp_path)]
    assert len(layers.main(arguments)) == 1
    assert peer.PACKAGE not in sys.modules
    ours, theirs = layers.main([*arguments, "--peer", str(peer_folder)])
    assert ours["formulation"] == "auto"
    assert theirs["formulation"] == peer.PACKAGE
    assert theirs["ms"] > 0
    assert theirs["output_error"] < 1e-5


def test_a_peer_passes_the_gate_too(peer_folder: Path, tmp_path: Path) -> None:
    code = peer_folder / peer.PACKAGE / "__init__.py"
    code.write_text(PEER.replace("{factor}", "1.01"))
    with pytest.raises(gate.GateError, match="output: relative error"):
        layers.main([*LAYERS_WITH_PEER, "--output", str(tmp_path), "--peer", str(peer_folder)])


def test_a_peer_trains_a_model(peer_folder: Path) -> None:
    case = step_worker.StepCase(
        method="peer", preset="tiny", vocabulary=8, batch=1, length=4, device="cpu",
        dtype="float32", stage="eager", warmup=0, steps=1, rounds=1, lr=1e-3,
        peer=str(peer_folder),
    )  # fmt: skip
    row = step_worker.run(case)
    assert row["merge_ms"] > 0
    assert row["peer"] == peer.PACKAGE
    assert row["last_loss"] < row["first_loss"]


def test_a_folder_without_a_peer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(peer.PeerError, match="holds no package poet_torch"):
        peer.load(tmp_path)


def test_a_peer_with_another_interface_is_refused(peer_folder: Path) -> None:
    (peer_folder / peer.PACKAGE / "__init__.py").write_text("class POETLinear: ...\n")
    with pytest.raises(peer.PeerError, match="has no POETConfig, POETModel, get_poet_optimizer"):
        peer.load(peer_folder)
