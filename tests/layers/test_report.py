"""The printed report: equal layers in one row, the share first, within a terminal's width."""

from __future__ import annotations

import pytest

from poetx_compile.layers.report import LayerRow, PrepareReport
from poetx_compile.layers.tables import compact, folded_rows, wrapped_table
from poetx_compile.layers.trained import Trained

KINDS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def llama(layers: int) -> PrepareReport:
    rows = [LayerRow("model.embed_tokens.weight", (128256, 4096), "-", "dense", "embedding", False)]
    for i in range(layers):
        for name, (n, m) in KINDS.items():
            blocks = f"{m // 256}x256 | {n // 256}x256"
            rows.append(LayerRow(f"model.layers.{i}.{name}", (n, m), blocks, "prepared", ""))
    rows.append(LayerRow("lm_head", (128256, 4096), "-", "skipped", "excluded by name: lm_head"))
    what = Trained(7 * layers, 7 * layers + 1, 8_030_261_248, 6_979_321_856, 10**9, 10**9, ())
    return PrepareReport(rows, what)


def test_a_model_of_32_layers_takes_12_lines_of_80_columns() -> None:
    lines = str(llama(32)).splitlines()
    assert len(lines) == 12
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("86.9 % of 8,030,261,248 parameters (224 of 225 nn.Linear) train")
    assert "model.layers.0-31.mlp.up_proj       14336x4096   16x256 | 56x256" in lines
    assert lines[-1] == f"{'lm_head':34}  128256x4096  excluded by name: lm_head"


def test_verbose_has_every_layer_and_the_rest_one_line() -> None:
    report = llama(3)
    assert report.text(verbose=True).count("\n") == 2 + 1 + len(report)
    assert repr(report).count("\n") == 0
    assert repr(report).startswith("<PrepareReport: 21 of 22 nn.Linear, 86.9 %")
    assert report._repr_html_().count("<tr>") == 1 + 9
    assert "<td>model.layers.0-2.mlp.up_proj</td>" in report._repr_html_()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["h.0.e.0.w", "h.0.e.1.w", "h.1.e.0.w", "h.1.e.1.w"], ["h.0-1.e.0-1.w"]),
        (["h.0.e.0.w", "h.0.e.1.w", "h.1.e.0.w"], ["h.0-1.e.0.w", "h.0.e.1.w"]),
        (["0.up", "2.up", "1.up"], ["0-2.up"]),
        (["h.1", "h.1.w", "head"], ["h.1", "h.1.w", "head"]),
    ],
)
def test_numbers_of_equal_names_are_joined(names: list[str], expected: list[str]) -> None:
    assert compact(names) == expected


def test_what_differs_in_more_than_numbers_stays_apart() -> None:
    rows = [("h.0.w", "8x8", "a"), ("h.1.w", "8x8", "b"), ("h.2.w", "8x8", "a")]
    assert folded_rows(rows) == [("h.0,2.w", "8x8", "a"), ("h.1.w", "8x8", "b")]


def test_long_names_are_shortened_and_reasons_wrapped() -> None:
    name = "language_model.model.decoder." * 3 + "layers.0-31.self_attention.query_key_value"
    text = wrapped_table(("layer", "shape", "why"), [(name, "128x128", "because of it " * 9)])
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("because") == 9
    assert "query_key_value" in text
