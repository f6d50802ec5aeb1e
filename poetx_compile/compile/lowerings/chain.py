"""Custom passes side by side with the user's: torch 2.11 accepts one, later versions a list."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph

from poetx_compile._torch import CustomGraphPass, custom_graph_pass


def chain_passes(existing: Any, ours: CustomGraphPass) -> Any:
    """A value for ``post_grad_custom_pre_pass`` that runs `existing`, then `ours`.

    The user's passes come first: they see the graph as it would be had the ops stayed opaque.

    Args:
        existing: the configured value: ``None``, a pass, or (torch ≥ 2.13) a list of passes. Plain
            functions are allowed; as always they make Inductor bypass its cache.
        ours: the pass to run last.
    """
    if not existing:
        return ours
    passes = [*existing] if isinstance(existing, list | tuple) else [existing]
    if hasattr(custom_graph_pass, "get_custom_graph_passes"):
        return [*passes, ours]
    return _Chain([*passes, ours])


class _Chain(CustomGraphPass):
    """Several passes as one, for torch versions whose hook holds a single pass."""

    def __init__(self, passes: list[Any]):
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any:
        """The uuids in order; ``None``, which bypasses the cache, where a pass has none."""
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return tuple(uuids) if all(uuids) else None
