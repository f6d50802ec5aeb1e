"""How a weight drifts that is turned in every step (``merge_interval=1``), by how it is rounded.

A random weight takes steps of random orthogonalised momenta, as `POETXMuon` would make them. Exact
rotations keep singular values; rounding after each of them adds up. Rows say how far the Frobenius
norm and the singular values have moved by then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import poetx_compile as poetx
from benchmarks import options
from benchmarks.rows import Row, environment, line, result_path, table, write
from poetx_compile import ops
from poetx_compile.layers.permutation import draw_permutation
from poetx_compile.layers.sides import side_blocks
from poetx_compile.ops.packing import packed_size
from poetx_compile.optim.turning import NORM_EVERY

COLUMNS = (
    "rounding", "every", "rate", "steps", "norm_drift", "mean_drift", "smallest", "middle",
    "largest", "ms",
)  # fmt: skip

ALONE = "stochastic alone"
ROUNDINGS = ("float32", "nearest", ALONE, "stochastic")
"""The last is what is done: every `NORM_EVERY` steps the norm is put right."""
MOMENTUM = 0.95


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run all ways of rounding; returns the rows.

    ``norm_drift`` is the relative change of the norm, ``mean_drift`` the mean change of singular
    values relative to their mean; ``smallest``, ``middle`` and ``largest`` are the ratios of these
    singular values to what they were, each the mean of a hundredth of all.
    """
    parser = options.parser("drift", __doc__)
    add = parser.add_argument
    add("--shape", type=options.shape, default=(4096, 4096), help="in x out")
    add("--block-size", type=options.positive, default=256)
    add("--rates", type=options.list_of(float), default=(2e-3, 6e-3), help="growth of θ in a step")
    add("--steps", type=options.list_of(options.positive), default=(1000, 10_000))
    add("--every", type=options.list_of(options.positive), default=(1,), help="steps a merge")
    add("--roundings", type=options.list_of(str), default=ROUNDINGS)
    args = parser.parse_args(arguments)
    device = options.pick_device(args.device)
    constants = environment(device, torch.bfloat16) | {"poetx_compile": poetx.__version__}
    path = result_path(args.output, args.name, constants["gpu"])
    rows: list[Row] = []
    for rate in args.rates:
        for rounding in args.roundings:
            for every in args.every:
                weight = Weight(args.shape, args.block_size, rounding, args.seed, device)
                for found in weight.run(rate, every, args.steps):
                    rows.append(constants | found)
                    write(path, rows)
                    print(line(rows[-1], COLUMNS), flush=True)
    print(f"{table(rows, COLUMNS)}\n\n{len(rows)} rows in {path}")
    return rows


class Weight:
    """A random weight and the momenta of both of its sides."""

    def __init__(
        self, shape: tuple[int, int], b: int, rounding: str, seed: int, device: torch.device
    ):
        m, n = shape
        self.shape, self.rounding, self.seed = shape, rounding, seed
        self.generator = torch.Generator(device).manual_seed(seed)
        weight = torch.randn(n, m, generator=self.generator, device=device) / m**0.5
        self.weight = weight if rounding == "float32" else weight.bfloat16()
        self.norm = self.weight.float().norm()
        self.pairs, self.blocks, self.momenta = [], [], []
        for group, size in enumerate(shape):
            count, block = side_blocks(size, b)
            pair = draw_permutation(size, seed=seed, draw=1, group=group, kind="chunked", block=b)
            self.pairs.append(pair.to(device))
            self.blocks.append(block)
            self.momenta.append(torch.zeros(count, packed_size(block), device=device))

    def run(self, rate: float, every: int, reports: Sequence[int]) -> Iterator[Row]:
        """Take steps; a row at each number of steps in `reports`."""
        before = self.spectrum()
        sums = [torch.zeros_like(m) for m in self.momenta]
        started = time.perf_counter()
        for step in range(1, max(reports) + 1):
            for total, direction in zip(sums, self.directions(), strict=True):
                total.sub_(direction, alpha=rate)
            if step % every == 0:
                self.turn(sums, step)
                for total in sums:
                    total.zero_()
            if step in reports:
                self.weight.sum().item()
                seconds = time.perf_counter() - started
                yield {
                    "rounding": self.rounding,
                    "every": every,
                    "rate": rate,
                    "steps": step,
                    "shape": list(self.shape),
                    "block_size": self.blocks,
                    "ms": 1000 * seconds / step,
                    **self.compare(before),
                }

    def directions(self) -> Iterator[Tensor]:
        """The next orthogonalised momentum of each side, packed."""
        for momentum, b in zip(self.momenta, self.blocks, strict=True):
            noise = torch.empty_like(momentum).normal_(generator=self.generator)
            momentum.lerp_(noise, 1 - MOMENTUM)
            yield ops.orthogonalize_skew(momentum, b)

    def turn(self, steps: Sequence[Tensor], number: int) -> None:
        """Turn the weight, rounded in the way that is tried."""

        def turn(weight: Tensor, scale: Tensor | None = None) -> Tensor:
            given = *steps, *self.pairs, *self.blocks, 3, self.seed, number, 0, None, scale
            ops.turn_weight_(weight, *given)
            return weight

        if self.rounding == "nearest":
            self.weight.copy_(turn(self.weight.float()))
            return
        scale = None
        if self.rounding == "stochastic" and number % NORM_EVERY == 0:
            scale = self.norm / self.weight.float().norm()
        turn(self.weight, scale)

    def spectrum(self) -> Tensor:
        """Singular values, descending, float64."""
        return torch.linalg.svdvals(self.weight.double())

    def compare(self, before: Tensor) -> Row:
        """How far the singular values are from what they were."""
        now = self.spectrum()
        part = max(1, len(now) // 100)
        middle = (len(now) - part) // 2
        parts = {"smallest": slice(-part, None), "middle": slice(middle, middle + part)}
        parts["largest"] = slice(0, part)
        ratios = {k: (now[s].sum() / before[s].sum()).item() for k, s in parts.items()}
        return {
            "norm_drift": (now.norm() / before.norm() - 1).item(),
            "mean_drift": ((now - before).abs().sum() / before.sum()).item(),
            **ratios,
        }


if __name__ == "__main__":
    main()
