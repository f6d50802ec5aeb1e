"""poetx-compile: train unmodified PyTorch models with POET-X (arXiv 2603.05500).

>>> import poetx_compile as poetx
>>> model = torch.compile(model, backend=poetx.poetx_backend)
>>> optimizer = poetx.POETXMuon(model, lr=3e-3)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from poetx_compile import ops
from poetx_compile.config import POETXConfig
from poetx_compile.inspect.diagnostics import diagnostics
from poetx_compile.layers.prepare import merge_and_unload, prepare
from poetx_compile.layers.sharding import fully_shard_rotations
from poetx_compile.optim import (
    POETXAdamW,
    POETXMuon,
    adopt,
    attach,
    clip_grad_norm_,
    param_groups,
)
from poetx_compile.state.checkpoint import load_checkpoint, save_checkpoint
from poetx_compile.state.plain import plain_state_dict
from poetx_compile.state.pretrained import save_pretrained
from poetx_compile.version import __version__ as __version__

if TYPE_CHECKING:
    from poetx_compile.compile.backend import poetx_backend
    from poetx_compile.inspect.estimate import estimate
    from poetx_compile.inspect.explain import explain

_LATE = {
    "estimate": "inspect.estimate",
    "explain": "inspect.explain",
    "poetx_backend": "compile.backend",
}
"""What needs Dynamo, which takes as long to load as torch: loaded where it is first asked for."""

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
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
