"""docs/architecture.md is true: imports run downhill, and no state of the process is missing."""

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
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
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


def test_imports_run_downhill() -> None:
    found = {str(p.relative_to(ROOT)): uphill(package_of(p), p.read_text()) for p in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


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


def test_the_drawing_is_of_these_levels() -> None:
    drawing = PAGE.partition("```text\n")[2].partition("```")[0]
    names = [tuple(re.findall(r"\w+", line)) for line in drawing.splitlines()]
    assert [line for line in names[::-1] if line] == list(LEVELS)


CONTAINERS = {"dict", "list", "set", "defaultdict", "deque", "cache"}
CONSTANTS = {"TypeVar", "Symbol", "Library", "Tiles"}
WRITES = {"add", "append", "clear", "discard", "extend", "insert", "pop", "setdefault", "update"}


def state(source: str) -> set[str]:
    """The names of a module that hold what its functions remember.

    Objects other than known constants, containers of variable content, and what a function
    declares ``global``.
    """
    tree = ast.parse(source)
    written = {name for node in ast.walk(tree) for name in _written(node)}
    found = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for statement in tree.body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        made = ""
        if isinstance(statement.value, ast.Call):
            made = ast.unparse(statement.value.func).rpartition(".")[2]
        remembers = made in CONTAINERS or (made[:1].isupper() and made not in CONSTANTS)
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        found |= names if remembers else names & written
    return found


def _written(node: ast.AST) -> Iterator[str]:
    """The container that a node writes to: ``name[...] = …``, ``name.append(…)``."""
    match node:
        case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
            yield name
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attr)) if attr in WRITES:
            yield name


def test_the_page_lists_all_state_of_the_process() -> None:
    section = PAGE.partition("## Process-wide state")[2]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    found = {
        ".".join([*path.relative_to(ROOT).with_suffix("").parts, name]).removeprefix(
            "poetx_compile."
        )
        for path in SOURCES
        for name in state(path.read_text(encoding="utf-8"))
    }
    assert found == listed


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("_seen = WeakSet()", {"_seen"}),
        ("registry = layers.Registry()", {"registry"}),
        ("_kinds = {}\ndef f(a):\n    _kinds[a] = 1", {"_kinds"}),
        ("_told: list[str] = []\ndef f(a):\n    _told.append(a)", {"_told"}),
        ("_count = 0\ndef f():\n    global _count", {"_count"}),
        ("NAMES = {'a': 1}\ndef f(a):\n    return NAMES[a]", set()),
        ("T = TypeVar('T')\nPARTS = frozenset(['a'])", set()),
    ],
)
def test_state_is_found(source: str, names: set[str]) -> None:
    assert state(source) == names
