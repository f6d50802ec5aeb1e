"""The graph passes, one a file, in the order they run.

======================  ========================================================================
`adopt_linear`          plain linears of an unprepared model get the orthogonal-equivalence form
`input_centric`         linear over such a weight → rotate, linear with the frozen weight, rotate
`share_permutations`    one gather for the layers fed by the same tensor
`batch_cayley`          rotations of several layers in one launch, within a byte budget
`recompute`             what the backward builds again (variants fast and mem)
======================  ========================================================================

Passes know FX and the names and shapes of the ops; they import no kernel.
"""

from __future__ import annotations

from typing import Any

from poetx_compile.passes.adopt_linear import AdoptLinear
from poetx_compile.passes.batch_cayley import DEFAULT_BYTES, BatchCayley
from poetx_compile.passes.contract import Event, GraphPass, Record, Refusal, run
from poetx_compile.passes.input_centric import InputCentric
from poetx_compile.passes.recompute import Recompute
from poetx_compile.passes.share_permutations import SharePermutations

NAMES = tuple(
    p.name for p in (AdoptLinear, InputCentric, SharePermutations, BatchCayley, Recompute)
)
"""Every pass by the name that `disable_passes` takes."""


def pipeline(
    *, variant: str, max_bytes: int = DEFAULT_BYTES, disabled: tuple[str, ...] = ()
) -> list[GraphPass[Any]]:
    """The passes after adoption, configured, less the disabled ones."""
    passes: list[GraphPass[Any]] = [
        InputCentric(),
        SharePermutations(),
        BatchCayley(max_bytes),
        Recompute(variant),
    ]
    return [p for p in passes if p.name not in disabled]


__all__ = [
    "NAMES",
    "AdoptLinear",
    "BatchCayley",
    "Event",
    "GraphPass",
    "InputCentric",
    "Recompute",
    "Record",
    "Refusal",
    "SharePermutations",
    "pipeline",
    "run",
]
