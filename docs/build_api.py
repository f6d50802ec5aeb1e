"""Write docs/api.md from the docstrings: ``python docs/build_api.py``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import poetx_compile as poetx
from poetx_compile import passes
from poetx_compile.compile import folds, options
from poetx_compile.inspect import diagnostics, estimate, explain
from poetx_compile.integrations import huggingface
from poetx_compile.layers import report
from poetx_compile.optim import MergeSchedule

RETURNED = [
    report.PrepareReport,
    report.LayerRow,
    MergeSchedule,
    explain.Explanation,
    explain.ExplainRow,
    estimate.Estimate,
    estimate.MemoryRow,
]
"""Users make none of these: their signatures are left out."""

SECTIONS: list[tuple[str, list[Any]]] = [
    ("Say what is trained", [poetx.POETXConfig, poetx.prepare, poetx.merge_and_unload]),
    ("Compile", [poetx.poetx_backend, options.BackendOptions, passes.Machine, folds.forget]),
    ("Optimise", [poetx.POETXAdamW, poetx.POETXMuon]),
    (
        "Optimise with another optimiser",
        [poetx.param_groups, poetx.attach, poetx.adopt, poetx.clip_grad_norm_],
    ),
    (
        "Save, resume, export",
        [
            poetx.save_checkpoint,
            poetx.load_checkpoint,
            poetx.plain_state_dict,
            poetx.save_pretrained,
        ],
    ),
    ("Several GPUs", [poetx.fully_shard_rotations]),
    (
        "Hugging Face",
        [huggingface.for_trainer, huggingface.OptimizerFactory, huggingface.POETXCallback],
    ),
    (
        "Look",
        [
            poetx.explain,
            poetx.estimate,
            poetx.diagnostics,
            diagnostics.effective_weight,
            diagnostics.spectrum,
            diagnostics.spectrum_drift,
        ],
    ),
    ("What is returned", RETURNED),
]

INTERNAL = (
    *(
        "block_in",
        "block_out",
        "smallest_block",
        "order",
        "may_fold",
        "initialises",
        "gained_sides",
    ),
    *("parse", "cuda_graphs", "identity"),
    *("equivalences", "extend"),
    *("on_optimizer_step", "on_log"),
)
"""Members that other parts of the package use, and no user."""

INTRODUCTION = """# API

Everything public, from its docstrings. `poetx` is `poetx_compile`; what has another home says so.
What is raised is in the docstrings, and in [troubleshooting](troubleshooting.md#by-class) by class.
This page is written by `python docs/build_api.py`.
"""

_HEADING = re.compile(r"^(Args|Attributes|Parameters|Buffers|Returns|Raises|Yields):$")
_ENTRY = re.compile(r"^(?P<names>[\w*.`, ]+): (?P<text>.*)$", re.DOTALL)


def page() -> str:
    """The text of the page. Names that are exported but in no section come last."""
    listed = [value for _, values in SECTIONS for value in values]
    rest = [getattr(poetx, n) for n in poetx.__all__ if not inspect.ismodule(getattr(poetx, n))]
    rest = [value for value in rest if value not in listed]
    sections = [*SECTIONS, *([("More", rest)] if rest else [])]
    parts = [INTRODUCTION]
    for title, values in sections:
        parts.append(f"## {title}\n")
        parts += [_described(value).rstrip("\n") + "\n" for value in values]
    parts.append(f"## Ops\n\n{_markdown(inspect.cleandoc(poetx.ops.__doc__ or ''))}")
    return "\n".join(parts)


def _described(value: Any) -> str:
    doc = inspect.cleandoc(value.__doc__ or "")
    signature = "" if value in RETURNED else f"{_signature(value)}\n"
    text = f"### {value.__name__}\n\n{_home(value)}{signature}{_markdown(doc)}"
    if inspect.isclass(value):
        for name, kind in vars(value).items():
            member = kind.fget if isinstance(kind, property) else getattr(value, name)
            # An optimiser's class gets torch's `step` put into it when the first one is built.
            own = getattr(member, "__qualname__", None) == f"{value.__qualname__}.{name}"
            if own and name not in INTERNAL and not name.startswith("_"):
                signature = "" if isinstance(kind, property) else f"{_signature(member)}\n"
                body = _markdown(inspect.cleandoc(member.__doc__ or ""))
                text += f"\n#### {value.__name__}.{name}\n\n{signature}{body}"
    return text


def _home(value: Any) -> str:
    """Where to import it from, if not from the package itself."""
    return "" if hasattr(poetx, value.__name__) else f"In `{value.__module__}`.\n\n"


def _signature(value: Any) -> str:
    signature = inspect.signature(value)
    given = [p for p in signature.parameters.values() if p.name != "self"]
    parameters = [_parameter(p) for p in given]
    kinds = [p.kind for p in given]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returned = ""
    if not inspect.isclass(value) and signature.return_annotation is not inspect.Signature.empty:
        returned = f" -> {signature.return_annotation}"
    line = f"{value.__name__}({', '.join(parameters)}){returned}"
    if len(line) > 96:
        lines = "".join(f"    {parameter},\n" for parameter in parameters)
        line = f"{value.__name__}(\n{lines}){returned}"
    return f"```text\n{line}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    text = stars.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {parameter.annotation}"
    if parameter.default is not inspect.Parameter.empty:
        default = parameter.default
        text += f" = {default.__name__ if inspect.isclass(default) else repr(default)}"
    return text


def _markdown(doc: str) -> str:
    """A docstring of this project as Markdown: sections as lists, literal blocks as code."""
    lines: list[str] = []
    section = ""
    for paragraph in _paragraphs(doc):
        first, *others = paragraph
        heading = _HEADING.match(first)
        if heading and heading.group(1) == "Raises":
            continue  # messages say what to do, and troubleshooting has the classes
        if heading:
            section = heading.group(1)
            lines += [f"**{section}**", ""]
            if others:
                lines += [*_entries(others, section), ""]
        elif section and first.startswith("    "):
            lines += [*_entries(paragraph, section), ""]
        elif set(first) <= {"=", " "}:
            lines += [*_table(paragraph), ""]
        elif first.startswith(("    ", ">>> ")):
            lines += ["```text", *(line.removeprefix("    ") for line in paragraph), "```", ""]
        else:
            section = ""
            lines += [_inline(line) for line in paragraph] + [""]
    return "\n".join(lines)


def _paragraphs(doc: str) -> Iterator[list[str]]:
    """Runs of lines between blank ones; a table of ``===`` rules is one."""
    paragraph: list[str] = []
    for line in doc.splitlines():
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield paragraph
            paragraph = []
    if paragraph:
        yield paragraph


def _entries(lines: list[str], section: str) -> Iterator[str]:
    """``name: text`` with its continuation lines as a list item; a result as a paragraph."""
    if section in ("Returns", "Yields") and not lines[0].lstrip().startswith("- "):
        yield _inline(" ".join(line.strip() for line in lines))
        return
    items: list[str] = []
    for line in lines:
        text = line.removeprefix("    ").removeprefix("- ")
        if (text.startswith(" ") and items) or (items and not _ENTRY.match(text)):
            items[-1] += " " + text.strip()
        else:
            items.append(text.strip())
    for item in items:
        found = _ENTRY.match(item)
        if found:
            names = ", ".join(f"`{n.strip().strip('`')}`" for n in found["names"].split(","))
            yield f"- {names}: {_inline(found['text'])}"
        else:
            yield _inline(item)


def _table(lines: list[str]) -> Iterator[str]:
    """A simple table of reStructuredText as one of Markdown; without a header, an empty one."""
    rules = [line for line in lines if set(line) <= {"=", " "}]
    starts = [found.start() for found in re.finditer(r"=+", lines[0])]
    rows: list[list[str]] = [] if len(rules) == 3 else [[""] * len(starts)]
    for line in lines:
        cells = [line[i:j].strip() for i, j in zip(starts, [*starts[1:], None], strict=True)]
        if line in rules:
            continue
        if line.startswith(" "):  # goes on with the row before
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
        else:
            rows.append(cells)
    rows.insert(1, ["---"] * len(starts))
    yield from ("| " + " | ".join(map(_inline, row)) + " |" for row in rows)


def _inline(text: str) -> str:
    """``code`` and `name` of reStructuredText as code of Markdown."""
    return re.sub(r"``([^`]+)``", r"`\1`", text).replace("::", ":")


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(page(), encoding="utf-8")
