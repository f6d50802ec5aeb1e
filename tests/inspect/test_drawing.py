"""A graph as boxes: what is one, where it belongs, and what it reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from poetx_compile.inspect.drawing import ROTATIONS, Drawn
from poetx_compile.inspect.explain import explain
from tests.helpers.graph_of import prepared
from tests.helpers.models import SwiGLU


def labels(boxes: list[Drawn]) -> list[str]:
    return [box.label for box in boxes]


def test_boxes_have_modules_and_read_each_other() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([SwiGLU(), SwiGLU()])
            self.register_buffer("scale", torch.ones(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            first, second = (x * self.scale).chunk(2, -1)
            return F.relu(first) + second

    (graph,) = explain(Model(), torch.zeros(3, 16)).graphs
    boxes = graph.boxes_before
    assert labels(boxes) == [
        "x", *["linear", "silu", "linear", "mul", "linear", "add"] * 2, "mul", "chunk", "relu",
        "add", "return",
    ]  # fmt: skip
    assert (boxes[0].kind, boxes[0].type, boxes[0].module) == ("input", "f32[3, 16]", ())
    gate, silu = boxes[1], boxes[2]
    assert gate.module == ("layers.0", "gate_proj")
    assert gate.parameters == ("layers.0.gate_proj.weight: f32[40, 16]",)
    assert (gate.kind, gate.reads) == ("product", (0,))
    assert (silu.module, silu.kind, silu.reads) == (("layers.0",), "other", (1,))
    assert silu.source.startswith("models.py:")
    assert silu.source.endswith("F.silu(self.gate_proj(x)) * self.up_proj(x))")
    # Buffers are no boxes, nor are parts of tuples: both readers of the chunk read its box.
    scaled, chunk, relu, total = boxes[13:17]
    assert scaled.parameters == ("scale: f32[16]",)
    assert (chunk.type, relu.reads, total.reads) == ("tuple", (14,), (15, 14))
    assert boxes[-1].reads == (16,)


def test_rotations_of_several_layers_stand_apart() -> None:
    (graph,) = explain(prepared(SwiGLU()), torch.zeros(3, 16)).graphs
    boxes = graph.boxes_after
    apart = [box for box in boxes if box.module[:1] == (ROTATIONS,)]
    assert labels(apart) == ["cat", "cayley_neumann", "split"]
    assert {box.module for box in apart} == {(ROTATIONS, "batch.0")}
    assert all(box.kind == "rotation" and box.again for box in apart[1:])
    assert apart[0].parameters[0].startswith("gate_proj.skew_in: f32[2, 28]")
    rotated = [box for box in boxes if box.label == "rotate_blocks"]
    assert [box.module for box in rotated] == [
        ("gate_proj",), ("gate_proj",), ("up_proj",), ("up_proj",), ("down_proj",), ("down_proj",),
    ]  # fmt: skip
    split = boxes.index(apart[2])
    assert all(split in box.reads for box in rotated)


def test_a_checkpointed_body_stands_where_it_is_called() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SwiGLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x + 1, use_reentrant=False) + 2

    (graph,) = explain(Model(), torch.zeros(3, 16, requires_grad=True)).graphs
    boxes = graph.boxes_before
    assert labels(boxes) == [
        "x", "add", "linear", "silu", "linear", "mul", "linear", "add", "return",
    ]  # fmt: skip
    assert boxes[2].module == ("inner", "gate_proj")
    assert boxes[2].parameters == ("inner.gate_proj.weight: f32[40, 16]",)
    assert boxes[2].reads == (1,)
    assert boxes[7].reads == (6,)
    assert graph.nodes_before > len(boxes)
