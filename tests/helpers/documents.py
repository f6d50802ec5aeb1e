"""The sources and the pages of this project, and the code blocks of a page."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("poetx_compile/**/*.py"), *ROOT.glob("passes/*.py")])
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block, or a setup comment: its info string, its text, and where it begins."""

    info: str
    text: str
    line: int
    start: int
    """Offset of the text in the page."""

    @property
    def runs(self) -> bool:
        return self.info in ("python", "setup")


FENCE = re.compile(
    r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```[ ]*$|^<!-- setup\n(?P<setup>.*?)^-->[ ]*$",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page, in order."""
    for found in FENCE.finditer(text):
        group = "setup" if found["setup"] is not None else "text"
        info = "setup" if group == "setup" else found["info"].strip()
        start = found.start(group)
        yield Block(info, found[group], text.count("\n", 0, start) + 1, start)
