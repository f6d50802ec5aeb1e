"""Parameters that become one tensor: a call of ``aten.cat``, not code of Inductor's.

The packed parameters of a batch of rotations are put side by side before they are read::

    packed: f32[116, 32640] = cat([skew_1, …, skew_14])     # inputs of the graph
    deltas: bf16[116, 256, 256] = poetx.rotation_delta(packed, …)

There is nothing to fuse on either side, and ``aten.cat`` copies them all in one launch. Inductor
would schedule each copy and generate code for it, 14 for a layer's forward and 14 for its backward:
6 % of a compilation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def concatenate_parameters(graph: fx.Graph) -> None:
    """Keep each ``cat`` of inputs of the graph that only ops of this package read as a call."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        parts: Any = node.args[0]
        if all(part.op == "placeholder" for part in parts) and all(map(_is_ours, node.users)):
            node.meta["should_fallback"] = True  # Inductor's own mark


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", None) == "poetx"
