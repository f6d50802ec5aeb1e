"""Singular values of a few weights at the start, in the middle and at the end of a run."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.rows import Row

WATCHED = ("self_attn.q_proj", "mlp.down_proj")
"""Of the layer in the middle."""

POINTS = 33


class Spectra:
    """The spectra of the watched weights of `model`, a `Llama`."""

    def __init__(self, model: nn.Module):
        middle = len(model.layers) // 2  # type: ignore[arg-type]
        names = [f"layers.{middle}.{name}" for name in WATCHED]
        self.layers = {name: model.get_submodule(name) for name in names}
        self.taken: dict[str, dict[str, list[float]]] = {name: {} for name in names}

    @torch.no_grad()
    def take(self, when: str) -> None:
        """Compute the singular values now; none of a weight that is not finite."""
        for name, layer in self.layers.items():
            weight = layer.weight.detach().float()  # type: ignore[operator]
            if weight.isfinite().all():
                self.taken[name][when] = torch.linalg.svdvals(weight).tolist()

    def row(self) -> Row:
        """For each weight: some quantiles, descending, and how far all values moved, in %."""
        rows: Row = {}
        for name, taken in self.taken.items():
            rows[name] = {when: _quantiles(values) for when, values in taken.items()}
            pairs = list(zip(taken["start"], taken["end"], strict=True))
            rows[name]["drift"] = 100 * sum(abs(a - b) for a, b in pairs) / sum(taken["start"])
        return rows


def _quantiles(values: list[float]) -> list[float]:
    last = len(values) - 1
    return [float(f"{values[round(i * last / (POINTS - 1))]:.4g}") for i in range(POINTS)]
