"""The ops of namespace ``poetx``: each defined once, with reference, fake, autograd and checks.

==========================  =====================================================================
``orthogonal_equivalence``  the effective weight ``R W₀ P`` (weight-centric; what eager runs)
``cayley_neumann``          packed skew parameters → rotations, by the Cayley-Neumann expansion
``cayley_exact``            packed skew parameters → rotations, by a batched solve
``rotate_blocks``           block-diagonal product, columns gathered before and scattered after
``block_product``           blocks of ``Xᵀ Y``: the gradient of a rotation
``permute_columns``         one gather of the columns, its backward the inverse gather
==========================  =====================================================================

Ops know tensors and nothing of graphs. The implementation is chosen by the device of the arguments:
a kernel of `poetx_compile.ops.kernels` where one applies, the reference everywhere else.
"""

from __future__ import annotations

from poetx_compile.ops.block_product import block_product
from poetx_compile.ops.cayley import cayley_exact, cayley_neumann, rotations
from poetx_compile.ops.orthogonal_equivalence import orthogonal_equivalence
from poetx_compile.ops.permute import permute_columns
from poetx_compile.ops.rotate import rotate_blocks

__all__ = [
    "block_product",
    "cayley_exact",
    "cayley_neumann",
    "orthogonal_equivalence",
    "permute_columns",
    "rotate_blocks",
    "rotations",
]
