"""An ordinary Llama-style decoder: RMSNorm, RoPE, SwiGLU, causal SDPA, no biases.

Plain PyTorch: nothing here knows how the model is going to be trained.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shapes of the model.

    Args:
        hidden_size: width of the residual stream; `num_heads` divides it into even head sizes.
        intermediate_size: width inside the MLP.
        num_layers: number of decoder blocks.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads (grouped-query attention); ``None`` for
            `num_heads`.
        vocab_size: number of tokens; 256 for bytes.
        max_seq_len: longest sequence the rotary table covers.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of RMSNorm.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    vocab_size: int = 256
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.head_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be {self.num_heads} heads of an even size"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.kv_heads}"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


def _shape(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_layers": layers,
        "num_heads": heads,
    }


PRESETS: dict[str, dict[str, int]] = {
    "tiny": _shape(128, 384, 2, 4),
    "20m": _shape(512, 1536, 6, 8),
    "60m": _shape(768, 2048, 8, 12),
    "130m": _shape(1024, 2816, 10, 16),
    "350m": _shape(1280, 3584, 18, 20),
    "1b": _shape(2048, 5376, 24, 32),
    "3b": _shape(2560, 7168, 32, 32),
    "8b": _shape(4096, 14336, 32, 32),
}
"""Named shapes; the number is about the parameter count with the byte vocabulary."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions; grouped queries where there are fewer k, v."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_size = config.head_size
        self.grouped = config.kv_heads != config.num_heads
        kv_size = config.kv_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            y.view(batch, length, -1, self.head_size).transpose(1, 2)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer: pre-norm attention and pre-norm MLP, each on a residual."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder with its token embedding and an untied `lm_head`.

    Args:
        config: the shapes.
        activation_checkpointing: keep only the input of each block and recompute the rest in the
            backward.
        loss_chunk: with targets, make the logits of so many tokens at a time, and again in the
            backward: long sequences then need no room for all of them. ``None`` for all at once.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: LlamaConfig,
        *,
        activation_checkpointing: bool = False,
        loss_chunk: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.loss_chunk = loss_chunk
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal(0, 0.02); the projections onto the residual are scaled by 1/√(2·layers)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 1 / math.sqrt(2 * self.config.num_layers) if residual else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [batch, length, vocab], or the mean cross-entropy in nats where targets are given.

        Args:
            tokens: int64 [batch, length].
            targets: int64 [batch, length], the next token of each position.
        """
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed_tokens(tokens)
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        if targets is None:
            return self.lm_head(self.norm(x))
        return self.loss(x, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats of what the last block returns."""
        x, targets = self.norm(x).flatten(0, 1), targets.flatten()
        if self.loss_chunk is None:
            return F.cross_entropy(self.lm_head(x).float(), targets)
        chunks = zip(x.split(self.loss_chunk), targets.split(self.loss_chunk), strict=True)
        losses = [checkpoint(self._summed_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum() / targets.numel()

    def _summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(x).float(), targets, reduction="sum")


def rotary_table(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, float32 [max_seq_len, head_size]."""
    exponents = torch.arange(0, config.head_size, 2).float() / config.head_size
    angles = torch.outer(torch.arange(config.max_seq_len).float(), config.rope_theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [batch, heads, length, head_size] (arXiv 2104.09864)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


_HF_NAMES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
}
"""Fields of a Hugging Face Llama configuration that have other names here."""


def to_hugging_face(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The ``config.json`` by which transformers makes a `LlamaForCausalLM` of the same model."""
    values = dataclasses.asdict(config) | {"num_kv_heads": config.kv_heads}
    renamed = {theirs: values.pop(ours) for theirs, ours in _HF_NAMES.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        **values,
        **renamed,
    }


def hugging_face_name(name: str) -> str:
    """The name that a parameter has there: all but the head are in `model`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def load(folder: str | Path, device: str | torch.device = "cpu") -> Llama:
    """The model that `pretrain.py` exported to `folder` (config.json and model.safetensors)."""
    from safetensors.torch import load_file

    folder = Path(folder)
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields = {field.name for field in dataclasses.fields(LlamaConfig)}
    renamed = {_HF_NAMES.get(name, name): value for name, value in values.items()}
    config = LlamaConfig(**{name: renamed[name] for name in fields})
    model = Llama(config).to(device)
    state = load_file(folder / "model.safetensors", device=str(device))
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    model.to(next(iter(state.values())).dtype).load_state_dict(state)
    return model
