"""The demo: pre-train a small LLaMA-style model on real English under DeepSpeed."""

from __future__ import annotations

import math
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from frugal_dist.training.distributed.process import LOG_FILE, quiet_console, say

# Heavy and noisy libraries are imported inside the functions: once the terminal is protected from their output.
if TYPE_CHECKING:
    from frugal_dist.training.engines.deepspeed import DeepSpeedEngine
    from frugal_dist.training.loop import Outcome
    from frugal_dist.training.metrics.record import MetricsLog
    from frugal_dist.training.metrics.report import Summary


@dataclass(frozen=True)
class DemoSettings:
    """What the demo can be told."""

    data: Path
    run: Path
    config: Path
    steps: int = 500
    model: str = "quick"
    sequence_length: int = 128
    warmup_share: float = 0.1
    final_lr_share: float = 0.1
    evaluation_tokens: int = 32_768
    seed: int = 0

    def record(self) -> dict[str, Any]:
        """The settings for the metrics file."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def train_demo(settings: DemoSettings) -> int:
    """Train as one rank of the launcher that started this process; return the exit code."""
    if "RANK" not in os.environ:
        raise ValueError("RANK is not set; start the demo with a launcher: `bash launch/quickstart.sh`.")
    if settings.steps < 1:
        raise ValueError(f"steps is {settings.steps}; give a number above 0.")
    settings.run.mkdir(parents=True, exist_ok=True)
    with quiet_console(settings.run / LOG_FILE) as terminal:
        try:
            _train(settings, terminal)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            say(terminal, f"\nRank {os.environ['RANK']} failed: {type(error).__name__}: {error}")
            return 1
    return 0


def _train(settings: DemoSettings, terminal: TextIO) -> None:
    """Build everything, train, and write what a run leaves behind."""
    import torch

    from frugal_dist.training.data.batches import Batches, TokenRows
    from frugal_dist.training.data.prepared import open_prepared
    from frugal_dist.training.engines.deepspeed import DeepSpeedEngine, read_deepspeed_config
    from frugal_dist.training.evaluate import Validation
    from frugal_dist.training.loop import Training
    from frugal_dist.training.metrics.progress import Progress
    from frugal_dist.training.metrics.record import METRICS_FILE, MetricsLog
    from frugal_dist.training.models import build_llama

    config = read_deepspeed_config(settings.config)
    data, train_tokens, validation_tokens = open_prepared(settings.data)
    torch.manual_seed(settings.seed)
    model = build_llama(settings.model, data.vocab_size, settings.sequence_length, data.separator)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = DeepSpeedEngine(model, config, _schedule(settings))
    batches = Batches(TokenRows(train_tokens, settings.sequence_length), engine.batch_size, settings.seed)
    validation = Validation(TokenRows(validation_tokens, settings.sequence_length), settings.evaluation_tokens)
    unigram_loss = validation.unigram_loss(train_tokens, data.vocab_size)
    if engine.rank == 0:
        say(
            terminal,
            f"Training {parameters / 1e6:.2f} M parameters with {engine.optimizer_name} on {engine.world} ranks, "
            f"{engine.batch_size * settings.sequence_length:,} tokens a step; the unigram model's perplexity, "
            f"to be beaten: {math.exp(unigram_loss):,.1f}",
        )
    with MetricsLog(settings.run / METRICS_FILE if engine.rank == 0 else None) as metrics:
        metrics.write(
            "run",
            **settings.record(),
            source=data.source,
            optimizer=engine.optimizer_name,
            parameters=parameters,
            ranks=engine.world,
            unigram_loss=unigram_loss,
            deepspeed=config,
        )
        every = max(100, math.ceil(settings.steps / 4))
        with Progress(settings.steps, terminal, shown=engine.rank == 0) as progress:
            outcome = Training(engine, batches, validation, metrics, progress, settings.steps, every).run()
        summary = _summary(engine, outcome, parameters, validation.tokens, unigram_loss)
        _finish(settings, engine, summary, metrics, terminal)
    engine.close()


def _schedule(settings: DemoSettings) -> partial[float]:
    from frugal_dist.training.schedule import warmup_cosine

    warmup = max(1, round(settings.warmup_share * settings.steps))
    return partial(warmup_cosine, total=settings.steps, warmup=warmup, floor=settings.final_lr_share)


def _summary(
    engine: DeepSpeedEngine, outcome: Outcome, parameters: int, validation_tokens: int, unigram_loss: float
) -> Summary:
    from frugal_dist.training.evaluate import perplexity_of
    from frugal_dist.training.metrics.report import Summary

    return Summary(
        optimizer=engine.optimizer_name,
        parameters=parameters,
        state_bytes=engine.state_bytes(),
        steps=outcome.steps,
        tokens=outcome.tokens,
        seconds=outcome.seconds,
        validation_tokens=validation_tokens,
        perplexity_at_start=perplexity_of(outcome.first_loss),
        perplexity_at_end=perplexity_of(outcome.last_loss),
        unigram_perplexity=math.exp(unigram_loss),
    )


def _finish(
    settings: DemoSettings, engine: DeepSpeedEngine, summary: Summary, metrics: MetricsLog, terminal: TextIO
) -> None:
    """Checkpoint on all ranks; picture and report on rank 0. The report comes last: it says that all went well."""
    from frugal_dist.training.metrics.plot import plot_run
    from frugal_dist.training.metrics.report import REPORT_FILE, report_text

    engine.save(settings.run / "checkpoint", settings.steps, {})
    if engine.rank == 0:
        metrics.write("summary", **summary.record())
        plot_run(settings.run)
        text = report_text(summary, settings.run, settings.config)
        (settings.run / REPORT_FILE).write_text(text, encoding="utf-8")
        say(terminal, text)
