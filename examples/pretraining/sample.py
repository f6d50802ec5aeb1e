"""A text that the trained model goes on with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretraining.tokenizer import BPE, Bytes

PROMPT = 32
TEMPERATURE = 0.8


@torch.no_grad()
def continued(
    model: nn.Module,
    prompt: Tensor,
    count: int,
    *,
    length: int,
    seed: int,
    device: torch.device,
    autocast: bool,
) -> list[int]:
    """`prompt` [tokens] and `count` more tokens, drawn one by one at `TEMPERATURE`.

    Eager and without a cache of keys, the last `length` tokens at a time: for a look, not for
    speed. The same tokens in every process.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = [int(t) for t in prompt]
    was_training = model.training
    model.eval()  # prepared layers keep their effective weights meanwhile
    try:
        with torch.compiler.set_stance("force_eager"):
            for _ in range(count):
                window = torch.tensor([tokens[-length:]], device=device)
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    logits = model(window)[0, -1]
                shares = (logits.double() / TEMPERATURE).softmax(-1).cpu()
                tokens.append(int(torch.multinomial(shares, 1, generator=generator)))
    finally:
        model.train(was_training)
    return tokens


def shown(tokenizer: Bytes | BPE, tokens: list[int], prompt: int) -> str:
    """The text of `tokens`, with a mark behind the first `prompt` of them."""
    return f"{tokenizer.decode(tokens[:prompt])}⟫{tokenizer.decode(tokens[prompt:])}\n"
