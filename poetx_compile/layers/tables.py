"""Tables of layers as text: equal layers in one row, and no line wider than a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Container, Iterable, Sequence

WIDTH = 80
_LEAST = 24
"""Columns that the last one is left with; the names are shortened for it."""

_NUMBER = re.compile(r"(?<![^.])(\d+)(?=\.|$)")
"""A number that is a whole segment of a module's name."""


def format_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Container[int] = ()
) -> str:
    """Columns with a rule under the header; no trailing blanks, plain ASCII.

    Left-aligned, but for those whose numbers are in `right`.
    """
    table = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    table.insert(1, ["-" * width for width in widths])

    def aligned(column: int, cell: str) -> str:
        return cell.rjust(widths[column]) if column in right else cell.ljust(widths[column])

    return "\n".join("  ".join(map(aligned, range(len(row)), row)).rstrip() for row in table)


def wrapped_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns within `WIDTH`: names are shortened in the middle, the last column is wrapped."""
    table = [tuple(header), *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header) - 1)]
    widths[0] = min(widths[0], WIDTH - _LEAST - sum(width + 2 for width in widths[1:]) - 2)
    before = sum(width + 2 for width in widths)
    lines = []
    for name, *cells, last in table:
        start = [_shortened(name, widths[0]), *cells]
        front = "".join(f"{cell:<{width}}  " for cell, width in zip(start, widths, strict=True))
        for part in textwrap.wrap(last, max(WIDTH - before, _LEAST)) or [""]:
            lines.append((front + part).rstrip())
            front = " " * before
    return "\n".join(lines)


def wrapped_lines(text: str) -> str:
    """Lines within `WIDTH`."""
    return "\n".join(textwrap.fill(line, WIDTH) for line in text.splitlines())


def html_table(summary: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same for a notebook, with the lines of `summary` above it."""
    from html import escape  # not loaded by torch

    lines = "<br>".join(map(escape, summary.splitlines()))
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<p>{lines}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def folded_rows(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Rows that differ in numbers within their names alone become one, in the first's place."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        alike.setdefault((_NUMBER.sub("#", name), *rest), []).append(name)
    return [(", ".join(compact(names)), *rest) for (_, *rest), names in alike.items()]


def compact(names: Iterable[str]) -> list[str]:
    """Names with the numbers of equal ones joined: ``layers.0-3.mlp.up``, ``layers.7.mlp.up``."""
    split = dict.fromkeys(tuple(_NUMBER.split(name)) for name in names)
    slots = max((len(parts) // 2 for parts in split), default=0)
    for slot in range(slots):
        at = 2 * slot + 1
        joined: dict[tuple[str, ...], list[str]] = {}
        for parts in split:
            rest = (*parts[:at], "", *parts[at + 1 :]) if at < len(parts) else parts
            joined.setdefault(rest, []).append(parts[at] if at < len(parts) else "")
        split = dict.fromkeys(
            (*rest[:at], _ranges(map(int, numbers)), *rest[at + 1 :]) if at < len(rest) else rest
            for rest, numbers in joined.items()
        )
    return ["".join(parts) for parts in split]


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _shortened(name: str, width: int) -> str:
    """The start and the end of a name that is too long."""
    if len(name) <= width:
        return name
    start = (width - 3) // 3
    return f"{name[:start]}...{name[len(name) - (width - 3 - start) :]}"


def without_conditions(formulation: str) -> str:
    """The choice alone: ``folded in (fold where …), …`` → ``folded in, …``."""
    return re.sub(r" \([^)]*\)", "", formulation)
