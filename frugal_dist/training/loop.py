"""The training loop: steps, evaluation, metrics, progress and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from frugal_dist.step.statistics import RefreshReport
from frugal_dist.training.data.batches import IGNORED, Source
from frugal_dist.training.engines import Engine
from frugal_dist.training.metrics.device import forget_peak, memory
from frugal_dist.training.metrics.progress import Progress
from frugal_dist.training.metrics.record import MetricsLog
from frugal_dist.training.validation import EvalResult, Evaluation


class Diverged(ValueError):
    """There is nothing left to train, after ``step`` in ``seconds``. All ranks raise it alike."""

    def __init__(self, text: str, step: int, seconds: float) -> None:
        super().__init__(text)
        self.step = step
        self.seconds = seconds


@dataclass(frozen=True)
class Outcome:
    """What came out of a training.

    ``steps`` are those done in all, in ``seconds``. Losses are NaN if nothing was evaluated. ``saved``: whether the
    last of the steps are in a checkpoint. ``finished``: all steps are done and evaluated; not if it was told to stop.
    """

    steps: int
    tokens: int
    seconds: float
    first_loss: float
    last_loss: float
    saved: bool = True
    finished: bool = True


@dataclass
class Training:
    """One training run of a given number of steps, on one rank.

    ``start``: steps done before, in ``seconds``, by a run that this one continues. ``save(step, seconds)`` writes a
    checkpoint and says whether that worked, every ``save_every`` steps (0: never), at the end and when told to stop;
    before an evaluation of the same step, which may take long, unless ``evaluated`` makes the checkpoint depend on it.
    ``stop()``: whether this rank was told to stop, by a signal. ``bad_steps``: so many steps in a row without a finite
    gradient end the run. ``flop_share``: the share of all devices' arithmetic that one token per second takes; 0: not
    known. ``evaluated(step, finding)`` hears of every evaluation. ``evaluate_first``: also before the first step.
    """

    engine: Engine
    batches: Source
    validation: Evaluation
    metrics: MetricsLog
    progress: Progress
    steps: int
    evaluate_every: int
    log_every: int = 10
    start: int = 0
    seconds: float = 0.0
    save: Callable[[int, float], bool] | None = None
    save_every: int = 0
    stop: Callable[[], bool] | None = None
    bad_steps: int = 10
    flop_share: float = 0.0
    evaluated: Callable[[int, EvalResult], None] | None = None
    evaluate_first: bool = True
    _loss_sum: float | torch.Tensor = field(default=0.0, init=False)
    _loss_count: int = field(default=0, init=False)
    _refreshes: list[list[float]] = field(default_factory=list, init=False)
    """This rank's sums of each step since ranks last added them up."""
    _steps_since: int = field(default=0, init=False)
    _busy: float = field(default=0.0, init=False)
    _skipped: int = field(default=0, init=False)
    _bad: int = field(default=0, init=False)
    _begin: float = field(default=0.0, init=False)
    _saved: tuple[int, bool] = field(default=(-1, True), init=False)
    _losses: tuple[float, float] = field(default=(math.nan, math.nan), init=False)

    def run(self) -> Outcome:
        """Train all steps, evaluating at the start, at the end and in between."""
        forget_peak()
        self._begin = time.monotonic() - self.seconds
        self._skipped = self.engine.skipped_steps()
        if self._begins_with_evaluation() and not self._evaluate(self.start):
            return self._outcome(self.start, finished=False)
        self.progress.start()
        for done in range(self.start + 1, self.steps + 1):
            stopping = self._timed_step(done - 1)
            self.progress.step()
            if done % self.log_every == 0 or done == self.steps:
                self._log(done)
            if stopping and done < self.steps:
                return self._outcome(done, finished=False)
            if self.evaluated is None and self._due(done, self.save_every):
                self._save(done)
            if self._due(done, self.evaluate_every) and not self._evaluate(done):
                return self._outcome(done, finished=False)
            if self._due(done, self.save_every):
                self._save(done)
        return self._outcome(self.steps)

    def _due(self, done: int, every: int) -> bool:
        return done == self.steps or bool(every and done % every == 0)

    def _begins_with_evaluation(self) -> bool:
        """Also when the run was stopped before it could evaluate the step that it resumes from."""
        if self.start == 0 or self.start == self.steps:
            return self.evaluate_first or self.start == self.steps
        known = self.engine.total([float(self.metrics.knows("validation", self.start))])[0] > 0
        return self._due(self.start, self.evaluate_every) and not known

    def _outcome(self, done: int, finished: bool = True) -> Outcome:
        saved = self._save(done) if finished or done > self.start else True  # nothing new since the start
        return Outcome(done, self._tokens(done), self._seconds(), *self._losses, saved, finished)

    def _timed_step(self, index: int) -> bool:
        """Whether any rank was told to stop: all must stop after the same step, on GPUs the one after the signal's.

        There this does not wait for the optimizer's part of the step.
        """
        begin = time.monotonic()
        self._train_step(index)
        stopping = self._must_stop()
        self._busy += time.monotonic() - begin
        return stopping

    def _train_step(self, index: int) -> None:
        rows, targets = self._rows(index)
        loss = self.engine.train_step(rows, targets)
        self._refreshes.append(self.engine.refresh_figures())
        self._steps_since += 1
        if not self._was_skipped(index + 1):  # a skipped step's loss may be NaN, and has taught the model nothing
            self._loss_sum = self._loss_sum + loss
            self._loss_count += 1

    def _rows(self, index: int) -> tuple[Tensor, float | None]:
        """This rank's rows of a batch, and targets of a rank on average where rows may be padded.

        If reading fails on one rank, all of them raise.
        """
        share, shares = self.engine.share, self.engine.shares
        if self.batches.full:
            return torch.from_numpy(self.batches.share(index, share, shares)), None
        rows, trouble = torch.empty(0, 1), None
        try:
            rows = torch.from_numpy(self.batches.share(index, share, shares))
        except Exception as error:  # the others must hear of it, whatever it is
            trouble = error
        targets = int((rows[:, 1:] != IGNORED).sum())
        failed, targets_of_all = self.engine.total([float(trouble is not None), float(targets)])
        if trouble is not None:
            raise trouble
        if failed:
            raise ValueError(
                f"the training data could not be read on {failed:.0f} other rank(s); their messages say why."
            )
        return rows, max(targets_of_all, 1.0) / self.engine.world

    def _was_skipped(self, done: int) -> bool:
        """Skipped steps are said at once, and end the run if there is no end to them. Ranks skip together."""
        skipped = self.engine.skipped_steps()
        self._bad = self._bad + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if not self._bad:
            return False
        norm = self.engine.gradient_norm()
        self.metrics.write("skipped", step=done, skipped=skipped, gradient_norm=_or_none(norm))
        self.progress.say(f"step {done:>5}/{self.steps}: skipped, its gradient has norm {norm:.3g}")
        if self._bad >= self.bad_steps:
            raise Diverged(
                f"{self._bad} steps in a row had a gradient that is not finite or a spike, the last at step {done}; "
                "lower lr, lengthen the warm-up, or go back to a checkpoint before it.",
                done,
                self._seconds(),
            )
        return True

    def _must_stop(self) -> bool:
        return self.stop is not None and self.engine.any_told(self.stop())

    def _save(self, done: int) -> bool:
        """Whether there is a checkpoint of this step, or none is wanted; tried once."""
        if self._saved[0] != done:
            # Weights that are no numbers must not take the place of an older checkpoint.
            self._check(done, self._total_loss(done))
            saved = self.save is None or self.save(done, self._seconds())
            self._saved = (done, saved)
            if not saved:
                self.metrics.write("not_saved", step=done)
                self.progress.say(f"step {done:>5}/{self.steps}: the checkpoint could not be saved")
        return self._saved[1]

    def _log(self, done: int) -> None:
        """Write the mean over the steps since the last record."""
        begin = time.monotonic()
        loss_sum = self._total_loss(done)
        loss = loss_sum / (self._loss_count * self.engine.world) if self._loss_count else math.nan
        self._busy += time.monotonic() - begin  # on a GPU the steps' work is waited for here
        speed = self._tokens(self._steps_since) / self._busy
        self.metrics.write(
            "train",
            step=done,
            tokens=self._tokens(done),
            loss=_or_none(loss),
            learning_rate=self.engine.learning_rate(),
            gradient_norm=_or_none(self.engine.gradient_norm()),
            tokens_per_second=round(speed, 1),
            seconds=self._seconds(),
            **({"mfu": round(speed * self.flop_share, 4)} if self.flop_share else {}),
            **memory(),
        )
        if self._loss_count:
            self._check(done, loss)
        self.progress.figures(loss, speed)
        self._loss_sum, self._loss_count, self._steps_since, self._busy = 0.0, 0, 0, 0.0

    def _check(self, done: int, loss: float) -> None:
        """On all ranks alike. Where gradients are released no step is skipped: only the next loss tells."""
        if not math.isfinite(loss):
            text = f"the training loss is {loss} at step {done}; lower lr or lengthen the warm-up."
            raise Diverged(text, done, self._seconds())

    def _total_loss(self, done: int) -> float:
        """Summed over the steps since the last record and the ranks; in the same collective, what refreshes caught.

        Before a checkpoint, too: a run that resumes from there does not meet these refreshes again.
        """
        steps, self._refreshes = self._refreshes, []
        loss_sum, *sums = self.engine.total([float(self._loss_sum), *(one for step in steps for one in step)])
        each = len(sums) // max(len(steps), 1)
        for index in range(len(steps)):
            self._log_refreshes(done - len(steps) + index + 1, sums[index * each : (index + 1) * each])
        return loss_sum

    def _log_refreshes(self, done: int, sums: list[float]) -> None:
        """What the projectors that were refreshed at this step caught; nothing if there were none."""
        report = RefreshReport.of(sums)
        if report.matrices:
            self.metrics.write(
                "refresh",
                step=done,
                tokens=self._tokens(done),
                matrices=report.matrices,
                residual_energy=_or_none(report.residual_energy),
                overlap=_or_none(report.overlap),
            )

    def _evaluate(self, done: int) -> bool:
        """False if it was told to stop before the end."""
        evaluation = self.validation.evaluate(self.engine, self._must_stop)
        if evaluation is None:
            return False
        stats = {"loss": evaluation.loss, **evaluation.metrics}
        self.metrics.write("validation", step=done, tokens=self._tokens(done), seconds=self._seconds(), **stats)
        self.progress.say(f"step {done:>5}/{self.steps}: {evaluation.text}")
        if self.evaluated is not None:
            self.evaluated(done, evaluation)
        first = evaluation.loss if done == self.start else self._losses[0]
        self._losses = (first, evaluation.loss)
        return True

    def _seconds(self) -> float:
        """Of training, in this process and those that it continues."""
        return round(time.monotonic() - self._begin, 2)

    def _tokens(self, steps: int) -> int:
        return steps * self.batches.batch_size * self.batches.length


def _or_none(value: float) -> float | None:
    """NaN is no JSON."""
    return value if math.isfinite(value) else None
