"""The loop over steps: when it logs, evaluates, saves and stops, on an engine that trains nothing."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_engine import FakeEngine, counting_rows

from frugal_dist.training.data.batches import Batches
from frugal_dist.training.engines import collectives
from frugal_dist.training.loop import Training
from frugal_dist.training.metrics.progress import Progress
from frugal_dist.training.metrics.record import MetricsLog, of_kind, read_metrics
from frugal_dist.training.validation import Validation


def _training(path: Path, engine: FakeEngine, steps: int) -> tuple[Training, io.StringIO]:
    terminal = io.StringIO()
    training = Training(
        engine,
        Batches(counting_rows(), 6, seed=0),
        Validation(counting_rows(count=2, length=1), tokens=2),  # losses 1 and 2: small enough for exp()
        MetricsLog(path / "metrics.jsonl"),
        Progress(steps, terminal, shown=engine.rank == 0),
        steps,
        evaluate_every=4,
        log_every=2,
    )
    return training, terminal


def test_loop_trains_each_step_and_evaluates_at_start_middle_and_end(tmp_path):
    engine = FakeEngine(rank=0, world=1)
    training, terminal = _training(tmp_path, engine, steps=5)
    with training.metrics:
        outcome = training.run()
    assert (outcome.steps, outcome.tokens) == (5, 5 * 6 * 4)
    assert outcome.first_loss == outcome.last_loss == 1.5
    assert [number * 4 for index in range(5) for number in training.batches.numbers(index)] == engine.seen
    records = read_metrics(tmp_path)
    assert [row["step"] for row in of_kind(records, "validation")] == [0, 4, 5]
    logged = of_kind(records, "train")
    assert [row["step"] for row in logged] == [2, 4, 5]
    # Rows start at their first token and rise by one: their mean is 2 above it. The last record covers one step.
    assert logged[-1]["loss"] == pytest.approx(sum(engine.seen[-6:]) / 6 + 2)
    assert terminal.getvalue().count("validation perplexity 4.5") == 3


def test_loop_stops_when_the_loss_is_not_finite(tmp_path, monkeypatch):
    engine = FakeEngine(rank=1, world=2)
    monkeypatch.setattr(engine, "train_step", lambda rows, targets=None: torch.tensor(math.nan), raising=False)
    training, terminal = _training(tmp_path, engine, steps=5)
    with training.metrics, pytest.raises(ValueError, match="training loss is nan at step 2"):
        training.run()
    assert terminal.getvalue() == ""  # only rank 0 speaks


def test_weights_that_are_no_numbers_are_not_saved_when_a_run_is_stopped(tmp_path, monkeypatch):
    """Before the loss would be logged: the next start takes the older checkpoint."""
    engine = FakeEngine(rank=0, world=1)
    monkeypatch.setattr(engine, "train_step", lambda rows, targets=None: torch.tensor(math.nan), raising=False)
    training, _ = _training(tmp_path, engine, steps=5)
    saved: list[int] = []
    training.save, training.stop = (
        lambda done, seconds: bool(saved.append(done)) or True,
        lambda: bool(training._steps_since),
    )
    with training.metrics, pytest.raises(ValueError, match="training loss is nan at step 1"):
        training.run()
    assert saved == []


class SkippingEngine(FakeEngine):
    """Its steps 3 and 4 have no finite loss, and are skipped."""

    def train_step(self, rows, targets=None):
        self.steps = getattr(self, "steps", 0) + 1
        return torch.tensor(math.nan) if self.steps in (3, 4) else torch.tensor(float(self.steps))

    def gradient_norm(self):
        return math.nan if self.steps in (3, 4) else 1.0

    def skipped_steps(self):
        return min(max(getattr(self, "steps", 0) - 2, 0), 2)


def test_a_skipped_step_does_not_count_in_the_loss(tmp_path):
    training, _ = _training(tmp_path, SkippingEngine(rank=0, world=1), steps=8)
    training.log_every = 4
    with training.metrics:
        training.run()
    training, terminal = _training(tmp_path, SkippingEngine(rank=0, world=1), steps=8)
    with training.metrics:
        training.run()  # logs every two steps: one record has no loss at all
    records = read_metrics(tmp_path)
    assert [row["loss"] for row in of_kind(records, "train")] == [1.5, None, 5.5, 7.5]
    assert [row["gradient_norm"] for row in of_kind(records, "train")] == [1.0, None, 1.0, 1.0]
    assert [row["step"] for row in of_kind(records, "skipped")] == [3, 4]
    assert "step     4/8: skipped" in terminal.getvalue()


class RefreshingEngine(FakeEngine):
    """Its steps 1 and 5 refresh two matrices."""

    def train_step(self, rows, targets=None):
        self.steps = getattr(self, "steps", 0) + 1
        return super().train_step(rows, targets)

    def refresh_figures(self):
        return [2.0, 4.0, 1.0, 0.0, 0.0] if self.steps in (1, 5) else super().refresh_figures()


@pytest.mark.parametrize(("log_every", "save_every", "stop_at"), [(1, 0, 8), (4, 0, 8), (100, 0, 5), (100, 5, 8)])
def test_refreshes_are_written_at_their_own_step(log_every, save_every, stop_at, tmp_path):
    """Also before a stop or a checkpoint between two records, from which a run goes on."""
    engine = RefreshingEngine(rank=0, world=1)
    training, _ = _training(tmp_path, engine, steps=8)
    training.log_every, training.save_every, training.evaluate_every = log_every, save_every, 0
    at_the_save: list[list[int]] = []

    def save(done: int, seconds: float) -> bool:
        at_the_save.append([row["step"] for row in of_kind(read_metrics(tmp_path), "refresh")])
        return True

    training.save, training.stop = save, lambda: getattr(engine, "steps", 0) == stop_at
    with training.metrics:
        training.run()
    assert [row["step"] for row in of_kind(read_metrics(tmp_path), "refresh")] == [1, 5]
    assert {row["residual_energy"] for row in of_kind(read_metrics(tmp_path), "refresh")} == {0.75}
    assert at_the_save[0] == [1, 5]


def test_a_checkpoint_that_could_not_be_saved_is_told(tmp_path):
    training, terminal = _training(tmp_path, FakeEngine(rank=0, world=1), steps=4)
    training.save, training.save_every = lambda step, seconds: step == 2, 2
    with training.metrics:
        assert not training.run().saved
    assert [row["step"] for row in of_kind(read_metrics(tmp_path), "not_saved")] == [4]
    assert "step     4/4: the checkpoint could not be saved" in terminal.getvalue()


class Stopping(FakeEngine):
    """Is told to stop when its loss has been asked for so many times."""

    after = 99

    def told(self):
        return self.calls >= self.after


def test_a_stop_does_not_wait_for_an_evaluation_whose_step_is_saved_before_it(tmp_path):
    order = []
    engine = Stopping(rank=0, world=1)
    training, _ = _training(tmp_path, engine, steps=8)
    training.validation = Validation(counting_rows(count=40, length=1), tokens=40, at_once=10)
    training.save = lambda step, seconds: order.append((step, engine.calls)) or True
    training.save_every, training.stop, engine.after = 4, engine.told, 6  # the second of four calls of step 4
    with training.metrics:
        outcome = training.run()
    assert (outcome.steps, outcome.finished, outcome.saved) == (4, False, True)
    assert order == [(4, 4)]  # before the evaluation, and only once
    assert engine.calls == 6
    assert [row["step"] for row in of_kind(read_metrics(tmp_path), "validation")] == [0]

    (tmp_path / "again").mkdir()
    again, _ = _training(tmp_path / "again", FakeEngine(rank=0, world=1), steps=8)
    again.start = 4
    for _ in range(2):  # the second time the evaluation of step 4 is there
        again.metrics.__exit__(None, None, None)
        again.metrics = MetricsLog(tmp_path / "metrics.jsonl", 4)
        with again.metrics:
            assert again.run().finished
        assert [row["step"] for row in of_kind(read_metrics(tmp_path), "validation")] == [0, 4, 8]


def test_the_last_evaluation_can_be_stopped_too(tmp_path):
    engine = Stopping(rank=0, world=1)
    training, _ = _training(tmp_path, engine, steps=4)
    training.stop, engine.after, training.save = engine.told, 1, lambda step, seconds: True
    training.evaluate_first = False
    training.validation = Validation(counting_rows(count=40, length=1), tokens=40, at_once=10)
    with training.metrics:
        outcome = training.run()
    assert (outcome.steps, outcome.finished) == (4, False)


def test_a_checkpoint_that_depends_on_the_evaluation_comes_after_it(tmp_path):
    order = []
    training, _ = _training(tmp_path, FakeEngine(rank=0, world=1), steps=4)
    training.save = lambda step, seconds: order.append(f"saved {step}") or True
    training.evaluated = lambda step, found: order.append(f"evaluated {step}")
    training.save_every = 2
    with training.metrics:
        training.run()
    assert order == ["evaluated 0", "saved 2", "evaluated 4", "saved 4"]


def test_a_run_that_goes_on_counts_all_its_seconds(tmp_path):
    training, _ = _training(tmp_path, FakeEngine(rank=0, world=1), steps=4)
    training.seconds, saved = 1000.0, []
    training.save = lambda step, seconds: saved.append(seconds) or True
    with training.metrics:
        assert 1000.0 <= training.run().seconds < 1100.0
    assert 1000.0 <= saved[0] < 1100.0


@pytest.mark.parametrize(
    ("device", "ranks", "answers"),
    [("cpu", 2, [False, True, False]), ("cuda", 2, [False, False, True]), ("cuda", 1, [False, True, False])],
)
def test_on_gpus_a_stop_is_known_a_step_later_without_waiting(device, ranks, answers, monkeypatch):
    """For the answer to the call before nothing waits that was queued since. One rank asks nobody."""
    waits = []

    def begin_total(values, where):
        return lambda: waits.append(values) or values

    monkeypatch.setattr(collectives, "begin_total", begin_total)
    monkeypatch.setattr(collectives, "ranks_of", lambda group: SimpleNamespace(alone=ranks == 1))
    told = collectives.Told(torch.device(device))
    assert [told.anyone(one) for one in (False, True, False)] == answers
    assert waits == [[0.0], [1.0], [0.0]][: 2 if answers[2] else 3]


def test_a_total_that_is_begun_is_the_total():
    assert collectives.begin_total([1.5, 2.0], torch.device("cpu"))() == [1.5, 2.0]
