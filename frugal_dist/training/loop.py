"""The training loop: steps, evaluation, metrics and a progress bar."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TextIO

import torch
from tqdm import tqdm

from frugal_dist.training.data import Batches
from frugal_dist.training.engines import Engine
from frugal_dist.training.evaluate import Validation
from frugal_dist.training.metrics import MetricsLog

_BAR = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left{postfix}"


@dataclass(frozen=True)
class Outcome:
    """What came out of a training."""

    steps: int
    tokens: int
    seconds: float
    first_loss: float
    last_loss: float


@dataclass
class Training:
    """One training run of a given number of steps, on one rank."""

    engine: Engine
    batches: Batches
    validation: Validation
    metrics: MetricsLog
    terminal: TextIO
    steps: int
    evaluations: int = 5
    log_every: int = 10
    _loss_sum: float | torch.Tensor = field(default=0.0, init=False)
    _loss_count: int = field(default=0, init=False)
    _busy: float = field(default=0.0, init=False)

    def run(self) -> Outcome:
        """Train all steps, evaluating at the start, at the end and in between."""
        start = time.monotonic()
        due = {round(part * self.steps / self.evaluations) for part in range(1, self.evaluations + 1)}
        first = last = self._evaluate(0)
        with self._progress_bar() as bar:
            for index in range(self.steps):
                self._train_step(index)
                done = index + 1
                if done % self.log_every == 0 or done == self.steps:
                    self._log(done, bar)
                bar.update()
                if done in due:
                    last = self._evaluate(done)
        return Outcome(self.steps, self._tokens(self.steps), time.monotonic() - start, first, last)

    def _train_step(self, index: int) -> None:
        begin = time.monotonic()
        rows = torch.from_numpy(self.batches.share(index, self.engine.rank, self.engine.world))
        self._loss_sum = self._loss_sum + self.engine.train_step(rows)
        self._loss_count += 1
        self._busy += time.monotonic() - begin

    def _log(self, done: int, bar: tqdm[None]) -> None:
        """Write the mean over the steps since the last record."""
        begin = time.monotonic()
        loss = self.engine.total([float(self._loss_sum)])[0] / (self._loss_count * self.engine.world)
        self._busy += time.monotonic() - begin  # on a GPU the steps' work is waited for here
        speed = self._tokens(self._loss_count) / self._busy
        self.metrics.write(
            "train",
            step=done,
            tokens=self._tokens(done),
            loss=loss,
            learning_rate=self.engine.learning_rate(),
            gradient_norm=self.engine.gradient_norm(),
            tokens_per_second=round(speed, 1),
        )
        if not math.isfinite(loss):
            raise ValueError(f"the training loss is {loss} at step {done}; lower lr or lengthen the warm-up.")
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self._loss_sum, self._loss_count, self._busy = 0.0, 0, 0.0

    def _evaluate(self, done: int) -> float:
        loss = self.validation.loss(self.engine)
        self.metrics.write("validation", step=done, tokens=self._tokens(done), loss=loss, perplexity=math.exp(loss))
        if self.engine.rank == 0:
            tqdm.write(f"step {done:>5}: validation perplexity {math.exp(loss):,.1f}", file=self.terminal)
        return loss

    def _tokens(self, steps: int) -> int:
        return steps * self.batches.batch_size * self.batches.rows.length

    def _progress_bar(self) -> tqdm[None]:
        interval = 0.5 if self.terminal.isatty() else 15.0  # a log file wants few lines
        return tqdm(
            total=self.steps,
            file=self.terminal,
            disable=self.engine.rank != 0,
            mininterval=interval,
            maxinterval=interval,
            bar_format=_BAR,
            dynamic_ncols=True,
        )
