"""Pre-training by recipe: on one process, DDP, FSDP2 or DeepSpeed. Started again, a run goes on where it was."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from frugal_dist.training.console import LOG_FILE, quiet_console
from frugal_dist.training.place import Place, find_place
from frugal_dist.training.recipe import Recipe, check_recipe
from frugal_dist.training.signals import STOPPED, StopRequest, stop_requests

# Heavy and noisy libraries are imported inside the functions: once the terminal is protected from their output.
if TYPE_CHECKING:
    from frugal_dist.training.engines import Engine
    from frugal_dist.training.loop import Outcome, Training
    from frugal_dist.training.metrics import MetricsLog
    from frugal_dist.training.sources import OpenData

CHECKPOINTS = "checkpoints"


def pretrain(recipe: Recipe) -> int:
    """Train as one rank of whatever launcher started this process.

    Returns the exit code: 0 when all steps are done, 75 after a signal to stop (a checkpoint is saved; the same command
    goes on), 1 after a failure. Raises ValueError for a recipe that cannot be trained, before anything is started.
    """
    check_recipe(recipe)
    place = find_place()
    run = Path(recipe.folder)
    run.mkdir(parents=True, exist_ok=True)
    with _environment(place), quiet_console(run / LOG_FILE) as terminal, stop_requests() as request:
        try:
            return _train(recipe, place, terminal, request)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            print(f"\nRank {place.rank} failed: {type(error).__name__}: {error}", file=terminal)
            return 1


@contextmanager
def _environment(place: Place) -> Iterator[None]:
    """The variables that torch and DeepSpeed read, for as long as the training runs."""
    before = dict(os.environ)
    os.environ.update(place.environment())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _train(recipe: Recipe, place: Place, terminal: TextIO, request: StopRequest) -> int:
    import torch

    from frugal_dist.training.engines import build_engine
    from frugal_dist.training.models import build_model
    from frugal_dist.training.schedule import build_schedule
    from frugal_dist.training.sources import open_data

    schedule = build_schedule(recipe.schedule, recipe.steps)
    data = open_data(recipe, place.world)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, data.vocab_size, recipe.length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = build_engine(model, recipe, schedule, place)
    with ExitStack() as stack:
        stack.callback(engine.close)
        stack.callback(data.batches.close)
        found = engine.resume(Path(recipe.folder) / CHECKPOINTS)
        start = 0 if found is None else found[0]
        if found is not None:
            data.batches.load_state_dict(found[1].get("data", []), start)
        if engine.rank == 0:
            print(_headline(recipe, engine, parameters, start), file=terminal)
        outcome = _run(recipe, engine, data, start, terminal, request)
    if outcome.steps < recipe.steps:
        if place.rank == 0:
            why = request.name or "a signal to another rank"
            print(f"Stopped after step {outcome.steps} ({why}); the same command goes on.", file=terminal)
        return STOPPED
    return 0


def _headline(recipe: Recipe, engine: Engine, parameters: int, start: int) -> str:
    begun = f"going on after step {start}" if start else f"{recipe.steps:,} steps"
    ranks = "one rank" if engine.world == 1 else f"{engine.world} ranks"
    return (
        f"{recipe.folder}: {parameters / 1e6:.2f} M parameters, {engine.optimizer_name}, {recipe.engine} on {ranks}, "
        f"{recipe.batch * recipe.length:,} tokens a step, {begun}"
    )


def _run(
    recipe: Recipe,
    engine: Engine,
    data: OpenData,
    start: int,
    terminal: TextIO,
    request: StopRequest,
) -> Outcome:
    from frugal_dist.training.metrics import METRICS_FILE, MetricsLog
    from frugal_dist.training.progress import Progress

    path = Path(recipe.folder) / METRICS_FILE if engine.rank == 0 else None
    with MetricsLog(path, start or None) as metrics, Progress(recipe.steps, terminal, engine.rank == 0) as progress:
        metrics.write("run", **recipe.record(), start=start, ranks=engine.world)
        training = _training(recipe, engine, data, start, metrics, progress, request)
        outcome = training.run()
        if outcome.steps < recipe.steps:
            metrics.write("stopped", step=outcome.steps, signal=request.name)
            return outcome
        state, perplexity = engine.state_bytes(), math.exp(outcome.last_loss)
        metrics.write(
            "summary",
            steps=outcome.steps,
            tokens=outcome.tokens,
            seconds=round(outcome.seconds, 1),
            state_bytes=state,
            validation_loss=outcome.last_loss,
            perplexity=perplexity,
        )
        progress.say(f"validation perplexity {perplexity:,.2f}; optimizer state {max(state) / 1e6:,.1f} MB per rank")
    return outcome


def _training(
    recipe: Recipe,
    engine: Engine,
    data: OpenData,
    start: int,
    metrics: MetricsLog,
    progress: Any,
    request: StopRequest,
) -> Training:
    from frugal_dist.training.engines.collectives import gathered
    from frugal_dist.training.loop import Training

    def save(step: int) -> None:
        saving = recipe.saving
        options = {"keep_last": saving.keep_last, "keep_every": saving.keep_every, "on_error": saving.on_error}
        position = data.batches.state_dict()
        extra = {"data": gathered(position)} if position else {}
        engine.save(Path(recipe.folder) / CHECKPOINTS, step, extra, **options)

    return Training(
        engine,
        data.batches,
        data.validation,
        metrics,
        progress,
        steps=recipe.steps,
        evaluate_every=recipe.evaluate_every,
        log_every=recipe.log_every,
        start=start,
        save=save,
        save_every=recipe.saving.every,
        stop=request,
        bad_steps=recipe.bad_steps,
    )
