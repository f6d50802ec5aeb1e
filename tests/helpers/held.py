"""What autograd really holds between the forward and the backward of compiled code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import poetx_compile as poetx
from poetx_compile.compile.options import BackendOptions
from poetx_compile.compile.partition import partitioner_for
from poetx_compile.compile.rewrite import rewrite


def kept(model: nn.Module, x: Tensor, **options: object) -> int:
    """Bytes autograd holds after a compiled forward, without parameters, buffers and input."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step(x: Tensor) -> Tensor:
        return model(x).square().mean()

    backend = poetx.poetx_backend if options else "aot_eager_decomp_partition"
    compiled = torch.compile(step, backend=backend, options=options or None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compiled(x)
    for tensor in (*model.parameters(), *model.buffers(), x, loss):
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(held.values())


def saved_activations(model: nn.Module, x: Tensor, variant: str) -> list[tuple[str, tuple]]:
    """(op, shape) of each value the forward hands to the backward, graph inputs left out."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    saved: list[tuple[str, tuple]] = []

    def backend(gm, inputs):
        made = rewrite(gm, inputs, BackendOptions(config={"variant": variant}))

        def forward(module, _):
            (results,) = module.graph.find_nodes(op="output")[0].args
            saved.extend(
                (str(n.target), tuple(n.meta["val"].shape))
                for n in results[1:]
                if n.op != "placeholder"
            )
            return module.forward

        compiled = aot_autograd(
            fw_compiler=forward,
            bw_compiler=lambda module, _: module.forward,
            partition_fn=partitioner_for(poetx.POETXConfig(variant=variant))
            or min_cut_rematerialization_partition,
        )(made.graph, [*inputs, *made.inputs])
        return made.bind(compiled)

    torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    return saved
