"""DDP, FSDP2, their checkpoints and what they refuse, each on several processes over gloo.

The checks themselves are the functions ``check_…`` of the modules beside this one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.processes import run

pytestmark = pytest.mark.skipif(
    not __import__("torch").distributed.is_gloo_available(), reason="needs gloo"
)


def test_ddp(tmp_path: Path) -> None:
    run("ddp", tmp_path)


def test_fsdp(tmp_path: Path) -> None:
    run("fsdp", tmp_path)


def test_precision(tmp_path: Path) -> None:
    run("precision", tmp_path)


def test_resume_on_another_number_of_processes(tmp_path: Path) -> None:
    run("save", tmp_path, processes=1)
    run("save", tmp_path, processes=2)
    run("resume", tmp_path, processes=1)
    run("resume", tmp_path, processes=2)


def test_pipeline_stages(tmp_path: Path) -> None:
    run("stages", tmp_path)


def test_the_benchmark_of_scaling(tmp_path: Path) -> None:
    run("scaling", tmp_path)
