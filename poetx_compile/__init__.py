"""poetx-compile: train unmodified PyTorch models with POET-X (arXiv 2603.05500).

>>> import poetx_compile as poetx
>>> model = torch.compile(model, backend=poetx.poetx_backend)
>>> optimizer = poetx.POETXMuon(model, lr=3e-3)
"""

from __future__ import annotations

__version__ = "0.1.0"

from poetx_compile import dense, ops
from poetx_compile.backend import poetx_backend
from poetx_compile.checkpoint import load_checkpoint, save_checkpoint
from poetx_compile.config import POETXConfig
from poetx_compile.diagnostics import diagnostics
from poetx_compile.estimate import estimate
from poetx_compile.explain import explain
from poetx_compile.export import plain_state_dict
from poetx_compile.fsdp import fully_shard_rotations
from poetx_compile.optim import (
    POETXAdamW,
    POETXMuon,
    adopt,
    attach,
    clip_grad_norm_,
    param_groups,
)
from poetx_compile.prepare import merge_and_unload, prepare

dense.watch()

__all__ = [
    "POETXAdamW",
    "POETXConfig",
    "POETXMuon",
    "adopt",
    "attach",
    "clip_grad_norm_",
    "diagnostics",
    "estimate",
    "explain",
    "fully_shard_rotations",
    "load_checkpoint",
    "merge_and_unload",
    "ops",
    "param_groups",
    "plain_state_dict",
    "poetx_backend",
    "prepare",
    "save_checkpoint",
]
