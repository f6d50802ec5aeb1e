"""The training loop: the same for every method."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pretraining.batches import TrainBatches, validation_batches
from pretraining.corpus import Corpus
from pretraining.failure import RunError
from pretraining.methods import Method
from pretraining.metrics import MetricsFile, Row, peak_memory_mib
from pretraining.options import Options
from pretraining.processes import Processes, gathered, load
from pretraining.schedule import lr_factor


class Training:
    """A run in memory: what it trains, how far it is, and how fast.

    Attributes:
        step: optimiser steps done.
        val_loss: the last validation loss, in nats per byte.
    """

    def __init__(
        self,
        options: Options,
        method: Method,
        corpus: Corpus,
        device: torch.device,
        *,
        autocast: bool,
        group: Processes | None = None,
    ):
        self.options, self.method, self.corpus = options, method, corpus
        self.device, self.autocast = device, autocast
        self.group = group or Processes()
        self.part = self.group.part(options.batch_size)
        self.batches = TrainBatches(
            corpus.train, options.seq_len, options.batch_size, options.seed, part=self.part
        )
        self.peak_lr = [float(group["lr"]) for group in method.optimizer.param_groups]
        self.trained = [p for p in method.model.parameters() if p.requires_grad]
        self.step, self.val_loss = 0, math.nan
        self._tokens, self._seconds = 0, 0.0
        self._bytes = 0

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second of this process, without compilation and evaluation."""
        return self._tokens / self._seconds if self._seconds else math.nan

    def state(self) -> dict[str, Any]:
        """Everything the run needs to continue, beside the generators' state.

        The same whatever the number of processes; in all but the first, parts may be missing.
        """
        state = {
            "step": self.step,
            "position": self.batches.position,
            "corpus": self.corpus.fingerprint,
            "model": dict(self.method.model.state_dict()),
            "optimizer": self.method.optimizer.state_dict(),
        }
        return gathered(state, self.group)

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; raises `RunError` where it does not fit this run."""
        if state["corpus"] != self.corpus.fingerprint:
            raise RunError("the data is not the data that the run was started with")
        try:
            load(self.method.model, self.method.optimizer, state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise RunError(f"the checkpoint does not fit this model: {error}") from error
        self.step, self.batches.position = state["step"], state["position"]

    def compile(self) -> float:
        """Run forward and backward once, so that no training step pays for it; seconds taken."""
        begun = time.perf_counter()
        position = self.batches.position
        self._loss(*self.batches.next()).backward()
        self.batches.position = position
        self.method.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        return time.perf_counter() - begun

    def run(self, metrics: MetricsFile | None, save: Callable[[], None]) -> bool:
        """Train to the last step; False where the user interrupted it (the state is saved)."""
        bar = tqdm(
            disable=not self.group.is_first,
            total=self.options.steps,
            initial=self.step,
            unit="step",
            file=sys.stderr,
            desc=self.method.label,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        with bar, stop_request(self.group) as stopped:
            stopping = False
            while self.step < self.options.steps and not stopping:
                row = self._window(bar, stopped)
                if metrics is not None:
                    metrics.append(row)
                if row.loss is None or not math.isfinite(row.loss):
                    raise RunError(
                        f"the loss is not finite at step {self.step}: use a smaller --lr"
                    )
                stopping = stopped()  # asked once: what stops the run is saved
                if stopping or self._is_due("save_every"):
                    save()
        return self.step == self.options.steps

    @torch.no_grad()
    def evaluate(self) -> float:
        """Validation loss in nats per byte, over the same windows every time.

        The plain module runs, not the compiled one: a graph without gradients would cost a second
        compilation, longer than all evaluations of a short run.
        """
        o = self.options
        pairs = validation_batches(
            self.corpus.validation, o.seq_len, o.batch_size, o.eval_batches, self.part
        )
        losses, tokens, count = [], 0, 0
        with torch.compiler.set_stance("force_eager"):  # blocks may be compiled in place
            for pair in pairs:
                losses.append(self._loss(*pair, forward=self.method.model))
                tokens, count = tokens + pair[1].numel(), count + self.corpus.bytes_in(pair[1])
        loss = self.group.mean(torch.stack(losses).double().mean())
        return loss * tokens / self._share_of(count)

    def _window(self, bar: tqdm, stopped: Callable[[], bool]) -> Row:
        """The steps up to the next row of metrics.jsonl."""
        losses: list[Tensor] = []
        self._bytes = 0
        begun = time.perf_counter()
        while True:
            losses.append(self._step())
            bar.update()
            due = any(map(self._is_due, ("log_every", "eval_every", "save_every")))
            if due or stopped():
                break
        loss = self.group.mean(torch.stack(losses).double().mean())  # waits for the device
        seconds = time.perf_counter() - begun
        tokens = len(losses) * self.options.batch_size * self.options.seq_len
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        per_byte = loss * tokens / self.group.count / self._share_of(self._bytes)
        lr = self.method.learning_rates()
        peak = peak_memory_mib(self.device, replayed=self.options.cuda_graphs)
        bar.set_postfix_str(
            f"loss {loss:.3f}, lr {' '.join(f'{v:.1e}' for v in lr.values())}, "
            f"{tokens / seconds:,.0f} tok/s, peak {peak / 1024:.2f} GiB"
        )
        angle = error = val_loss = None
        if self._is_due("eval_every"):
            self.val_loss = val_loss = self.evaluate()
            angle, error = self.method.angle_and_error(not self.options.no_figures)
        return Row(
            step=self.step,
            loss=per_byte,
            loss_per_token=loss,
            val_loss=val_loss,
            lr=lr,
            tokens_per_s=tokens / seconds,
            peak_memory_mib=peak,
            last_merge=self.method.last_merge,
            max_angle=angle,
            orthogonality_error=error,
        )

    def _step(self) -> Tensor:
        """One optimiser step; the loss as a tensor, so that the device is not waited for."""
        optimizer, o = self.method.optimizer, self.options
        factor = lr_factor(self.step, o.steps, o.warmup_steps)
        for group, peak in zip(optimizer.param_groups, self.peak_lr, strict=True):
            group["lr"] = peak * factor
        tokens, targets = self.batches.next()
        self._bytes += self.corpus.bytes_in(targets)
        loss = self._loss(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, o.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach().clone()  # the next replay of a CUDA graph writes there again

    def _share_of(self, count: int) -> float:
        """The mean of a count over the processes."""
        return self.group.mean(torch.tensor(count)) if self.group.several else count

    def _loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        forward: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        tokens = tokens.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return (forward or self.method.forward)(tokens, targets)

    def _is_due(self, option: str) -> bool:
        return self.step % getattr(self.options, option) == 0 or self.step == self.options.steps


@contextmanager
def stop_request(group: Processes) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C asks for a stop after the step; the second one interrupts.

    Of several processes all stop after the same step. There torchrun hands each signal on once
    more, and SIGTERM as well, so that only the first counts.
    """
    requested = False

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        nonlocal requested
        if requested and not group.several:
            raise KeyboardInterrupt
        requested = True

    signals = [signal.SIGINT, signal.SIGTERM] if group.several else [signal.SIGINT]
    previous = {number: signal.signal(number, on_interrupt) for number in signals}
    stopping = False

    def stopped() -> bool:
        nonlocal stopping
        stopping = stopping or group.any(requested)
        return stopping

    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
