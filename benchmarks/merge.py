"""A merge of one layer that redraws its permutations, and moving a momentum to its planes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import nn

import poetx_compile as poetx
from benchmarks import contenders, floors, gate, options
from benchmarks.options import Session
from benchmarks.rows import Row
from poetx_compile.layers.permutation import redraw_all
from poetx_compile.layers.prepared import equivalence_of, redrawn
from poetx_compile.optim.merge import merge
from poetx_compile.optim.transport import transport

COLUMNS = (
    "in_features", "out_features", "block_size", "merge_rotation", "permutation", "ms", "floor_ms",
    "ratio", "transport_ms", "error",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; returns its rows. ``ratio`` is the distance from the floor."""
    parser = options.parser("merge", __doc__)
    options.add_timing(parser, cuda_graphs=False)
    options.add_shapes(parser, tokens=False)
    add = parser.add_argument
    add("--block-sizes", type=options.list_of(options.positive), default=options.BLOCK_SIZES)
    add("--merge-rotations", type=options.list_of(str), default=("polar",), help="polar,plain")
    add("--permutations", type=options.list_of(str), default=("random", "chunked"))
    args = parser.parse_args(arguments)
    session = Session.start(args, COLUMNS)
    for (m, n), b in itertools.product(args.shapes, args.block_sizes):
        for rotation, permutation in itertools.product(args.merge_rotations, args.permutations):
            config = poetx.POETXConfig(
                block_size=b, merge_rotation=rotation, permutation=permutation
            )
            measure(session, m, n, config)
    return session.finish()


def measure(session: Session, m: int, n: int, config: poetx.POETXConfig) -> Row:
    """The row of one layer m → n."""
    error = check(session, m, n, config)
    layer = contenders.poetx_linear(session, m, n, config)
    timing = session.timer.time(lambda: merge(layer, redraw=True))
    sizes = floors.Layer.of(0, m, n, config.block_in, session.dtype.itemsize)
    floor_ms = floors.total_ms(floors.merge(sizes, config.merge_rotation), session.ceilings)
    return session.add(
        in_features=m,
        out_features=n,
        block_size=config.block_in,
        merge_rotation=config.merge_rotation,
        permutation=config.permutation,
        ms=timing.ms,
        ms_p20=timing.low,
        ms_p80=timing.high,
        floor_ms=floor_ms,
        ratio=timing.ms / floor_ms,
        transport_ms=_transport_ms(session, layer),
        error=error,
    )


def _transport_ms(session: Session, layer: nn.Linear) -> float:
    """Of one fp32 momentum of both sides."""
    e = equivalence_of(layer)
    assert e is not None
    moves = redraw_all(redrawn([e]))
    state = {skew: {"momentum_buffer": torch.randn_like(skew)} for skew in e.skews}
    signed = {"momentum_buffer": True}
    return session.timer.time(lambda: transport(e.sides, moves, state, signed)).ms


def check(session: Session, m: int, n: int, config: poetx.POETXConfig) -> float:
    """The gate; returns the error of the merged weight.

    Merging the rotations as they are leaves the effective weight where it was. With polar factors
    it moves, so that is compared with the same merge in float64, where no kernel runs.
    """
    plain = dataclasses.replace(config, merge_rotation="plain")
    layer = contenders.poetx_linear(session, m, n, plain)
    wide = copy.deepcopy(layer).double()
    merge(layer, redraw=True)
    error = gate.check(layer.weight, wide.weight, session.dtype, "weight merged plainly")
    if config.merge_rotation == "plain":
        return error
    return _check_polar(session, contenders.poetx_linear(session, m, n, config))


def _check_polar(session: Session, layer: nn.Linear) -> float:
    wide = copy.deepcopy(layer).double()
    merge(layer, redraw=True)
    merge(wide, redraw=True)
    return gate.check(layer.weight, wide.weight, session.dtype, "weight merged by polar factors")


if __name__ == "__main__":
    main()
