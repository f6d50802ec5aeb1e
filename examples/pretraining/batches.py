"""Batches of windows of tokens, as a pure function of the seed and the position in the data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pretraining.failure import RunError


class TrainBatches:
    """Shuffled windows without replacement; every epoch has its own order and its own offset.

    The whole state is `position`: what is drawn follows from (seed, position), so a resumed run
    continues with exactly the tokens it would have seen.

    Args:
        data: integers [tokens].
        seq_len: tokens in a window; its targets are the same window moved by one token.
        batch_size: windows in a batch.
        seed: seed of the order; the global generators are not touched.
        position: number of windows already drawn, by all processes.
        part: the rows of each batch that this process gets; all of them by default.

    Raises:
        RunError: there is less than one window of data.
    """

    def __init__(
        self,
        data: Tensor,
        seq_len: int,
        batch_size: int,
        seed: int,
        position: int = 0,
        part: slice = slice(None),
    ):
        self.data, self.seq_len, self.batch_size, self.seed = data, seq_len, batch_size, seed
        self.position, self.part = position, part
        self.windows = window_count(data, seq_len, "train")
        self._epoch, self._order, self._offset = -1, torch.empty(0, dtype=torch.int64), 0

    def next(self) -> tuple[Tensor, Tensor]:
        """(tokens, targets), each int64 [batch_size, seq_len], or the rows of this process."""
        return windows_at(self.data, self.starts(), self.seq_len)

    def starts(self) -> list[int]:
        """Where the windows of the next batch begin."""
        starts = [self._start(self.position + i) for i in range(self.batch_size)[self.part]]
        self.position += self.batch_size
        return starts

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.windows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            slack = len(self.data) - 1 - self.windows * self.seq_len
            self._offset = int(torch.randint(slack + 1, (1,), generator=generator))
            self._order = torch.randperm(self.windows, generator=generator)
            self._epoch = epoch
        return self._offset + int(self._order[index]) * self.seq_len


def validation_batches(
    data: Tensor, seq_len: int, batch_size: int, count: int, part: slice = slice(None)
) -> Iterator[tuple[Tensor, Tensor]]:
    """At most `count` full batches of windows, evenly spaced over `data`: always the same ones.

    `part` takes some rows of each.

    Where `data` has less than one full batch of windows, the windows repeat, so that the shapes
    (and with them the compiled code) stay the same.
    """
    windows = window_count(data, seq_len, "validation")
    count = max(1, min(count, windows // batch_size))
    wanted = count * batch_size
    picks = [i * windows // wanted for i in range(wanted)]
    for start in range(0, wanted, batch_size):
        starts = [pick * seq_len for pick in picks[start : start + batch_size][part]]
        yield windows_at(data, starts, seq_len)


def window_count(data: Tensor, seq_len: int, split: str) -> int:
    """How many windows of seq_len tokens and one further target `data` has."""
    count = (len(data) - 1) // seq_len
    if count < 1:
        raise RunError(
            f"the {split} split has {len(data)} tokens, one sequence needs {seq_len + 1}: "
            "give more data or a smaller --seq-len"
        )
    return count


def windows_at(data: Tensor, starts: list[int] | Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets) int64 [len(starts), seq_len] of the windows that begin at `starts`."""
    first = torch.as_tensor(starts, device=data.device)
    index = first[:, None] + torch.arange(seq_len + 1, device=data.device)
    window = data[index].long()
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()
