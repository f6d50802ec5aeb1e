"""The original POET: weight-centric, Adam, fresh permutations and moments at every merge.

This package's rotations in its form: the merge applies the Cayley-Neumann rotation as it is, the
angles are not guarded, and the gradients are clipped tightly for ten steps after a merge
(`poetx_compile.clip_grad_norm_`). Weight-centric and input-centric are the same mathematics, so the
graph may be either.
"""

from __future__ import annotations

from typing import Any


def fields(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of `POETXConfig` that make it the original; `given` goes before them."""
    original: dict[str, Any] = {
        "max_angle": None,
        "merge_rotation": "plain",
        "moments": "reset",
        "permutation": "random",
        "redraw_interval": given.get("merge_interval", 200),
    }
    return original | given
