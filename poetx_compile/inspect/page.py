"""The HTML page of an explanation: one file that needs nothing else, no network and no server."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

import torch

from poetx_compile.inspect.drawing import Drawn
from poetx_compile.layers.tables import compact, without_conditions
from poetx_compile.passes import Event
from poetx_compile.passes.cost import TOKENS, Cost
from poetx_compile.version import __version__

if TYPE_CHECKING:
    from poetx_compile.inspect.explain import ExplainedGraph, ExplainRow, Explanation
    from poetx_compile.layers.trained import Trained

COLUMNS = ("layer", "shape", "blocks in | out", "formulation", "status", "reason")

COST_COLUMNS = (
    "shape", "blocks", "side", "rotate", "at T =", "rotate", "fold", "fold where T >", "layers",
)  # fmt: skip

LEGEND = (
    ("product", "product"),
    ("weight", "weight being built"),
    ("rotation", "rotations"),
    ("activation", "activation rotated or permuted"),
    ("other", "everything else; dashed: recomputed in the backward"),
    ("changed", "thick: on this side alone"),
    ("closed", "+ a closed module, with the colours inside; ×n equal layers"),
)

_ROTATE = "2 · max(2·T·b·d / flops, 2·T·d·e / bytes) + 2 · launch"
_FOLD = "folds · (max(2·b·m·n / flops, 2·m·n·e / bytes) + launch)"


def page(explanation: Explanation) -> str:
    """The page as text. Names, types and code of the model are escaped wherever they stand."""
    files = resources.files("poetx_compile.inspect") / "html"
    template, style, script = (
        (files / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    title = f"POET-X: {explanation.model}" if explanation.model else "POET-X"
    first = next((row.name for row in explanation.rows if row.name), "layers.0.mlp.up_proj")
    return Template(template).substitute(
        title=escape(title),
        example=escape(first),
        style=style,
        script=script,
        numbers=_numbers(explanation),
        chips=_chips(explanation.rows),
        columns="".join(
            f'<th scope="col"><button type="button">{escape(name)}</button></th>'
            for name in COLUMNS
        ),
        rows="\n".join(map(_row, explanation.rows)),
        legend="".join(f'<li><i class="{kind}"></i>{text}</li>' for kind, text in LEGEND),
        dense=_dense(explanation.trained),
        passes=_passes(explanation.across_layers),
        costs=_costs(explanation),
        texts="\n".join(_texts(explanation.graphs)),
        footer=escape(f"poetx-compile {__version__}, torch {torch.__version__}"),
        data=_data(explanation),
    )


def _numbers(explanation: Explanation) -> str:
    rows, graphs = explanation.rows, explanation.graphs
    rewritten = sum(row.status == "rewritten" for row in rows)
    before, after = (sum(getattr(g, f"nodes_{side}") for g in graphs) for side in _SIDES)
    trained = explanation.trained
    found = [] if trained is None else [(f"{trained.share:.1f} %", "trains through rotations")]
    found += [
        (f"{rewritten} of {len(rows)}", "nn.Linear rewritten"),
        (f"{before} → {after}", "nodes"),
        (str(len(graphs)), "graph" if len(graphs) == 1 else "graphs"),
    ]
    if explanation.kernels is not None:
        found.append((str(explanation.kernels), "kernels, forward and backward"))
    return "".join(f"<li><b>{escape(n)}</b><span>{escape(what)}</span></li>" for n, what in found)


def _dense(trained: Trained | None) -> str:
    """The share that trains, in words, and what trains densely."""
    if trained is None:
        return ""
    first = "; ".join(str(trained).splitlines()[:2])
    items = "".join(
        f"<li><code>{escape(', '.join(w.names))}</code> {'×'.join(map(str, w.shape))}: "
        f"{w.count:,} parameters, {escape(w.reason)}</li>"
        for w in trained.weights
    )
    return (
        '<section aria-labelledby="h-dense"><h2 id="h-dense">What trains</h2>'
        f'<p>{escape(first)}</p><ul class="events">{items}</ul></section>'
    )


_SIDES = ("before", "after")


def _chips(rows: Sequence[ExplainRow]) -> str:
    counts = Counter(row.status for row in rows)
    chips = [("", f"all {len(rows)}"), *((s, f"{s} {n}") for s, n in counts.most_common())]
    return "".join(
        f'<button type="button" data-status="{escape(status)}" '
        f'aria-pressed="{"false" if status else "true"}">{escape(text)}</button>'
        for status, text in chips
    )


def _row(row: ExplainRow) -> str:
    n, m = row.shape
    name, status = row.name or "(root)", row.status
    cells = (
        f'<td class="name">{escape(name)}</td>',
        f'<td class="num" data-value="{n * m}">{n}×{m}</td>',
        f'<td class="blocks">{escape(row.blocks)}</td>',
        f'<td class="how">{escape(row.formulation)}</td>',
        f'<td><span class="status {escape(status.replace(" ", "-"))}">{escape(status)}</span></td>',
        f'<td class="reason">{escape(row.reason)}</td>',
    )
    return f'<tr data-name="{escape(name)}" data-status="{escape(status)}">{"".join(cells)}</tr>'


def grouped(events: Iterable[Event]) -> Iterator[tuple[str, bool, str, str]]:
    """(pass, whether applied, what, layers) of events, equal ones told once."""
    alike: dict[tuple[str, bool, str], list[tuple[str, ...]]] = {}
    for event in events:
        key = (event.pass_name, event.applied, event.detail)
        alike.setdefault(key, []).append(tuple(layer.name for layer in event.layers))
    for (name, applied, detail), found in alike.items():
        times = f" ({len(found)} times)" if len(found) > 1 else ""
        layers = compact(layer for layers in found for layer in layers)
        yield name, applied, detail + times, ", ".join(layers)


def _passes(events: Iterable[Event]) -> str:
    items = []
    for name, applied, detail, layers in grouped(events):
        verb = "" if applied else '<span class="status refused">refused</span> '
        what = f"<b>{name}</b>: {verb}{escape(detail)}"
        items.append(f"<li>{what}<br><code>{escape(layers)}</code></li>")
    if not items:
        return ""
    return (
        '<section aria-labelledby="h-passes"><h2 id="h-passes">What the passes did across layers'
        f'</h2><ul class="events">{"".join(items)}</ul></section>'
    )


def _costs(explanation: Explanation) -> str:
    seen: dict[tuple[tuple[int, int], str, Cost], list[str]] = {}
    for row in explanation.rows:
        for cost in row.costs:
            seen.setdefault((row.shape, row.blocks, cost), []).append(row.name)
    if not seen:
        return ""
    machine = explanation.machine
    rates = (
        f"flops = {machine.flops:.3g}/s, bytes = {machine.bytes:.3g}/s, "
        f"launch = {machine.launch * 1e6:.3g} µs"
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in COST_COLUMNS)
    body = "".join(_cost_row(*key, names) for key, names in seen.items())
    return f"""<section aria-labelledby="h-costs"><h2 id="h-costs">Cost model: rotate or fold</h2>
<p>Each side of each layer takes the cheaper form. For one side of width d of a weight [n, m], with
T tokens, blocks of b, and elements of e bytes, in seconds a step:</p>
<div class="formula">rotate = {_ROTATE}<br>fold&nbsp;&nbsp; = {_FOLD}<br>{escape(rates)}</div>
<div class="scroll"><table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div></section>"""


def _cost_row(shape: tuple[int, int], blocks: str, cost: Cost, names: list[str]) -> str:
    n, m = shape
    slope = float(cost.rotate.coeff(TOKENS)) * 1e6
    start = float(cost.rotate.subs(TOKENS, 0)) * 1e6
    rotate = float(cost.rotate.subs(TOKENS, cost.tokens)) * 1e6
    fold = float(cost.fold) * 1e6
    cells = [
        f'<td class="num">{n}×{m}</td>',
        f'<td class="blocks">{escape(blocks)}</td>',
        f"<td>{cost.side}</td>",
        f'<td class="num">{slope:.3g}·T + {start:.3g} µs</td>',
        f'<td class="num">{cost.tokens}</td>',
        f'<td class="num">{"" if cost.folding_is_cheaper else "<b>"}{rotate:.3g} µs'
        f"{'' if cost.folding_is_cheaper else '</b>'}</td>",
        f'<td class="num">{"<b>" if cost.folding_is_cheaper else ""}{fold:.3g} µs'
        f"{'</b>' if cost.folding_is_cheaper else ''}</td>",
        f'<td class="num">{cost.break_even}</td>',
        f'<td class="how">{escape(", ".join(compact(names)))}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _texts(graphs: Sequence[ExplainedGraph]) -> Iterable[str]:
    for number, graph in enumerate(graphs, 1):
        which = f" of graph {number}" if len(graphs) > 1 else ""
        for side in _SIDES:
            text = escape(getattr(graph, side))
            summary = f"<summary>{side.capitalize()}{which}</summary>"
            yield f"<details>{summary}<pre>{text}</pre></details>"


def _data(explanation: Explanation) -> str:
    """What the script draws, as JSON that cannot end the element it stands in."""
    value = {
        "graphs": [
            {
                "before": list(map(_box, graph.boxes_before)),
                "after": list(map(_box, graph.boxes_after)),
                "nodes_before": graph.nodes_before,
                "nodes_after": graph.nodes_after,
            }
            for graph in explanation.graphs
        ],
        "rows": {
            row.name or "(root)": {
                "shape": f"{row.shape[0]}×{row.shape[1]}",
                "status": row.status,
                "how": ""
                if row.formulation in ("-", "plain")
                else without_conditions(row.formulation),
                "reason": row.reason,
            }
            for row in explanation.rows
        },
    }
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _box(box: Drawn) -> dict[str, Any]:
    return dataclasses.asdict(box)
