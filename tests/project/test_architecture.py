"""Imports run downhill between the packages, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LEVELS = (
    ("errors", "version", "_torch"),
    ("config", "ops"),
    ("distributed", "passes"),
    ("layers",),
    ("optim", "state"),
    ("adoption",),
    ("compile",),
    ("inspect", "integrations"),
    ("__init__", "__main__"),
)
"""Lowest first. A package imports itself and what is below its level."""

LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
SOURCES = sorted([*(ROOT / "poetx_compile").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "passes" else parts[1]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, package) of each import of this project, lazy ones included, type checks left out."""
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top == "poetx_compile":
                yield node.lineno, rest[0] if rest else "__init__"


def uphill(package: str, source: str) -> list[str]:
    """The imports of a module in `package` that do not run downhill."""
    found = []
    for line, other in imports(source):
        level = LEVEL.get(other, LEVEL["__init__"])  # a name that `__init__` gives
        if other != package and level >= LEVEL[package]:
            found.append(f"line {line}: {package} imports {other}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downhill(path: Path) -> None:
    assert uphill(package_of(path), path.read_text()) == []


def test_every_module_is_in_a_package_with_a_level() -> None:
    assert {package_of(path) for path in SOURCES} <= set(LEVEL)


def test_uphill_imports_are_found() -> None:
    lazy = "def f():\n    from poetx_compile.compile import backend"
    for source in (lazy, "import poetx_compile", "from poetx_compile import prepare"):
        assert uphill("layers", source)
    assert not uphill("layers", "from poetx_compile import ops\nimport torch")


IMPORT = r"\b(?:from|import) {}(?:\.\w+)*(?:\.| import ){}"


def importers(folder: str, package: str, module: str) -> list[str]:
    """The files that import such a module, in code that a subprocess is given as well."""
    pattern = re.compile(IMPORT.format(package, module))
    paths = (ROOT / folder).rglob("*.py")
    return sorted(path.name for path in paths if pattern.search(path.read_text()))


def test_no_test_module_is_imported() -> None:
    """What tests share is in `tests/helpers`."""
    assert importers("tests", "tests", r"test_\w+") == []
    assert "kill.py" in importers("tests", "tests", r"models\b")


def test_the_benchmarks_import_no_tests() -> None:
    assert importers("benchmarks", "tests", r"\w+") == []
    assert "gate.py" in importers("benchmarks", "benchmarks", r"\w+")
