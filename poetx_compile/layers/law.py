"""What a share of trained parameters is known to cost, in a sentence of a report."""

from __future__ import annotations

import itertools
import math

LAW = ((0.05, 9.5), (0.10, 5.0), (0.19, 1.0), (0.385, -3.0), (0.77, -5.5))
"""Parameters of rotations over those of their weights → final loss over tuned AdamW's, in %.

`POETXMuon` from scratch, equal tokens, 20M parameters (docs/quality.md).
"""

TOLD_FROM = 4.0
"""Per cent of loss from which a report says so."""

_PAGE = "docs/quality.md"


def expected(share: float) -> float:
    """The loss over AdamW's in per cent at a share: between two of `LAW` on a logarithmic scale.

    Beyond the ends it is that of the end.
    """
    (low, loss), *_ = LAW
    if share <= low:
        return loss
    for (a, at_a), (b, at_b) in itertools.pairwise(LAW):
        if share <= b:
            return at_a + (at_b - at_a) * math.log(share / a) / math.log(b / a)
    return LAW[-1][1]


def notice(rotations: int, rotated: int) -> str | None:
    """What is known of so many parameters for weights of so many; ``None`` where it costs nothing.

    Args:
        rotations: parameters of rotations.
        rotated: parameters of the weights they turn.
    """
    share = rotations / max(rotated, 1)
    if share > 1:
        return f"rotations are {100 * share:.0f} % of their weights ({_PAGE})"
    loss = expected(share)
    if rotations == 0 or loss < TOLD_FROM:
        return None
    loss_text = f"at least {loss:.0f}" if share < LAW[0][0] else f"{loss:.0f}"
    return f"from scratch expect {loss_text} % more loss than tuned AdamW's ({_PAGE})"
