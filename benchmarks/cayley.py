"""Packed skew parameters → rotations, and their gradients, against the floor of their products.

``forward`` and ``backward`` are those of rotations that meet activations; ``tangent`` is the
gradient of rotations that were folded into the weight, on either side of it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import floors, gate, options
from benchmarks.options import Session, list_of, positive
from benchmarks.rows import Row
from poetx_compile import ops
from poetx_compile.ops.packing import packed_size

COLUMNS = ("op", "blocks", "block_size", "order", "narrow", "ms", "floor_ms", "ratio", "error")

_LOW_PRECISION = torch.bfloat16
"""What products of low precision are exact to (`ops.cayley_neumann`)."""


@dataclasses.dataclass(frozen=True)
class Op:
    """One op: a function of (skew, grad), and its cost."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    cost: floors.Cost


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark; returns its rows. ``ratio`` is the distance from the floor."""
    parser = options.parser("cayley", __doc__)
    options.add_timing(parser)
    add = parser.add_argument
    add("--block-sizes", type=list_of(positive), default=options.BLOCK_SIZES)
    add("--blocks", type=list_of(positive), default=(16, 56, 150))
    add("--orders", type=list_of(order), default=(3,), help="of the expansion; exact: by a solve")
    add("--narrow", type=list_of(switch), default=(False, True), help="no,yes: operands in bf16")
    args = parser.parse_args(arguments)
    session = Session.start(args, COLUMNS)
    for b, blocks, k, narrow in itertools.product(
        args.block_sizes, args.blocks, args.orders, args.narrow
    ):
        if k is not None or not narrow:  # a solve has no low precision
            measure(session, blocks, b, k, narrow)
    return session.finish()


def order(text: str) -> int | None:
    """An order k ≥ 1, or ``exact``."""
    return None if text == "exact" else positive(text)


def switch(text: str) -> bool:
    """``yes`` or ``no``."""
    return {"no": False, "yes": True}[text]


def measure(session: Session, blocks: int, b: int, k: int | None, narrow: bool) -> None:
    """A row for each op on `blocks` blocks of b."""
    skew = torch.zeros(blocks, packed_size(b), device=session.device)
    gate.random_skew_(skew, b, session.generator)
    grad = session.normal(blocks, b, b).float()
    for op in _ops(blocks, b, k, narrow):
        # In float64 the ops run their plain references, no kernel.
        error = gate.check(
            op.function(skew, grad),
            op.function(skew.double(), grad.double()),
            _LOW_PRECISION if narrow else torch.float32,
            f"cayley {op.name}",
        )
        timing = session.timer.time(functools.partial(op.function, skew, grad))
        floor_ms = op.cost.ms(session.ceilings)
        session.add(
            op=f"cayley {op.name}",
            blocks=blocks,
            block_size=b,
            order=k or "exact",
            narrow=narrow,
            ms=timing.ms,
            ms_p20=timing.low,
            ms_p80=timing.high,
            floor_ms=floor_ms,
            ratio=timing.ms / floor_ms,
            error=error,
        )


def _ops(blocks: int, b: int, k: int | None, narrow: bool) -> Iterator[Op]:
    side = floors.Side(blocks * b, b)
    forward_cost, backward_cost = floors.cayley(side, k, precise=not narrow)
    tangent_cost = floors.tangent(side, k, precise=not narrow)

    def forward(skew: Tensor, grad: Tensor) -> Tensor:
        return ops.rotations(skew, b, k, narrow)

    def backward(skew: Tensor, grad: Tensor) -> Tensor:
        if k is None:
            return torch.ops.poetx.cayley_exact_backward(grad, skew, b)
        return torch.ops.poetx.cayley_neumann_backward(grad, skew, b, k, narrow)

    def tangent(skew: Tensor, grad: Tensor) -> Tensor:
        return torch.ops.poetx.rotation_tangent_backward(grad, skew, b, k, narrow)

    yield Op("forward", forward, forward_cost)
    yield Op("backward", backward, backward_cost)
    yield Op("tangent", tangent, tangent_cost)


if __name__ == "__main__":
    main()
