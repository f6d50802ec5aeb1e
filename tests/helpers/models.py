"""Small models shared by the tests; none of them knows of POET-X.

Sizes are odd or uneven on purpose: block sizes of 4 and 8 leave coordinates over on some sides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, GELU, Linear, with biases: [..., width] → [..., width]."""

    def __init__(self, width: int = 12, hidden: int = 22, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class SwiGLU(nn.Module):
    """Gated MLP without biases: gate and up read one tensor."""

    def __init__(self, width: int = 16, hidden: int = 40):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Siblings(nn.Module):
    """q, k, v of one input (they share its permutation) and an output layer."""

    def __init__(self, width: int = 48, bias: bool = True):
        super().__init__()
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, 32, bias=bias)
        self.v = nn.Linear(width, 32, bias=bias)
        self.o = nn.Linear(32, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.k(x)) * self.v(x)) + self.q(x)


class Attention(nn.Module):
    """Causal grouped-query attention without positions: q, k, v read one tensor."""

    def __init__(self, width: int = 16, heads: int = 4, kv_heads: int = 2):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor, heads: int) -> Tensor:
            y = y.unflatten(-1, (heads, self.size)).transpose(-2, -3)
            return y.repeat_interleave(self.heads // heads, dim=-3)

        q = split(self.q_proj(x), self.heads)
        k, v = split(self.k_proj(x), self.kv_heads), split(self.v_proj(x), self.kv_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention, self.mlp = Attention(width), SwiGLU(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class TinyLM(nn.Module):
    """Embedding, blocks, head: int64 tokens [batch, time] → logits [batch, time, vocabulary]."""

    def __init__(self, vocabulary: int = 24, width: int = 16, layers: int = 2, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class OddZoo(nn.Module):
    """A chain of linears with sides that no block size divides, a side of size 1, and biases."""

    sizes = (7, 13, 1, 5, 2, 3, 19, 7)

    def __init__(self):
        super().__init__()
        self.chain = nn.ModuleList(
            nn.Linear(m, n, bias=i % 2 == 0)
            for i, (m, n) in enumerate(zip(self.sizes, self.sizes[1:], strict=False))
        )

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.chain:
            x = torch.tanh(linear(x)) + 0.1
        return x
