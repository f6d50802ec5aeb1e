"""Every advice can be followed: what messages and pages name exists, under that name.

In the string literals of the package that are no docstrings (errors, warnings, refusals), and in
the prose and the ``python no-run`` blocks of README and docs (what runs there, `test_docs` runs):

- dotted names of this package and of torch resolve as a user would write them, after the import
  (``poetx_compile.explain`` is the function, although a module has that name too);
- calls of these, and of what ``poetx_compile`` exports, take the keywords that are written.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import poetx_compile
from tests.helpers.documents import FENCE, PAGES, SOURCES, blocks

_NAME = r"(?<![\w.])(?:(?:poetx_compile|poetx|torch)(?:\.[A-Za-z_]\w*)+"
_EXPORTED = "|".join(name for name in poetx_compile.__all__ if name not in ("ops", "diagnostics"))
_ADVICE = re.compile(rf"{_NAME}|(?<![\w.])(?:{_EXPORTED})(?=\())(?:\((?P<arguments>[^()]*)\))?")


def advice(text: str) -> Iterator[tuple[str, list[str]]]:
    """(dotted name, keywords it is called with) of all that a text names."""
    text = " ".join(text.split())
    for found in re.finditer(r"\bfrom ((?:poetx_compile|torch)[\w.]*) import (\w+)", text):
        yield ":".join(found.groups()), []
    for found in _ADVICE.finditer(text):
        arguments = found["arguments"] or ""
        keywords = re.findall(r"(?:^|,)\s*(\w+)\s*=(?!=)", arguments)
        name = found[0].partition("(")[0]
        yield re.sub(r"^poetx\.", "poetx_compile.", name), keywords


HOSTS = ("axolotl", "torchtitan")
"""What helpers are for that is not installed here."""


def resolve(name: str) -> Any:
    """What a user gets by this name: attributes come first, then modules that can be imported."""
    if ":" in name:
        module, _, name = name.partition(":")
        return getattr(importlib.import_module(module), name)
    head, *parts = name.split(".")
    if not parts:
        return getattr(poetx_compile, name)
    found, path = importlib.import_module(head), head
    for part in parts:
        path += f".{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            if not inspect.ismodule(found):
                raise
            found = importlib.import_module(path)
    return found


def fault(name: str, keywords: list[str]) -> str | None:
    """Why an advice cannot be followed."""
    try:
        found = resolve(name)
    except (AttributeError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name in HOSTS:
            return None
        return f"{name} does not exist"
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    unknown = [keyword for keyword in keywords if keyword not in parameters]
    return f"{name} takes no {', '.join(unknown)}" if unknown else None


def literals(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of the string literals that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    inside = {part for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
    for node in ast.walk(tree):
        match node:
            case ast.JoinedStr(values=values):
                filled = (v.value if isinstance(v, ast.Constant) else "…" for v in values)
                yield f"{path.name}:{node.lineno}", "".join(map(str, filled))
            case ast.Constant(value=str(text)) if node not in documented | inside:
                yield f"{path.name}:{node.lineno}", text


def prose(page: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of what a page says and does not run."""
    text = page.read_text(encoding="utf-8")
    yield page.name, FENCE.sub("", text)
    for block in blocks(text):
        if block.info == "python no-run":
            yield f"{page.name}:{block.line}", block.text


@pytest.mark.parametrize("kind", ["messages", "pages"])
def test_every_advice_can_be_followed(kind: str) -> None:
    if kind == "messages":
        texts = [pair for path in SOURCES for pair in literals(path)]
    else:
        texts = [pair for page in PAGES if page.name != "api.md" for pair in prose(page)]
    advised = [(at, *found) for at, text in texts for found in advice(text)]
    assert len(advised) > 50
    faults = {at: why for at, name, keywords in advised if (why := fault(name, keywords))}
    assert not faults, "\n".join(f"{at}: {why}" for at, why in faults.items())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("call poetx_compile.nothing(model)", "poetx_compile.nothing does not exist"),
        ("poetx.diagnostics.spectrum", "poetx_compile.diagnostics.spectrum does not exist"),
        ("poetx_compile.explain.Explanation", "poetx_compile.explain.Explanation does not exist"),
        ("from torch import nothing", "torch:nothing does not exist"),
        ("torch.compile(model, dynamics=True)", "torch.compile takes no dynamics"),
        ("prepare(model, share=…)", "prepare takes no share"),
    ],
)
def test_an_advice_that_cannot_be_followed_is_found(text: str, why: str) -> None:
    assert [fault(*found) for found in advice(text)] == [why]
