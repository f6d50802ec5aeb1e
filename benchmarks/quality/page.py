"""The tables and figures of docs/quality.md, each made by the command in the comment before it.

``<!-- quality table tune --best -->`` is followed by what ``python -m benchmarks.quality table tune
--best`` prints, up to ``<!-- end -->``; `plot` by the picture that it draws.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality import results
from benchmarks.quality.tables import NONE

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "quality.md"

_PART = re.compile(r"<!-- quality (?P<command>[^>]*) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)

Command = Callable[[Sequence[str]], int]


def write(command: Command) -> int:
    """Run the commands of the page and write what they print into it."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), command, draw=True), encoding="utf-8")
    print(PAGE)
    return 0


def filled(text: str, command: Command, draw: bool = False) -> str:
    """The text of the page with its parts made again; pictures are drawn where `draw` says so."""

    def part(found: re.Match[str]) -> str:
        words = shlex.split(found["command"])
        body = _picture(words, command, draw) if words[0] == "plot" else _printed(words, command)
        return f"<!-- quality {found['command']} -->\n{body}\n<!-- end -->"

    return _PART.sub(part, text)


def _printed(words: Sequence[str], command: Command) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        command(words)
    return output.getvalue().rstrip()


def _picture(words: Sequence[str], command: Command, draw: bool) -> str:
    """The picture of ``plot PLAN … --output FILE``, relative to the page."""
    plans = [word for word in words[1 : words.index("--kind")] if not word.startswith("-")]
    if not results.load_all(plans):
        return NONE
    output = ROOT / words[words.index("--output") + 1]
    if draw:
        _printed([*words, "--output", str(output)], command)
    return f"![{' '.join(plans)}: {words[words.index('--kind') + 1]}](figures/{output.name})"
