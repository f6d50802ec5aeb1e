"""Private names of torch: `poetx_compile/_torch.py` has all of them, and this torch has them."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from poetx_compile._torch import ATTRIBUTES, LATE

ROOT = Path(__file__).resolve().parents[2]
REGISTER = ROOT / "poetx_compile" / "_torch.py"
SOURCES = sorted([*(ROOT / "poetx_compile").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
SOURCES.remove(REGISTER)

DOCUMENTED = re.compile(
    r"torch\."
    r"(_check|_foreach_\w+"
    r"|_(dynamo|inductor|functorch)(\.config\b.*)?"  # settings
    r"|_dynamo\.(list|lookup|register)_backends?"  # of "Custom Backends"
    r"|ops\..*)"  # names of operators
)
"""Names of torch that only look private."""

OTHERS = {
    "_replace": "named tuples",
    "_from_config": "transformers",
    "_init_self_parameters": "torchtitan",
    "_param_init": "torchtitan",
}
"""Private attributes of other things than torch."""

INSTANCES: dict[str, Any] = {
    "torch.nn.Module": nn.Linear(1, 1),
    "torch._ops.OpOverload": torch.ops.aten.add.Tensor,
}
"""Where classes do not show the attributes."""


def imports(path: Path, package: str) -> Iterator[tuple[str, str, str]]:
    """(module, name, name here) of what a file imports from a package, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{package}."):
            yield from ((str(node.module), a.name, a.asname or a.name) for a in node.names)


EARLY = list(imports(REGISTER, "torch"))


@pytest.mark.parametrize(
    "path", [*(f"{module}.{name}" for module, name, _ in EARLY), *(f"{LATE[n]}.{n}" for n in LATE)]
)
def test_this_torch_has_the_name(path: str) -> None:
    assert pkgutil.resolve_name(path) is not None


@pytest.mark.parametrize(
    ("owner", "name"), [(o, name) for o, names in ATTRIBUTES.items() for name in names.split()]
)
def test_this_torch_has_the_attribute(owner: str, name: str) -> None:
    found: list[Any] = [INSTANCES.get(owner) or pkgutil.resolve_name(owner)]
    if owner == "torch.fx.Node":  # Dynamo gives it to placeholders

        def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
            found[:] = gm.graph.find_nodes(op="placeholder")
            return gm.forward

        torch.compile(torch.sin, backend=backend)(torch.ones(1))
    assert hasattr(found[0], name)


def test_the_register_has_what_is_imported_from_it_and_no_more() -> None:
    used = {name for p in SOURCES for _, name, _ in imports(p, "poetx_compile._torch")}
    assert used == {here for *_, here in EARLY} | set(LATE)


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an expression of names; empty for any other."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}" if dotted(node.value) else ""
    return node.id if isinstance(node, ast.Name) else ""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(source: str) -> Iterator[str]:
    """Private names of torch, imported or written out, that are not documented."""
    for node in ast.walk(ast.parse(source)):
        names = [dotted(node)]
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            head, *parts = name.split(".")
            private = head == "torch" and any(map(is_private, parts))
            if (private and not DOCUMENTED.fullmatch(name)) or head == "functorch":
                yield name


def test_no_other_module_names_a_private_one() -> None:
    found = {str(p.relative_to(ROOT)): list(private_names(p.read_text())) for p in SOURCES}
    named = {path: names for path, names in found.items() if names}
    assert named == {}, "import it from poetx_compile._torch"


def attributes(source: str) -> tuple[set[str], set[str]]:
    """Private attributes: of other objects than ``self``, and those that a module defines."""
    used, defined = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = dotted(node.value)
            if owner == "self" and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif owner not in ("self", "cls") and not f"{owner}.".startswith("torch."):
                used.add(node.attr)
    return used, defined


def test_private_attributes_of_other_objects_are_ours_or_registered() -> None:
    used, defined = attributes("\n".join(path.read_text() for path in SOURCES))
    registered = {name for names in ATTRIBUTES.values() for name in names.split()}
    assert used - defined - set(OTHERS) == set(filter(is_private, registered)) - defined


def test_private_names_are_found() -> None:
    for source in (
        "from torch._inductor.compile_fx import compile_fx",
        "from torch import _guards",
        "def f():\n    import torch._dynamo.source",
        "from functorch.compile import make_boxed_func",
        "torch._C._nn.linear(x)",
        "torch.utils._pytree.tree_leaves(x)",
    ):
        assert list(private_names(source))
    assert not list(private_names("torch._check(x); torch._dynamo.config.recompile_limit"))
    assert attributes("self._own = x._version + self._other") == ({"_version"}, {"_own"})
