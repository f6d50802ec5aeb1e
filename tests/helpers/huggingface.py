"""Tiny Hugging Face models, from their configurations alone, with inputs; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 48
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
DECODER = SIZES | {"num_hidden_layers": 1, "num_key_value_heads": 2, "use_cache": False}
"""Grouped-query attention; blocks of 8 leave coordinates over on some sides."""


def causal(config: Any) -> nn.Module:
    """The causal language model of a configuration, without dropout."""
    return transformers.AutoModelForCausalLM.from_config(without_dropout(config))


def without_dropout(config: Any) -> Any:
    """Dropout of a compiled model draws other masks than that of an eager one."""
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def llama(**settings: Any) -> nn.Module:
    return causal(transformers.LlamaConfig(**DECODER | settings))


def qwen3() -> nn.Module:
    return causal(transformers.Qwen3Config(**DECODER, head_dim=6))


def qwen2() -> nn.Module:
    return causal(transformers.Qwen2Config(**DECODER))  # biases in q, k, v


def phi3() -> nn.Module:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return causal(transformers.Phi3Config(**DECODER, **special))  # q, k, v in one layer


def gemma2() -> nn.Module:
    return causal(transformers.Gemma2Config(**DECODER, head_dim=6, sliding_window=4))


def mamba() -> nn.Module:
    return causal(
        transformers.MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=1,
            state_size=4,
            use_cache=False,
        )
    )


def gemma() -> nn.Module:
    return causal(transformers.GemmaConfig(**DECODER, head_dim=6))  # ties its embeddings


def mistral() -> nn.Module:
    return causal(transformers.MistralConfig(**DECODER, sliding_window=4))


def gpt_neox() -> nn.Module:
    return causal(transformers.GPTNeoXConfig(**SIZES, num_hidden_layers=1, use_cache=False))


def gpt2() -> nn.Module:
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return causal(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=1, n_head=4, **special)
    )


def mixtral() -> nn.Module:
    return causal(transformers.MixtralConfig(**DECODER, num_local_experts=4))


def bert() -> nn.Module:
    config = transformers.BertConfig(**SIZES, num_hidden_layers=1)
    return transformers.BertForMaskedLM(without_dropout(config))


def vit() -> nn.Module:
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = transformers.ViTConfig(
        **sizes, num_hidden_layers=1, image_size=8, patch_size=4, num_labels=5
    )
    return transformers.ViTForImageClassification(without_dropout(config))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=24,
        d_kv=6,
        d_ff=36,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(without_dropout(config))


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=36,
        decoder_ffn_dim=36,
        num_mel_bins=5,
        max_source_positions=10,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
    )
    return transformers.WhisperForConditionalGeneration(without_dropout(config))


def inputs(make: Callable[[], nn.Module], batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Arguments of the forward of the model that `make` makes, labels among them."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    if make is vit:
        images = torch.randn(batch, 3, 8, 8, generator=generator)
        return {"pixel_values": images, "labels": torch.arange(batch)}
    if make is whisper:
        features = torch.randn(batch, 5, 20, generator=generator)
        return {"input_features": features, "labels": tokens}
    return {"input_ids": tokens, "labels": tokens.clone()}
