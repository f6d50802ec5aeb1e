"""The documentation runs: code, printed output, commands, links, the API page, every error.

In README.md and docs/**/*.md:

- each ```` ```python ```` block runs, top to bottom, in one namespace a page, on the CPU and
  without Inductor; ```` ```python no-run ```` is only compiled;
- a ```` ```text output ```` block is what the Python block before it prints (regenerate it with
  ``EXPECTTEST_ACCEPT=1``);
- code in a comment ``<!-- setup … -->`` runs as well, unseen: what an excerpt takes for granted;
- the files and modules that ```` ```bash ```` blocks name exist, and our own command line takes the
  arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import itertools
import os
import re
import runpy
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from poetx_compile import POETXAdamW, backend, errors
from poetx_compile.command_line import command_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
OPTIONAL = ("accelerate", "safetensors", "transformers")
OURS = ("benchmarks", "docs", "examples", "passes", "poetx_compile", "tests")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block, or a setup comment: its info string, its text, and where it begins."""

    info: str
    text: str
    line: int
    start: int
    """Offset of the text in the page."""

    @property
    def runs(self) -> bool:
        return self.info in ("python", "setup")


_FENCE = re.compile(
    r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```[ ]*$|^<!-- setup\n(?P<setup>.*?)^-->[ ]*$",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page, in order."""
    for found in _FENCE.finditer(text):
        group = "setup" if found["setup"] is not None else "text"
        info = "setup" if group == "setup" else found["info"].strip()
        start = found.start(group)
        yield Block(info, found[group], text.count("\n", 0, start) + 1, start)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", PAGES, ids=name)


@pages
def test_code_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text(encoding="utf-8")
    found = list(blocks(text))
    if not any(block.runs for block in found):
        return
    monkeypatch.chdir(tmp_path)  # what a page writes is gone with the test
    monkeypatch.setattr(
        backend, "_compile", lambda graph, inputs, *_: backend._aot_eager(graph, inputs)
    )
    module = types.ModuleType(f"docs_{page.stem}")  # Dynamo looks classes up in their module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed = ""
    stale: list[tuple[Block, str]] = []
    for block in found:
        if block.runs:
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            try:
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    exec(code, module.__dict__)
            except ModuleNotFoundError as error:
                if str(error.name).partition(".")[0] not in OPTIONAL:
                    raise
                pytest.skip(f"{name(page)} needs {error.name}")
            printed = output.getvalue()
        elif block.info == "text output":
            actual = printed.rstrip() + "\n"
            if os.environ.get("EXPECTTEST_ACCEPT"):
                stale.append((block, actual))
            else:
                where = f"{name(page)}:{block.line}"
                assert actual == block.text, f"{where}: what is printed differs from the page"
    for block, actual in reversed(stale):
        text = text[: block.start] + actual + text[block.start + len(block.text) :]
    if stale:
        page.write_text(text, encoding="utf-8")


@pages
def test_code_that_cannot_run_here_compiles(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.info == "python no-run":
            compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        known = ("", "python", "python no-run", "setup", "text", "text output", "bash", "json")
        assert block.info in known, f"{name(page)}:{block.line}: {block.info!r}"


@pages
def test_commands_name_what_exists(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.info != "bash":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for word in words:
                folder, slash, _ = word.partition("/")
                if slash and folder in OURS:
                    assert (ROOT / word).exists(), f"{name(page)}: there is no {word}"
            for flag, module in itertools.pairwise(words):
                if flag == "-m" and module.partition(".")[0] in OURS:
                    assert importlib.util.find_spec(module), f"{name(page)}: no module {module}"
            if "poetx_compile" in words:
                command_parser().parse_args(words[words.index("poetx_compile") + 1 :])


_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    prose = _FENCE.sub("", text)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.replace("`", "")).strip().lower() for title in titles]
    return {title.replace(" ", "-") for title in plain}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in (a or b for a, b in _LINK.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        if anchor:
            known = anchors(target.read_text(encoding="utf-8"))
            assert anchor in known, f"{name(page)} links to {link}; there are {sorted(known)}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {a for a, _ in _LINK.findall(index)}
    for page in ROOT.glob("docs/**/*.md"):
        path = page.relative_to(ROOT / "docs").as_posix()
        assert path == "README.md" or path in linked, f"docs/README.md does not link to {path}"


def test_every_error_has_a_remedy() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for error, _ in inspect.getmembers(errors, inspect.isclass):
        if issubclass(getattr(errors, error), errors.POETXError):
            assert f"`{error}`" in text, f"docs/troubleshooting.md says nothing of {error}"


def test_every_pass_has_a_page() -> None:
    from poetx_compile.passes import NAMES

    assert {page.stem for page in ROOT.glob("docs/passes/*.md")} == set(NAMES)


def test_the_api_page_is_that_of_the_docstrings_whatever_ran_before() -> None:
    POETXAdamW(nn.Linear(4, 4))  # gets its class a `step` of torch's
    made = runpy.run_path(str(ROOT / "docs" / "build_api.py"))["page"]()
    page = ROOT / "docs" / "api.md"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        page.write_text(made, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == made, "regenerate it: python docs/build_api.py"
