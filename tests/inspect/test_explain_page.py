"""The page of `explain`: well-formed, complete, safe, and at work in a browser if there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.inspect.explain import Explanation
from poetx_compile.inspect.page import page
from poetx_compile.layers.tables import compact
from tests.helpers.models import MLP, TinyLM

VOID = {"meta", "input", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """A page as elements: raises where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        (number,) = [i for i, s in enumerate(self.all("script")) if s.get("id") == "data"]
        return json.loads(self.texts["script"][number])


class Odd(nn.Module):
    """A layer of each fate: rewritten, refused, tied, frozen, not called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up = nn.Linear(16, 40)
        self.frozen = nn.Linear(40, 16).requires_grad_(False)
        self.unused = nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.frozen(self.up(x).relu()))


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    model = TinyLM(layers=4)
    poetx.prepare(model, poetx.POETXConfig(block_size=8))
    return poetx.explain(model, torch.zeros(2, 5, dtype=torch.int64))


def test_the_page_is_one_file_that_loads_nothing(explanation: Explanation, tmp_path: Path) -> None:
    path = explanation.save_html(tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    assert not any({"src", "href"} & set(attributes) for _, attributes in found.elements)
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "TinyLM" in found.texts["title"][0]


def test_every_layer_is_in_the_table_and_in_both_graphs(explanation: Explanation) -> None:
    found = Page(page(explanation))
    names = [row.name for row in explanation.rows]
    assert len(names) == 4 * 7 + 1
    assert [r["data-name"] for r in found.all("tr") if "data-name" in r] == names
    assert list(found.data["rows"]) == names
    (graph,) = found.data["graphs"]
    for side in ("before", "after"):
        modules = {".".join(box["module"]) for box in graph[side]}
        assert set(names) <= modules
        for box in graph[side]:
            assert all(read < len(graph[side]) for read in box["reads"])
    text = "".join(found.texts["pre"])
    assert "orthogonal_equivalence" in text
    assert "rotate_blocks" in text


def test_refusals_their_reasons_and_the_cost_model_are_shown() -> None:
    model = Odd().bfloat16()
    poetx.prepare(model, poetx.POETXConfig(block_size=8))
    found = page(poetx.explain(model, torch.zeros(2, 5, dtype=torch.int64)))
    for status in ("rewritten", "refused", "skipped", "not-seen"):
        assert f'<span class="status {status}">' in found
    for reason in (
        "the weight is read by multi_head_attention_forward, not by F.linear",
        "tied: the weight belongs to embedding as well",
        "frozen by the user (requires_grad is False)",
        "no graph of these inputs calls it",
    ):
        assert reason in found
    # up, [40, 16] at T = 10: rotating costs two launches and next to nothing for each token.
    assert "µs" in found
    assert '<td class="num">10</td>' in found
    assert "2 · max(2·T·b·d / flops, 2·T·d·e / bytes) + 2 · launch" in found


def test_what_passes_did_across_layers_is_told_once_and_alike_in_text_and_on_the_page() -> None:
    model = nn.Sequential(*(MLP() for _ in range(3)))
    poetx.prepare(model, poetx.POETXConfig(block_size=4, formulation="folded"))
    options = {"keep_folded": "step"}
    explanation = poetx.explain(model, torch.randn(3, 12), options=options)
    drawn, text = page(explanation), explanation.text(verbose=True)
    for name, times in (("cancel_permutations", 1), ("batch_cayley", 2), ("hoist_folds", 1)):
        assert drawn.count(f"<b>{name}</b>: ") == text.count(f"\n{name}: ") == times, text
    layers = "0-2.up, 0-2.down"
    assert f"makes them one (5 times) ({layers})" in text
    assert f"hoist_folds: 6 folded weight(s) kept between calls ({layers})" in text
    assert f"6 folded weight(s) kept between calls<br><code>{layers}</code>" in drawn


def test_hostile_names_stay_text() -> None:
    evil = "</script><img src=x onerror=alert(1)>&amp;\"'$title"

    class Hostile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(evil.replace(".", ""), nn.Linear(16, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return next(iter(self.children()))(x)

    Hostile.__name__ = "<b>Hostile</b>"
    text = page(poetx.explain(Hostile(), torch.zeros(2, 16), options={"block_size": 8}))
    found = Page(text)
    assert len(found.all("script")) == 2
    assert found.all("img") == []
    assert "POET-X: <b>Hostile</b>" in found.texts["title"][0]
    assert [r["data-name"] for r in found.all("tr") if "data-name" in r] == [evil]
    assert list(found.data["rows"]) == [evil]


def test_equal_names_are_written_once() -> None:
    names = [f"layers.{i}.mlp.up" for i in (0, 1, 2, 5)] + ["head", "layers.3", "a.1.b.2.c"]
    assert compact(names) == ["layers.0-2,5.mlp.up", "head", "layers.3", "a.1.b.2.c"]


def test_the_legend_has_all_that_the_drawing_shows(explanation: Explanation) -> None:
    text = page(explanation)
    for kind in ("product", "weight", "rotation", "activation", "other", "changed", "closed"):
        assert f'<i class="{kind}"></i>' in text
        assert f".legend .{kind} {{" in text


def _dom(browser: str, path: Path, folder: Path, at: str) -> str:
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags = [*quiet.split(), "--disable-component-update", "--disable-sync", "--no-sandbox"]
    flags += [f"--user-data-dir={folder}", "--virtual-time-budget=2000"]
    command = [browser, "--headless", *flags, "--dump-dom", f"{path.as_uri()}#{at}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_browser_draws_both_graphs_and_finds_a_layer(
    explanation: Explanation, tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no headless browser is installed")
    path = explanation.save_html(tmp_path / "page.html")
    layer = "layers.2.mlp.up_proj"
    dom = _dom(browser, path, tmp_path / "profile", layer)
    drawn = dom[dom.index('class="panes"') : dom.index('id="details"')]
    assert drawn.count("<svg") == 2
    # Found: one row, and its box in both graphs, apart from the run of equal layers around it.
    (row,) = [line for line in dom.splitlines() if f'data-name="{layer}"' in line]
    assert 'class="match focus"' in row
    for pane in drawn.split('data-side="')[1:]:
        boxes = [tag for tag in pane.split("<g ") if f'data-key="{layer}"' in tag]
        assert len(boxes) == 1
        assert "focus" in boxes[0]
        assert "layers.0 – 1" in pane
        assert "×2" in pane
    assert "1 of 1" in dom
