"""The command ``poetx``: what it prints and writes, and what it says of wrong arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import poetx_compile as poetx
from poetx_compile.inspect.command_line import main

FACTORY = ["--factory", "tests.helpers.models:SwiGLU", "--block-size", "8"]


def test_explain_prints_the_table_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    inputs = ["--input", "3x16", "--verbose", "--html", str(page), "--graphs", "--base", "int8"]
    assert main(["explain", *FACTORY, *inputs, "--option", "disable_passes=batch_cayley"]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 nn.Linear rewritten in 1 graph\n" in out
    assert "poetx.rotate_blocks(" in out
    assert "poetx.dequantize(" in out
    assert "split(" not in out
    assert f"page: {page}" in out
    assert "SwiGLU" in page.read_text(encoding="utf-8")


def test_explain_shows_a_model_that_nobody_prepared(capsys: pytest.CaptureFixture[str]) -> None:
    dtype = ["--input", "3x16:bfloat16", "--dtype", "bfloat16"]
    assert main(["explain", *FACTORY, *dtype, "--adopt", "--graphs", "--variant", "mem"]) == 0
    out = capsys.readouterr().out
    assert "bf16[40, 16]" in out
    assert "(3 of 3 nn.Linear) train by rotations" in out


def test_estimate_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "memory.json"
    common = ["estimate", *FACTORY, "--variants", ""]
    assert main([*common, "--input", "3x16", "--json", str(file)]) == 0
    assert "optimizer state" in capsys.readouterr().out
    values = json.loads(file.read_text())
    assert values["model"] == "SwiGLU"
    # float32 weights of three linears, and a moment and a counter twice and once of each.
    assert values["rows"][0]["weights"] == 3 * 16 * 40 * 4
    assert values["rows"][0]["optimizer_state"] == 2 * 3 * 16 * 40 * 4 + 3 * 4


def test_estimate_takes_a_memory_budget(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["estimate", *FACTORY, "--input", "30x16", "--variants", "fast"]
    assert main([*common, "--memory-budget", "0.8"]) == 0
    assert "POET-X fast, budget 0.8" in capsys.readouterr().out
    assert main([*common, "--memory-budget", "8"]) == 2
    assert "memory_budget = 8.0 is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["estimate"], "give either the path of a config.json or --factory"),
        (["estimate", "config.json", *FACTORY], "give either the path of a config.json or"),
        (["estimate", "no/such/config.json"], "there is no file no/such/config.json"),
        (["explain", "--factory", "tests.helpers.models"], "write it as MODULE:FUNCTION"),
        (["explain", "--factory", "no_such_module:f"], "No module named 'no_such_module'"),
        (["explain", "--factory", "tests.helpers.models:Nothing"], "Nothing"),
        (["explain", "--factory", "tests.helpers.models:F"], "is a module, no function"),
        (["explain", "--factory", "builtins:dict"], "returned a dict, no module"),
        (["explain", *FACTORY, "--input", "3xa"], "such as 8x1024:int64"),
        (["explain", *FACTORY, "--input", "3x16:int65"], "such as 8x1024:int64"),
        (["explain", *FACTORY, "--input", "3x16", "--batch-size", "2"], "beside example inputs"),
        (["explain", *FACTORY, "--input", "3x16", "--option", "stage"], "write it as NAME=JSON"),
        (["explain", *FACTORY, "--input", "3x16", "--option", "stage=7"], "option stage = 7"),
        (["explain", *FACTORY, "--input", "3x16", "--block-size", "1"], "block_size = 1"),
        (["explain", *FACTORY, "--input", "3x16", "--html", "no/such/page"], "'no/such/page'"),
        (["estimate", *FACTORY, "--input", "3x16", "--json", "no/such/file"], "'no/such/file'"),
    ],
)
def test_wrong_arguments_say_what_to_do(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("poetx ")
    assert error.count("\n") == 1


def test_it_is_a_module_with_help() -> None:
    command = [sys.executable, "-m", "poetx_compile", "estimate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m poetx_compile estimate")
    assert "examples:" in done.stdout
    assert "--sequence-length" in done.stdout


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    expected = f"poetx-compile {poetx.__version__}, torch {torch.__version__}\n"
    assert capsys.readouterr().out == expected
