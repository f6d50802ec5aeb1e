"""What CI may leave out: nothing that a package would bring."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import may_be_skipped, pytest_runtest_makereport

ROOT = Path(__file__).resolve().parents[2]


def _skipped(reason: str) -> pytest.TestReport:
    place = ("tests/test_some.py", 1, f"Skipped: {reason}")
    return pytest.TestReport("test", ("", 1, ""), {}, "skipped", place, "call")


def _judged(report: pytest.TestReport) -> pytest.TestReport:
    hook = pytest_runtest_makereport(None)  # type: ignore[arg-type]
    next(hook)
    with pytest.raises(StopIteration) as end:
        hook.send(report)
    return end.value.value


@pytest.mark.parametrize(
    "reason",
    ["ruff is not installed in this environment", "could not import 'transformers'", "needs gloo"],
)
def test_a_skip_for_want_of_a_package_fails_in_ci_alone(reason, monkeypatch):
    monkeypatch.setenv("CI", "1")
    report = _judged(_skipped(reason))
    assert report.failed
    assert reason in report.longreprtext
    monkeypatch.delenv("CI")
    assert _judged(_skipped(reason)).skipped


@pytest.mark.parametrize(
    "reason",
    ["needs a CUDA GPU", "no headless browser is installed", "pins other versions: axolotl"],
)
def test_a_machine_without_a_gpu_or_a_browser_may_skip(reason, monkeypatch):
    monkeypatch.setenv("CI", "1")
    assert may_be_skipped(_skipped(reason))
    assert _judged(_skipped(reason)).skipped


def test_the_runner_of_ci_says_that_it_is_one():
    assert "\nexport CI=1\n" in (ROOT / ".ci/run").read_text()
