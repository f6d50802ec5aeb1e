"""The graph passes, one a file, in the order they run.

======================  ========================================================================
`adopt_linear`          plain linears of an unprepared model get the orthogonal-equivalence form
`gains`                 linear over a weight with gains → its input and output multiplied by them
`formulation`           linear over such a weight → the product, each side of the layer rotated
                        (`input_centric`) or folded into the weight (`folded`)
`merged`                linear over a weight whose rotations are the identity → the product alone
`share_permutations`    one gather for the layers fed by the same tensor
`cancel_permutations`   no permutation where a scatter meets a gather of the same group
`batch_cayley`          rotations of several layers in one launch, within a byte budget
`hoist_folds`           folds leave the graph, to be kept between its calls (only where asked for)
`recompute`             what the backward recomputes (variants fast and mem)
======================  ========================================================================

Passes know FX and the names and shapes of the ops; they import no kernel.
"""

from __future__ import annotations

from typing import Any

from poetx_compile.passes.adopt_linear import AdoptLinear
from poetx_compile.passes.batch_cayley import DEFAULT_BYTES, BatchCayley
from poetx_compile.passes.cancel_permutations import CancelPermutations
from poetx_compile.passes.contract import Event, GraphPass, Record, Refusal, run
from poetx_compile.passes.cost import Machine
from poetx_compile.passes.formulation import FORMS, Formulation
from poetx_compile.passes.gains import Gains
from poetx_compile.passes.hoist_folds import HoistFolds
from poetx_compile.passes.merged import Merged
from poetx_compile.passes.recompute import Recompute
from poetx_compile.passes.share_permutations import SharePermutations

PASSES: tuple[type[GraphPass[Any]], ...] = (
    AdoptLinear,
    Gains,
    Formulation,
    Merged,
    SharePermutations,
    CancelPermutations,
    BatchCayley,
    HoistFolds,
    Recompute,
)
NAMES = (*(p.name for p in PASSES), *FORMS)
"""What `disable_passes` takes: passes, and the forms that `formulation` chooses from."""
LAYER_FORMS = (*FORMS, Merged.name)
"""The names of the events that say how a layer runs."""


def pipeline(
    *,
    variant: str,
    budget: bool = False,
    formulation: str = "auto",
    within_guard: bool = True,
    machine: Machine | None = None,
    max_bytes: int = DEFAULT_BYTES,
    disabled: tuple[str, ...] = (),
    hoist: HoistFolds | None = None,
) -> list[GraphPass[Any]]:
    """The passes after adoption, configured, less the disabled ones; `hoist` where asked for.

    `budget`: whether there is a memory budget, under which folded weights may be given up.
    """
    folds = 1 if variant == "fast" and not budget else 2
    forms = [form for form in FORMS if form not in disabled]
    passes: list[GraphPass[Any]] = [
        Gains(),
        Formulation(formulation, folds, machine, within_guard, forms),
        Merged(),
        SharePermutations(),
        CancelPermutations(),
        BatchCayley(max_bytes),
        *([] if hoist is None else [hoist]),
        Recompute(variant, budget),
    ]
    return [p for p in passes if p.name not in disabled]


__all__ = [
    "FORMS",
    "LAYER_FORMS",
    "NAMES",
    "PASSES",
    "AdoptLinear",
    "BatchCayley",
    "CancelPermutations",
    "Event",
    "Formulation",
    "Gains",
    "GraphPass",
    "HoistFolds",
    "Machine",
    "Merged",
    "Recompute",
    "Record",
    "Refusal",
    "SharePermutations",
    "pipeline",
    "run",
]
