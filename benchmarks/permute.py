"""A permutation of the columns of an activation, against a copy of it and plain indexing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import floors, options
from benchmarks.gate import GateError
from benchmarks.options import Session, list_of, positive
from benchmarks.rows import Row
from poetx_compile import ops
from poetx_compile.layers.permutation import draw_permutation

COLUMNS = (
    "tokens", "width", "permutation", "ms", "copy_ms", "indexing_ms", "floor_ms", "ratio",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; returns its rows. ``ratio`` is the distance from the floor."""
    parser = options.parser("permute", __doc__)
    options.add_timing(parser)
    add = parser.add_argument
    add("--tokens", type=list_of(positive), default=options.TOKENS)
    add("--widths", type=list_of(positive), default=(2560, 4096, 14336))
    add("--permutations", type=list_of(str), default=("random", "chunked"))
    args = parser.parse_args(arguments)
    session = Session.start(args, COLUMNS)
    for width, tokens, kind in itertools.product(args.widths, args.tokens, args.permutations):
        measure(session, tokens, width, kind)
    return session.finish()


def measure(session: Session, tokens: int, width: int, kind: str) -> Row:
    """The row of one activation [tokens, width]."""
    pair = draw_permutation(width, seed=0, draw=1, group=0, kind=kind).to(session.device)
    columns = element_permutation(pair, width)
    x = session.normal(tokens, width)
    if not torch.equal(ops.permute_columns(x, pair), x[:, columns]):
        raise GateError(f"permute_columns differs from indexing: {tokens} x {width}, {kind}")
    times = session.timer.compare(
        {
            "permute": lambda: ops.permute_columns(x, pair),
            "copy": lambda: x.clone(),
            "indexing": lambda: x[:, columns],
        }
    )
    floor_ms = floors.permute(tokens, width, x.element_size()).ms(session.ceilings)
    return session.add(
        tokens=tokens,
        width=width,
        permutation=kind,
        ms=times["permute"].ms,
        ms_p20=times["permute"].low,
        ms_p80=times["permute"].high,
        copy_ms=times["copy"].ms,
        indexing_ms=times["indexing"].ms,
        floor_ms=floor_ms,
        ratio=times["permute"].ms / floor_ms,
    )


def element_permutation(pair: Tensor, width: int) -> Tensor:
    """The permutation of single columns, int64 [width], of a pair over chunks of columns."""
    chunk = width // pair.shape[1]
    return (pair[0][:, None] * chunk + torch.arange(chunk, device=pair.device)).flatten()


if __name__ == "__main__":
    main()
