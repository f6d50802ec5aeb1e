"""What Inductor is told about the ops of namespace ``poetx``.

The ops stay opaque through AOTAutograd, so that the partitioner sees one node with a packed input
and saves nothing else. After partitioning `ExpandOps`, an Inductor ``post_grad_custom_pre_pass``,
replaces each of them by its reference as aten nodes, which Inductor fuses. Where a Triton kernel
applies the op stays until Inductor lowers the graph; its lowering (`launches`) becomes the kernel's
launches.
"""

from __future__ import annotations

from poetx_compile.compile.lowerings.chain import chain_passes
from poetx_compile.compile.lowerings.expand import ExpandOps
from poetx_compile.compile.lowerings.identity import source_digest
from poetx_compile.compile.lowerings.inner import compile_inner
from poetx_compile.compile.lowerings.launches import register

__all__ = ["ExpandOps", "chain_passes", "compile_inner", "register", "source_digest"]
