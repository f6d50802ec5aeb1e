"""`recompute`: what the forward really keeps for the backward, read off AOTAutograd's graphs."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from tests.helpers.graph_of import explained, prepared
from tests.helpers.held import saved_activations
from tests.helpers.models import Block, SwiGLU


@pytest.mark.parametrize("variant", ["fast", "mem"])
def test_rotations_are_never_kept(variant):
    saved = saved_activations(prepared(SwiGLU()), torch.randn(2, 16), variant)
    assert saved, "something is always kept"
    assert not [shape for _, shape in saved if shape[-2:] == (8, 8)]


def test_fast_keeps_u_and_mem_keeps_only_the_input():
    model = prepared(nn.Linear(16, 40, bias=False))
    x = torch.randn(3, 16)
    fast, mem = (saved_activations(model, x, variant) for variant in ("fast", "mem"))
    assert (3, 40) in [shape for _, shape in fast]
    assert mem == []  # x is an input of the graph


def test_a_folded_layer_keeps_its_input_its_output_and_its_weight_at_most() -> None:
    model = prepared(SwiGLU(), formulation="folded")
    x = torch.randn(2, 16)
    fast = [shape for _, shape in saved_activations(model, x, "fast")]
    mem = [shape for _, shape in saved_activations(model, x, "mem")]
    weights = {tuple(p.shape) for n, p in model.named_parameters() if n.endswith("original")}
    assert weights & set(fast)
    assert not weights & set(mem)
    assert not [shape for shape in (*fast, *mem) if shape[-2:] == (8, 8)]


def test_mem_keeps_less_in_a_block():
    model = prepared(Block())
    x = torch.randn(2, 6, 16)
    count = {}
    for variant in ("fast", "mem"):
        torch._dynamo.reset()
        saved = saved_activations(model, x, variant)
        count[variant] = sum(torch.Size(shape).numel() for _, shape in saved)
        if variant == "mem":
            assert not [op for op, _ in saved if "mm" in op], "no u is kept"
    assert count["mem"] < count["fast"]


def test_the_variant_of_prepare_is_used_and_an_option_overrides_it():
    model = prepared(nn.Linear(16, 40), variant="mem")
    x = torch.randn(3, 16)
    intermediate = re.compile(r"rotate_blocks\(\w+, %\d+, perm_in.*\[recompute\]")
    assert intermediate.search(explained(model, x).after)
    assert not intermediate.search(explained(model, x, variant="fast").after)


def test_disabled_nothing_is_tagged():
    model = prepared(nn.Linear(16, 40))
    graph = explained(model, torch.randn(3, 16), disable_passes=["recompute"]).after
    assert "[recompute]" not in graph
    assert poetx.POETXConfig().variant == "fast"
