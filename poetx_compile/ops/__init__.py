"""The ops of namespace ``poetx``: each defined once, with reference, fake, autograd and checks.

==========================  =====================================================================
``orthogonal_equivalence``  the effective weight ``R W₀ P`` (weight-centric; what eager runs)
``identity_equivalence``    the same where the rotations are the identity: the weight itself
``cayley_neumann``          packed skew parameters → rotations, by the Cayley-Neumann expansion
``cayley_exact``            packed skew parameters → rotations, by a batched solve
``rotation_delta``          packed skew parameters → G − I, rounded: what is folded into a weight
``rotation_tangent``        zeros that carry the gradient of a rotation folded into a weight
``dequantize``              a weight from int8 and its scales
``fold_weight``             the effective weight from given rotations, for the folded formulation
``folded_linear``           linear over such a weight; its backward gives the rotations' gradients
``merged_linear``           linear over a weight whose rotations are the identity, the same way
``rotate_blocks``           block-diagonal product, columns gathered before and scattered after
``rotate_by_delta``         the same by G − I that is rounded already
``block_product``           blocks of ``Xᵀ Y``: the gradient of a rotation
``stacked_block_products``  two of them over the same tokens: the gradients of both sides at once
``skew_block_products``     the gradients of rotations at the identity, packed
``orthogonalize_skew``      the direction of a step of `POETXMuon`, packed
``requantize_``             an int8 weight after its values have changed, in place
``turn_weight_``            a step of the rotations of a weight in its natural order, in place
``permute_columns``         one gather of the columns, its backward the inverse gather
==========================  =====================================================================

Ops know tensors and nothing of graphs. The implementation is chosen by the device of the arguments:
a kernel of `poetx_compile.ops.kernels` where one applies, the reference everywhere else. Each op is
defined in a module of its own, by `registry.define`; what others ask about it is in `OPS`.
"""

from __future__ import annotations

from poetx_compile.ops.block_product import block_product
from poetx_compile.ops.cayley import cayley_exact, cayley_neumann, rotations
from poetx_compile.ops.dequantize import dequantize
from poetx_compile.ops.fold import fold_weight
from poetx_compile.ops.folded_linear import folded_linear
from poetx_compile.ops.identity_equivalence import identity_equivalence
from poetx_compile.ops.merged_linear import merged_linear
from poetx_compile.ops.orthogonal_equivalence import orthogonal_equivalence
from poetx_compile.ops.orthogonalize import orthogonalize_skew
from poetx_compile.ops.permute import permute_columns
from poetx_compile.ops.registry import OPS
from poetx_compile.ops.requantize import requantize_
from poetx_compile.ops.rotate import rotate_blocks
from poetx_compile.ops.rotate_by_delta import rotate_by_delta
from poetx_compile.ops.rotation_delta import rotation_delta
from poetx_compile.ops.skew_block_products import skew_block_products
from poetx_compile.ops.stacked_block_products import stacked_block_products
from poetx_compile.ops.tangent import rotation_tangent
from poetx_compile.ops.turn_weight import turn_weight_

__all__ = [
    "OPS",
    "block_product",
    "cayley_exact",
    "cayley_neumann",
    "dequantize",
    "fold_weight",
    "folded_linear",
    "identity_equivalence",
    "merged_linear",
    "orthogonal_equivalence",
    "orthogonalize_skew",
    "permute_columns",
    "requantize_",
    "rotate_blocks",
    "rotate_by_delta",
    "rotation_delta",
    "rotation_tangent",
    "rotations",
    "skew_block_products",
    "stacked_block_products",
    "turn_weight_",
]
