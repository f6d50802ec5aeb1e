"""Architectures of Hugging Face transformers: compiled equals eager, and every layer is told of."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import poetx_compile as poetx
from poetx_compile.compile import backend
from poetx_compile.errors import NothingToTrainError
from poetx_compile.passes import Record
from tests.helpers import huggingface
from tests.helpers.graph_of import prepared
from tests.helpers.rotations import turn
from tests.helpers.tolerances import assert_close, tolerance

LEFT_ALONE = {
    huggingface.llama: {"lm_head": "excluded by name: lm_head"},
    huggingface.qwen3: {"lm_head": "excluded by name: lm_head"},
    huggingface.gemma: {"lm_head": "excluded by name: lm_head"},
    huggingface.mistral: {"lm_head": "excluded by name: lm_head"},
    huggingface.gpt_neox: {"lm_head": "excluded by name: lm_head"},
    huggingface.bert: {
        "cls.predictions.decoder": "output embedding (model.get_output_embeddings())"
    },
    huggingface.t5: {"lm_head": "excluded by name: lm_head"},
    huggingface.vit: {},
    huggingface.whisper: {"proj_out": "output embedding (model.get_output_embeddings())"},
    huggingface.mixtral: {"lm_head": "excluded by name: lm_head"},
    huggingface.qwen2: {"lm_head": "excluded by name: lm_head"},
    huggingface.phi3: {"lm_head": "excluded by name: lm_head"},
    huggingface.gemma2: {"lm_head": "excluded by name: lm_head"},
    huggingface.mamba: {"lm_head": "excluded by name: lm_head"},
}
"""Every `nn.Linear` that is not trained through rotations, with the reason."""

FOLDED = (huggingface.llama, huggingface.gpt_neox)

_ZERO = re.compile(r"\.(key|k_proj)\.bias$")
"""A bias of keys shifts all scores of a query alike, unless it is turned by its position: its
gradient is zero but for rounding."""


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """What the passes did to each graph that is compiled."""
    seen: list[Record] = []
    rewrite = backend.rewrite

    def spy(*args, **kwargs):
        made = rewrite(*args, **kwargs)
        seen.append(made.record)
        return made

    monkeypatch.setattr(backend, "rewrite", spy)
    return seen


def assert_compiled_equals_eager(
    model: nn.Module, arguments: dict[str, torch.Tensor], formulation: str
) -> None:
    reference = copy.deepcopy(model)
    compiled = torch.compile(
        model,
        backend=poetx.poetx_backend,
        fullgraph=True,
        options={"stage": "aot_eager", "formulation": formulation},
    )
    actual, expected = compiled(**arguments), reference(**arguments)
    assert_close(actual.logits, expected.logits, what="logits")
    assert_close(actual.loss, expected.loss, what="loss")
    actual.loss.backward()
    expected.loss.backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert not (name.endswith(".original") and parameter.requires_grad), name
        assert (parameter.grad is None) is (not parameter.requires_grad), name
        if parameter.grad is None:
            continue
        if _ZERO.search(name) and wanted[name].grad.norm() < tolerance(torch.float32):
            assert parameter.grad.norm() < tolerance(torch.float32), name
        else:
            assert_close(parameter.grad, wanted[name].grad, what=f"gradient of {name}")


@pytest.mark.parametrize(
    ("make", "formulation"),
    [
        *((make, "input_centric") for make in LEFT_ALONE),
        *((make, "folded") for make in FOLDED),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_compiled_equals_eager_and_every_layer_has_a_reason(make, formulation, records):
    model = make()
    arguments = huggingface.inputs(make)
    plain = model(**arguments).logits
    report = poetx.prepare(model, poetx.POETXConfig(block_size=8))
    assert torch.equal(model(**arguments).logits, plain), "bitwise the same at the start"
    assert all(row.reason for row in report if row.status != "prepared")
    skipped = {row.name: row.reason for row in report if row.status == "skipped"}
    assert skipped == LEFT_ALONE[make]

    assert_compiled_equals_eager(turn(model), arguments, formulation)
    (record,) = records
    rewritten = {layer.name for e in record.applied(formulation) for layer in e.layers}
    assert rewritten == {row.name for row in report if row.status == "prepared"}


def test_gradient_checkpointing(records):
    model = huggingface.llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    prepared(model)
    assert_compiled_equals_eager(model, huggingface.inputs(huggingface.llama), "input_centric")
    (record,) = records
    assert len(record.applied("input_centric")) == 7


def test_gpt2_has_nothing_to_train_through_rotations():
    with pytest.raises(NothingToTrainError, match="lm_head: excluded by name"):
        poetx.prepare(huggingface.gpt2())


def test_generation_is_that_of_the_effective_weights():
    model = prepared(huggingface.llama(use_cache=True)).eval()
    tokens = huggingface.inputs(huggingface.llama)["input_ids"]
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(tokens, **how)
    assert generated.shape == (2, 15)
    model.compile(backend=poetx.poetx_backend, options={"stage": "aot_eager"})
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(model.generate(tokens, **how), generated)
    assert not torch._dynamo.utils.counters["stats"]
    poetx.merge_and_unload(model)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(model.generate(tokens, **how), generated)
