"""Optimisers that train the rotations and merge them, and the parts to make one of any other."""

from __future__ import annotations

from poetx_compile.optim import watch as _watch  # noqa: F401 (looks at optimisers' steps)
from poetx_compile.optim.adamw import POETXAdamW
from poetx_compile.optim.clipping import clip_grad_norm_
from poetx_compile.optim.groups import param_groups
from poetx_compile.optim.muon import POETXMuon
from poetx_compile.optim.schedule import MergeSchedule, attach
from poetx_compile.optim.takeover import adopt

__all__ = [
    "MergeSchedule",
    "POETXAdamW",
    "POETXMuon",
    "adopt",
    "attach",
    "clip_grad_norm_",
    "param_groups",
]
