"""The identity of this package for Inductor's caches: any change of a source changes it.

Inductor's FX cache and AOTAutograd's cache key on the graph *before* our pass and on the pass's
``uuid()``. An op's body, a kernel or a graph pass may change without the graph changing, so the
uuid has to cover the text of all of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from poetx_compile import passes

_PACKAGE = Path(__file__).resolve().parents[2]


def _roots() -> list[Path]:
    """The folders whose sources decide what is compiled: the package, and the graph passes."""
    # In an editable install the passes live outside of the package's folder.
    return [_PACKAGE, *(Path(p).resolve() for p in passes.__path__)]


def source_digest(roots: Iterable[Path]) -> str:
    """SHA-256 over the relative names and the contents of all ``.py`` files below `roots`."""
    digest = hashlib.sha256()
    for number, root in enumerate(roots):
        for path in sorted(root.rglob("*.py")):
            name = f"{number}/{path.relative_to(root).as_posix()}"
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


@functools.cache
def package_digest() -> str:
    """Digest of the sources of this process, read once: what was imported does not change."""
    return source_digest(_roots())


def cache_identity(kind: str, **arguments: Any) -> str:
    """A uuid over the sources, the versions and the JSON-able `arguments` of a custom pass."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("poetx-compile")
    except PackageNotFoundError:  # run from a source tree that nobody installed
        installed = "source"
    parts = [kind, package_digest(), installed, torch.__version__, arguments]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
