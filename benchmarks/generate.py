"""Decoding with a prepared Llama in eager mode: weights kept, built at each call, and plain."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from benchmarks import options
from benchmarks.contenders import turn_
from benchmarks.options import Session
from benchmarks.rows import Row
from benchmarks.step_worker import EXAMPLES
from poetx_compile.layers.prepared import prepared_linears

COLUMNS = ("preset", "block_size", "context", "plain", "kept", "built", "gain", "kept_mib")


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; returns its rows: tokens per second, and the memory of what is kept."""
    parser = options.parser("generate", __doc__)
    options.add_timing(parser, cuda_graphs=False)
    add = parser.add_argument
    add("--presets", type=options.list_of(str), default=("20m",), help="of examples/llama.py")
    add("--block-sizes", type=options.list_of(options.positive), default=(256,))
    add("--context", type=options.positive, default=32, help="tokens that each new one follows")
    args = parser.parse_args(arguments)
    session = Session.start(args, COLUMNS)
    for preset in args.presets:
        for block_size in args.block_sizes:
            measure(session, preset, block_size, args.context)
    return session.finish()


def measure(session: Session, preset: str, block_size: int, context: int) -> Row:
    """The row of one model; there is none where its tokens are not those of the plain model."""
    kept = _llama(session, preset, context)
    config = poetx.POETXConfig(block_size=block_size)
    poetx.prepare(kept, config)
    for _, layer, _ in prepared_linears(kept):
        turn_(layer, session.generator)
    plain = poetx.merge_and_unload(copy.deepcopy(kept))
    built = _llama(session, preset, context)
    poetx.prepare(built, dataclasses.replace(config, keep_in_eval=False))
    built.load_state_dict(kept.state_dict())
    models = {"plain": plain.eval(), "kept": kept.eval(), "built": built.eval()}
    window = torch.randint(256, (1, context), generator=session.generator, device=session.device)

    @torch.no_grad()
    def next_token(model: nn.Module) -> Tensor:
        return model(window)[:, -1].argmax(-1)

    expected = next_token(plain)
    if any(not torch.equal(next_token(model), expected) for model in models.values()):
        raise SystemExit(f"{preset}, block size {block_size}: the tokens differ, nothing is timed")
    times = session.timer.compare({k: partial(next_token, model) for k, model in models.items()})
    rates = {name: 1e3 / timing.ms for name, timing in times.items()}
    weights = [m.weight for _, m, _ in prepared_linears(kept)]
    return session.add(
        preset=preset,
        block_size=block_size,
        context=context,
        **rates,
        gain=rates["kept"] / rates["built"],
        kept_mib=sum(w.numel() * w.element_size() for w in weights) / 2**20,
    )


def _llama(session: Session, preset: str, context: int) -> nn.Module:
    sys.path.insert(0, str(EXAMPLES))
    try:
        from llama import PRESETS, Llama, LlamaConfig
    finally:
        sys.path.remove(str(EXAMPLES))
    torch.manual_seed(0)
    with session.device:
        model = Llama(LlamaConfig(**PRESETS[preset], max_seq_len=context))
    return model.to(session.dtype)


if __name__ == "__main__":
    main()
