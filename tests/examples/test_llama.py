"""examples/llama.py: an ordinary decoder, and the model that a run exports."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama import PRESETS, Llama, LlamaConfig, load
from pretrain import export
from pretraining.methods import built_in
from pretraining.schedule import lr_factor
from tests.helpers.tolerances import assert_close

SMALL = LlamaConfig(32, 64, 2, 4, max_seq_len=16)


def test_knows_nothing_of_the_package():
    import llama

    with open(llama.__file__, encoding="utf-8") as source:
        assert "poetx" not in source.read()


def test_is_causal_and_starts_at_the_uniform_loss():
    model = Llama(SMALL)
    tokens = torch.randint(0, 256, (2, 12))
    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 256
    torch.testing.assert_close(model(changed)[:, :8], logits[:, :8])
    assert not torch.allclose(model(changed)[:, 8:], logits[:, 8:])
    assert model(tokens, tokens).item() == pytest.approx(math.log(256), rel=0.02)


def test_positions_matter():
    model = Llama(SMALL)
    with torch.no_grad():
        for block in model.layers:
            block.self_attn.q_proj.weight.mul_(20)
            block.self_attn.k_proj.weight.mul_(20)
    tokens = torch.tensor([[1, 2, 3, 4]])
    swapped = torch.tensor([[2, 1, 3, 4]])
    assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1], atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_equal_repeated_heads(kv_heads: int):
    grouped = Llama(LlamaConfig(32, 64, 1, 4, num_kv_heads=kv_heads, max_seq_len=16))
    full = Llama(LlamaConfig(32, 64, 1, 4, max_seq_len=16))
    state = grouped.state_dict()
    for name in ("k_proj", "v_proj"):
        key = f"layers.0.self_attn.{name}.weight"
        heads = state[key].view(kv_heads, 8, 32).repeat_interleave(4 // kv_heads, dim=0)
        state[key] = heads.reshape(32, 32)
    full.load_state_dict(state)
    tokens = torch.randint(0, 256, (2, 16))
    torch.testing.assert_close(grouped(tokens), full(tokens))


def test_activation_checkpointing_changes_no_gradient():
    tokens = torch.randint(0, 256, (2, 16))
    plain, recomputed = Llama(SMALL), Llama(SMALL, activation_checkpointing=True)
    recomputed.load_state_dict(plain.state_dict())
    for model in (plain, recomputed):
        model(tokens, tokens).backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_a_loss_in_chunks_is_the_loss_at_once():
    whole, chunked = Llama(SMALL), Llama(SMALL, loss_chunk=5)
    chunked.load_state_dict(whole.state_dict())
    tokens = torch.randint(0, 256, (2, 12))  # four chunks of 5 and one of 4
    losses = [model(tokens, tokens) for model in (whole, chunked)]
    assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for a, b in zip(chunked.parameters(), whole.parameters(), strict=True):
        assert_close(a.grad, b.grad)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_about_the_parameters_they_are_named_after(preset: str):
    with torch.device("meta"):
        model = Llama(LlamaConfig(**PRESETS[preset]))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    named = {"tiny": 0.49, "1b": 1200, "3b": 2600, "8b": 7800, "13b": 12700}
    expected = named.get(preset) or float(preset.removesuffix("m"))
    assert millions == pytest.approx(expected, rel=0.06)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="heads of an even size"):
        LlamaConfig(30, 64, 1, 4)
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        LlamaConfig(32, 64, 1, 4, num_kv_heads=3)


def test_schedule_warms_up_and_ends_at_one_per_cent():
    factors = [lr_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[-1] == pytest.approx(0.01)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert lr_factor(0, 1, 0) == 1.0


def test_weights_are_made_in_their_dtype_and_the_rotary_table_in_fp32():
    made = []
    with built_in(torch.device("cpu"), torch.bfloat16), Made(made):
        model = Llama(SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cos.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert max(t.numel() for t in made if t.dtype == torch.float32) <= model.cos.numel()


class Made(TorchDispatchMode):
    """Lists the tensors that are made inside."""

    def __init__(self, made: list[torch.Tensor]):
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.made.append(result)
        return result


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_an_export_is_a_llama_of_transformers(kv_heads: int | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shapes = LlamaConfig(
        32, 80, 2, 4, num_kv_heads=kv_heads, max_seq_len=16, rope_theta=500.0, norm_eps=1e-3
    )
    model = Llama(shapes)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, and attention that looks somewhere
            parameter.add_(0.3 * torch.randn_like(parameter))
    export(model.state_dict(), shapes, tmp_path / "export")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(0, 256, (2, 16))
    expected = model(tokens)
    assert_close(theirs(tokens).logits, expected)
    back = load(tmp_path / "export")
    assert back.config == dataclasses.replace(shapes, num_kv_heads=shapes.kv_heads)
    assert torch.equal(back(tokens), expected)
