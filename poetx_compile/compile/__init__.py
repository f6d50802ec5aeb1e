"""From Dynamo's graph through the passes to compiled code."""

from __future__ import annotations

# Looks at optimisers' steps as soon as anything can have been given to the backend.
from poetx_compile.compile import dense as _dense  # noqa: F401
