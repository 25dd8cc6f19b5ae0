"""The training loop: steps, evaluation, metrics and progress."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch

from frugal_dist.training.data import Batches
from frugal_dist.training.engines import Engine
from frugal_dist.training.evaluate import Validation
from frugal_dist.training.metrics import MetricsLog
from frugal_dist.training.progress import Progress


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
    progress: Progress
    steps: int
    evaluate_every: int
    log_every: int = 10
    _loss_sum: float | torch.Tensor = field(default=0.0, init=False)
    _loss_count: int = field(default=0, init=False)
    _busy: float = field(default=0.0, init=False)

    def run(self) -> Outcome:
        """Train all steps, evaluating at the start, at the end and in between."""
        start = time.monotonic()
        first = last = self._evaluate(0)
        self.progress.start()
        for done in range(1, self.steps + 1):
            self._train_step(done - 1)
            self.progress.step()
            if done % self.log_every == 0 or done == self.steps:
                self._log(done)
            if done % self.evaluate_every == 0 or done == self.steps:
                last = self._evaluate(done)
        return Outcome(self.steps, self._tokens(self.steps), time.monotonic() - start, first, last)

    def _train_step(self, index: int) -> None:
        begin = time.monotonic()
        rows = torch.from_numpy(self.batches.share(index, self.engine.rank, self.engine.world))
        self._loss_sum = self._loss_sum + self.engine.train_step(rows)
        self._loss_count += 1
        self._busy += time.monotonic() - begin

    def _log(self, done: int) -> None:
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
        self.progress.figures(loss, speed)
        self._loss_sum, self._loss_count, self._busy = 0.0, 0, 0.0

    def _evaluate(self, done: int) -> float:
        loss = self.validation.loss(self.engine)
        perplexity = math.exp(loss)
        self.metrics.write("validation", step=done, tokens=self._tokens(done), loss=loss, perplexity=perplexity)
        self.progress.say(f"step {done:>5}/{self.steps}: validation perplexity {perplexity:,.1f}")
        return loss

    def _tokens(self, steps: int) -> int:
        return steps * self.batches.batch_size * self.batches.rows.length
