"""What `prepare` does to the weights of a model that is trained from scratch (`POETXConfig.init`).

Rotations keep the singular values of a weight, so its initialisation sets them for the whole run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from poetx_compile.config import POETXConfig
from poetx_compile.errors import ConfigError
from poetx_compile.layers.eligibility import has_values
from poetx_compile.ops.precision import rotation_dtype

EPS = torch.finfo(torch.float32).eps


def check_values(weights: dict[str, Tensor], config: POETXConfig) -> None:
    """Raise `ConfigError` where a weight, by name, has no values to start from."""
    asked = f"init={config.init!r}, init_scale={config.init_scale:g}"
    for name, weight in weights.items():
        if weight.is_meta:
            raise ConfigError(
                f"{asked}: this needs the values of the weights, and {name or 'the weight'} is on "
                "the meta device: give the model memory and values first, then call prepare"
            )
        if has_values(weight) and not weight.detach().isfinite().all():
            raise ConfigError(
                f"{asked}: the weight of {name or 'the model'} has values that are not finite: "
                "give it values first (reset_parameters), then call prepare"
            )


def described(config: POETXConfig) -> str:
    """What is done to a weight, for the report."""
    parts = {
        "keep": "",
        "rows": "rows normalised",
        "spectrum": f"singular values a series 1 to {config.init_range:g}",
    }
    times = "" if config.init_scale == 1 else f"times {config.init_scale:g}"
    return ", ".join(filter(None, (parts[config.init], times)))


@torch.no_grad()
def initialise(weight: Tensor, config: POETXConfig) -> None:
    """Change a weight [n, m] in place, as `config.init` and `config.init_scale` say.

    A row of zeros stays one, and so does the rank. Processes need not get the same bits: DDP sends
    what rank 0 has, and FSDP2 takes a part of it from each.
    """
    if not config.initialises or not has_values(weight):  # those of a fake mode are only counted
        return
    if config.init == "rows":
        new = weight.double()
        new = new / new.norm(dim=1, keepdim=True).clamp_min(EPS)
    elif config.init == "spectrum":
        new = with_spectrum(weight, config.init_range)
    else:
        new = weight.double()
    weight.copy_(new * config.init_scale)


def with_spectrum(weight: Tensor, smallest: float) -> Tensor:
    """The weight [n, m] with other singular values, in float64.

    They are a geometric series; `smallest` is the ratio of the last to the first, and the Frobenius
    norm is √n, that of normalised rows. Singular values of zero stay zero.
    """
    n, m = weight.shape
    dtype = rotation_dtype(weight.dtype)
    u, s, vt = torch.linalg.svd(weight.to(dtype), full_matrices=False)
    rank = int((s > s[0] * max(n, m) * torch.finfo(dtype).eps).sum())
    powers = torch.linspace(0, 1, rank, dtype=torch.float64, device=weight.device)
    series = smallest**powers
    series *= math.sqrt(n) / series.norm()
    # In float64: products in fp32 may run in TF32.
    return (u[:, :rank].double() * series) @ vt[:rank].double()
