"""Pages of documentation whose tables and figures are made from rows.

Each is made by the command in the comment before it:
``<!-- quality table tune --best -->`` is followed by what ``python -m benchmarks.quality table tune
--best`` prints, up to ``<!-- end -->``; `plot` by the picture that it draws.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

NONE = "*No rows yet.*"

_PART = re.compile(
    r"<!-- (?P<name>\w+) (?P<command>[^>]*) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL
)

Command = Callable[[Sequence[str]], int]


@dataclasses.dataclass(frozen=True)
class Page:
    """A page whose parts the commands of one benchmark fill.

    Args:
        name: of the benchmark: its parts begin with it, others are left alone.
        path: of the page.
        command: the benchmark's `main`.
        shown: what the picture of the words ``plot …`` shows; ``None`` where it has no rows.
    """

    name: str
    path: Path
    command: Command
    shown: Callable[[Sequence[str]], str | None]

    def write(self) -> int:
        """Run the commands of the page and write what they print into it."""
        text = self.path.read_text(encoding="utf-8")
        self.path.write_text(self.filled(text, draw=True), encoding="utf-8")
        print(self.path)
        return 0

    def commands(self, text: str) -> list[list[str]]:
        """The words of each command on a page."""
        found = _PART.finditer(text)
        return [shlex.split(f["command"]) for f in found if f["name"] == self.name]

    def filled(self, text: str, draw: bool = False) -> str:
        """The text of a page with its parts made again; pictures are drawn where `draw` says so."""

        def part(found: re.Match[str]) -> str:
            if found["name"] != self.name:
                return found[0]
            words = shlex.split(found["command"])
            body = self._picture(words, draw) if words[0] == "plot" else self._printed(words)
            return f"<!-- {self.name} {found['command']} -->\n{body}\n<!-- end -->"

        return _PART.sub(part, text)

    def _printed(self, words: Sequence[str]) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            self.command(words)
        return output.getvalue().rstrip()

    def _picture(self, words: Sequence[str], draw: bool) -> str:
        """The picture of ``plot … --output FILE``, relative to the page."""
        if (shown := self.shown(words)) is None:
            return NONE
        output = ROOT / words[words.index("--output") + 1]
        if draw:
            self._printed([*words, "--output", str(output)])
        relative = os.path.relpath(output, self.path.parent)
        return f"![{shown}]({relative})"
