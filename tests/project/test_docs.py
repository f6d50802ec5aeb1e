"""The documentation runs: code, printed output, commands, links, the API page, every message.

In README.md and docs/**/*.md:

- each ```` ```python ```` block runs, top to bottom, in one namespace a page, on the CPU and
  with no compiler behind the passes; ```` ```python no-run ```` is only compiled;
- a ```` ```text output ```` block is what the Python block before it prints (regenerate it with
  ``EXPECTTEST_ACCEPT=1``);
- code in a comment ``<!-- setup … -->`` runs as well, unseen: what an excerpt takes for granted;
- the files and modules that ```` ```bash ```` blocks name exist, and our own command line takes the
  arguments.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import itertools
import os
import re
import runpy
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from poetx_compile import POETXAdamW, errors
from poetx_compile.compile import backend
from poetx_compile.inspect.command_line import command_parser
from pretraining.options import Options, parse
from tests.helpers.documents import FENCE, PAGES, ROOT, SOURCES, Block, blocks

OPTIONAL = ("accelerate", "safetensors", "transformers")
OURS = ("benchmarks", "docs", "examples", "passes", "poetx_compile", "tests")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", PAGES, ids=name)


@pages
def test_code_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text(encoding="utf-8")
    found = list(blocks(text))
    if not any(block.runs for block in found):
        return
    monkeypatch.chdir(tmp_path)  # what a page writes is gone with the test
    monkeypatch.setattr(backend, "_compile", lambda graph, *_: graph)
    module = types.ModuleType(f"docs_{page.stem}")  # Dynamo looks classes up in their module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed = ""
    stale: list[tuple[Block, str]] = []
    for block in found:
        if block.runs:
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            try:
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    exec(code, module.__dict__)
            except ModuleNotFoundError as error:
                if str(error.name).partition(".")[0] not in OPTIONAL:
                    raise
                pytest.skip(f"{name(page)} needs {error.name}")
            printed = output.getvalue()
        elif block.info == "text output":
            actual = printed.rstrip() + "\n"
            if os.environ.get("EXPECTTEST_ACCEPT"):
                stale.append((block, actual))
            else:
                where = f"{name(page)}:{block.line}"
                assert actual == block.text, f"{where}: what is printed differs from the page"
    for block, actual in reversed(stale):
        text = text[: block.start] + actual + text[block.start + len(block.text) :]
    if stale:
        page.write_text(text, encoding="utf-8")


@pages
def test_code_that_cannot_run_here_compiles(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.info == "python no-run":
            compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        known = ("", "python", "python no-run", "setup", "text", "text output", "bash", "json")
        assert block.info in known, f"{name(page)}:{block.line}: {block.info!r}"


@pages
def test_commands_name_what_exists(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.info != "bash":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for word in words:
                folder, slash, _ = word.partition("/")
                if slash and folder in OURS:
                    assert (ROOT / word).exists(), f"{name(page)}: there is no {word}"
            for flag, module in itertools.pairwise(words):
                if flag == "-m" and module.partition(".")[0] in OURS:
                    assert importlib.util.find_spec(module), f"{name(page)}: no module {module}"
            if "examples/pretrain.py" in words:
                Options(**parse(words[words.index("examples/pretrain.py") + 1 :]))
            if words[:1] == ["poetx"]:
                command_parser().parse_args(words[1:])


_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    prose = FENCE.sub("", text)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.replace("`", "")).strip().lower() for title in titles]
    return {title.replace(" ", "-") for title in plain}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in (a or b for a, b in _LINK.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        if anchor:
            known = anchors(target.read_text(encoding="utf-8"))
            assert anchor in known, f"{name(page)} links to {link}; there are {sorted(known)}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {a for a, _ in _LINK.findall(index)}
    for page in ROOT.glob("docs/**/*.md"):
        path = page.relative_to(ROOT / "docs").as_posix()
        assert path == "README.md" or path in linked, f"docs/README.md does not link to {path}"


def test_every_error_has_a_remedy() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for error, _ in inspect.getmembers(errors, inspect.isclass):
        if issubclass(getattr(errors, error), errors.POETXError):
            assert f"`{error}`" in text, f"docs/troubleshooting.md says nothing of {error}"


def _template(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """A message with … for whatever is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[.\d]*[sdg]|{\w+}", "…", text)
        case ast.JoinedStr(values=values):
            return "".join(_template(value, constants) for value in values)
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name) if name in constants:
            return _template(constants[name], constants)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _template(left, constants) + _template(right, constants)
        case ast.Call(func=ast.Attribute(value=ast.Name() as text, attr="format")):
            return _template(text, constants)
    return "…"


def _messages(kind: str) -> Iterator[tuple[str, str]]:
    """(where, template) of every message given to a call whose name ends in `kind`."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    constants = {
        target.id: statement.value
        for tree in trees.values()
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id.strip("_").isupper()
    }
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith(kind):
                if ast.unparse(node.func) == "AttributeError":  # for Python, and no user
                    continue
                text = " ".join(_template(node.args[0], constants).split())
                if re.search(r"\w+ \w+", text):  # not one that is handed on
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def _entries(page: str) -> list[re.Pattern[str]]:
    """What stands in code in the first column of a page's tables, … for anything."""
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    literal = [span for span in spans if len(span.replace("…", "").strip()) >= 6]
    return [re.compile(".*".join(map(re.escape, span.split("…")))) for span in literal]


_VERBS = (
    "add|ask|assign|attach|average|build|call|choose|clone|declare|drop|evaluate|export|gather|give|"
    "install|leave|let|load|look|lower|make|materialise|merge|merge_and_unload|name|prepare|read|"
    "register|remove|report|save|scale|set|start|step|use|write"
)
_REMEDY = re.compile(
    rf"(?:^|[:.;,] |\bor |\bfirst |\bplease )(?:(?:either|poetx_compile\.)\s?)?(?:{_VERBS})\b"
    r"|; (?:known|there are): |is not allowed: a |has to call|: …$",
    re.IGNORECASE,
)
"""An imperative at the start of a clause, the list to choose from, or the text of another error."""


@pytest.mark.parametrize("kind", ["Error", "log.warning", "problems.append"])
def test_every_message_says_what_to_do(kind: str) -> None:
    messages = list(_messages(kind))
    assert messages
    unsaid = [f"{at}: {text}" for at, text in messages if not _REMEDY.search(text)]
    assert not unsaid, "\n".join(unsaid)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("… is no model: give the nn.Module itself", True),
        ("… is broken. Load the last checkpoint", True),
        ("rule = … is not allowed: use …", True),
        ("unknown option(s) …; known: …", True),
        ("no part of the step could be traced", False),
        ("the tensors of … are sharded", False),
        ("the graph that is called was made for another use", False),
    ],
)
def test_remedies_are_found(message: str, found: bool) -> None:
    assert bool(_REMEDY.search(message)) == found


def _reasons(file: str) -> Iterator[tuple[str, str]]:
    """(where, template) of every reason for which the functions of a file refuse something."""
    path = ROOT / file
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef) and "refusal" in function.name:
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and isinstance(
                    node.value, ast.Constant | ast.JoinedStr
                ):
                    text = _template(node.value, {})
                    if text != "…":  # None: no reason
                        yield f"{path.name}:{node.lineno}", text


@pytest.mark.parametrize("where", ["passes", "prepare"])
def test_every_refusal_is_explained(where: str) -> None:
    known = list(_reasons("poetx_compile/layers/eligibility.py"))
    if where == "passes":
        files = ("passes/sides.py", "passes/formulation.py")
        known = [*_messages("Refusal"), *(reason for file in files for reason in _reasons(file))]
    entries = _entries("docs/how-to/debug-a-refusal.md")
    assert known
    missing = [f"{at}: {text}" for at, text in known if not any(e.search(text) for e in entries)]
    assert not missing, "docs/how-to/debug-a-refusal.md has no row for\n" + "\n".join(missing)


def test_every_pass_has_a_page() -> None:
    from poetx_compile.passes import PASSES

    assert {page.stem for page in ROOT.glob("docs/passes/*.md")} == {p.name for p in PASSES}


def test_the_api_page_is_that_of_the_docstrings_whatever_ran_before() -> None:
    pytest.importorskip("transformers")  # for_trainer is on the page
    POETXAdamW(nn.Linear(4, 4))  # gets its class a `step` of torch's
    made = runpy.run_path(str(ROOT / "docs" / "build_api.py"))["page"]()
    page = ROOT / "docs" / "api.md"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        page.write_text(made, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == made, "regenerate it: python docs/build_api.py"
