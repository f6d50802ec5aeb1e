"""Optimisers that train the rotations and merge them, and the parts to make one of any other."""

from __future__ import annotations

from poetx_compile.optim.adamw import POETXAdamW
from poetx_compile.optim.groups import param_groups
from poetx_compile.optim.muon import POETXMuon
from poetx_compile.optim.schedule import MergeSchedule, attach

__all__ = ["MergeSchedule", "POETXAdamW", "POETXMuon", "attach", "param_groups"]
