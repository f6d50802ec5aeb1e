"""The one error of these scripts: told to the user in one line, without a traceback."""

from __future__ import annotations


class RunError(Exception):
    """The run cannot start or go on; the message says why and what to do."""
