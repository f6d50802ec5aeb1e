"""Functions of Inductor that are replaced by faster ones, where this version of torch has them."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

log = logging.getLogger("poetx_compile")


def replaced(
    find_owner: Callable[[], Any], name: str, faster: Callable[[Any], Any]
) -> contextlib.AbstractContextManager[Any]:
    """Inside, `faster` of a function stands in its place; without it where there is none."""
    try:
        owner = find_owner()
        return mock.patch.object(owner, name, faster(getattr(owner, name)))
    except (ImportError, AttributeError):
        goes_on_without(name)
        return contextlib.nullcontext()


@functools.cache
def goes_on_without(name: str) -> None:
    """To be called where a shortcut fails: says so, once a process."""
    log.warning(
        "the faster way around Inductor's %s does not fit this version of torch (%r): compilation "
        "goes on without, and takes longer. Report this with your torch and triton versions",
        name,
        sys.exception(),
    )
