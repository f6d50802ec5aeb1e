"""Compiled code that trains nothing looks at the stored weights it reads, once after each step.

That is how averages of parameters are used: a target network, an evaluation of a moving average.
What `OrthogonalEquivalence` does in each eager forward is done here at the first call after any
optimiser's step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from poetx_compile.layers.integrity import check_stored_of
from poetx_compile.optim.hooks import step_hooks
from poetx_compile.passes import graphs


def look_first(
    gm: fx.GraphModule, example_inputs: Sequence[Any], compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """`compiled`, which looks first; as it is where something may train.

    Instances of a model may share compiled code, so the layers are found by the inputs of a call.
    """
    places = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    reads = [
        (places[stored], places[skew])
        for stored, skew, *_ in (
            n.args for n in gm.graph.nodes if graphs.is_op(n, *graphs.EQUIVALENCE)
        )
        if stored in places and skew in places
    ]
    training = torch.is_grad_enabled() and any(example_inputs[i].requires_grad for _, i in reads)
    if training or not reads:
        return compiled
    looked: dict[int, int] = {}  # by instance: the steps that had been taken when it was looked at
    first = reads[0][1]

    def looking(*args: Any) -> Any:
        steps = step_hooks.steps
        if looked.get(id(args[first])) != steps:
            check_stored_of([(args[stored], args[skew]) for stored, skew in reads])
            looked[id(args[first])] = steps
        return compiled(*args)

    return looking
