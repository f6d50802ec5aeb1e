"""The fold cache: folded weights that outlive a call of compiled code, over the micro-batches of a
step and over the batches of an evaluation (``options={"keep_folded": "step"}``).

`hoist_folds` takes the folds out of a graph. What binds the compiled graph to its weights looks, at
every call, at the tensors they are made of, and folds again where

- one of them is another tensor, or in another memory, or has been written since (its version);
- an optimiser steps, any: some write past the version of a parameter (``p.data``);
- gradients are on that were off, or the other way round: an evaluation may run with weights that
  were exchanged for it.

What is left are writes past the version, through ``p.data``, between two calls of one kind and
outside of an optimiser's step: `forget` is for these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from poetx_compile._torch import detect_fake_mode, is_fake, tracing
from poetx_compile.layers.registry import registry
from poetx_compile.layers.snapshot import Snapshot
from poetx_compile.passes import graphs
from poetx_compile.passes.hoist_folds import HoistFolds, Reads

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]

CUDA_GRAPHS = "CUDA graphs write their results into memory of their own, again at each replay"
ADOPTED = "the state of an adopted weight moves into the model, which is then compiled again"
FSDP = "FSDP gathers the parameters anew for each call"
NO_VALUES = (
    "compiled from tensors without values (DDP splits graphs: torch._dynamo.config.optimize_ddp)"
)
STAND_INS = (
    "its rotations are not the parameters of a prepared layer, but stand-ins (gathered by FSDP, or "
    "given to torch.func.functional_call)"
)

_cache: Any = registry.cache()


class Cached(NamedTuple):
    """Folded weights, and what they were made of."""

    recipe: str
    gradients: bool
    made_of: Snapshot
    weights: Sequence[Tensor]

    @classmethod
    def of(cls, recipe: str, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Cached:
        """`weights` as `recipe` makes them of `tensors`, now."""
        return cls(recipe, torch.is_grad_enabled(), Snapshot(tensors), weights)

    def are_those_of(self, recipe: str, tensors: Sequence[Tensor]) -> bool:
        """Whether `recipe` would give the same again."""
        return (
            self.recipe == recipe
            and self.gradients == torch.is_grad_enabled()
            and self.made_of.holds(tensors)
        )


def _unseen(skews: Sequence[Any], others: Sequence[Any]) -> str | None:
    """Why a change of one of these tensors could go unseen; ``None`` where none could."""
    for tensor in (*skews, *others):
        if is_fake(tensor):
            return NO_VALUES
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"it reads a {type(tensor).__name__}, whose values may change unseen"
        if tensor.is_inference():
            return "it reads a tensor made in inference mode, which counts no versions"
    own = all(registry.with_rotation(skew) is not None for skew in skews)
    return None if own else STAND_INS


def forget() -> None:
    """Empty the fold cache of this process: the next call of each model folds again."""
    _cache.clear()


class FoldCache:
    """Folds of one compiled graph that outlive its calls: binds the pass to the graph's inputs.

    Each instance of a model has a set of weights of its own, since instances may share compiled
    code, and no more than one: another graph of the same layers (other shapes, another mode) takes
    it over where its folds are the same, and replaces it where they are not.

    Args:
        gm: Dynamo's graph.
        example_inputs: what it was compiled for.
        cuda_graphs: whether it will be captured.
        compile_folds: compiles the graph of the folds, which takes no gradients.
        cache: where the weights go; the cache of the process by default.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        cuda_graphs: bool,
        compile_folds: Compiler,
        cache: Any = None,
    ):
        self.inputs = example_inputs
        self.cuda_graphs = cuda_graphs
        self.compile_folds = compile_folds
        self.cache = _cache if cache is None else cache
        self.under_fsdp = graphs.fsdp_inputs(gm)
        self.graph_pass = HoistFolds(self._refuse)

    def _refuse(self, reads: Reads) -> str | None:
        if self.cuda_graphs:
            return CUDA_GRAPHS
        if max(reads.all) >= len(self.inputs):
            return ADOPTED
        if not self.under_fsdp.isdisjoint(reads.all):
            return FSDP
        return _unseen(*([self.inputs[i] for i in part] for part in reads))

    def extra_inputs(self) -> list[Tensor]:
        """Stand-ins for the weights, to compile the graph with."""
        assert self.graph_pass.module is not None
        (folds,) = self.graph_pass.module.graph.find_nodes(op="output")[0].args
        values = [fold.meta[graphs.VALUE] for fold in folds]
        mode = detect_fake_mode(self.inputs)
        with mode or contextlib.nullcontext():
            return [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in values]

    def bind(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled` with its folded weights, folded again at a call where they have changed."""
        module, reads, cache = self.graph_pass.module, self.graph_pass.reads, self.cache
        assert module is not None
        recipe, positions = module.code, sorted(reads.all)
        # Not in Dynamo's context: these inputs have constant sizes, and nothing to guard.
        with tracing(None), torch.no_grad():
            # Stand-ins: compiling leaves weak references, with which torch swaps no parameter.
            fold = self.compile_folds(module, [self.inputs[i].detach() for i in positions])
        del self.inputs, self.graph_pass  # neither inputs nor graphs are kept alive

        def weights_of(args: Sequence[Any]) -> Sequence[Tensor]:
            tensors = [args[i] for i in positions]
            layer = registry.with_rotation(args[reads.skews[0]])
            found = None if layer is None else cache.get(layer)
            if found is not None and found.are_those_of(recipe, tensors):
                return found.weights
            del found
            if layer is not None:
                cache.pop(layer, None)  # the old weights go before the new ones come
            # A backward could not use inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                weights = fold(*tensors)
            # Another instance that shares this code may be one to fold for at each call.
            if layer is not None and not _unseen(*([args[i] for i in part] for part in reads)):
                cache[layer] = Cached.of(recipe, tensors, weights)
            return weights

        return lambda *args: compiled(*args, *weights_of(args))
