"""What the benchmarks share: saved bytes, timing, the machine, rows, options, plots."""

from __future__ import annotations

import json
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import (
    machine,
    options,
    plot,
    rows,
)
from benchmarks.saved import saved_bytes
from benchmarks.timing import Timer, training_step
from tests.helpers.benchmarks import CPU, small_machine


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    small_machine(monkeypatch)


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
