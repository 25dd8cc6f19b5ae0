"""One rank of a training by recipe: terminal, signals, metrics, checkpoints, resume.

What is trained, and what it found at the end, is the job's.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

from frugal_dist import checkpoint
from frugal_dist.checkpoint.folder import LATEST
from frugal_dist.checkpoint.index import INDEX
from frugal_dist.training.distributed.place import DistEnv, find_dist_env
from frugal_dist.training.distributed.process import (
    DIVERGED,
    LOG_FILE,
    STOPPED,
    StoppedEarly,
    StopRequest,
    information_to,
    log_file,
    quiet_console,
    say,
    stop_requests,
    tell,
)
from frugal_dist.training.distributed.ranks import (
    PeerFailed,
    agree,
    check_shared,
    is_mistake,
    process_group,
    together,
    waiting,
)
from frugal_dist.training.distributed.run_lock import held
from frugal_dist.training.folders import CHECKPOINTS
from frugal_dist.training.metrics.device import idle_gpus, in_words, surroundings
from frugal_dist.training.metrics.record import METRICS_FILE
from frugal_dist.training.recipe import Recipe, Run
from frugal_dist.training.resume import SECONDS, already_ended, check_resumable, resume

# Heavy and noisy libraries are imported inside the functions: once the terminal is protected from their output.
if TYPE_CHECKING:
    from frugal_dist.training.data.batches import Source
    from frugal_dist.training.engines import Engine
    from frugal_dist.training.loop import Outcome, Training
    from frugal_dist.training.metrics.progress import Progress
    from frugal_dist.training.metrics.record import MetricsLog
    from frugal_dist.training.validation import EvalResult, Evaluation

FAILURE_FILE = "failed.txt"
"""Of the last start in this folder, if it failed: the exit code, and a line for the user, which launch scripts show.

None of a process alone that refused to start: it said why, and has changed nothing.
"""


@dataclass(frozen=True)
class TrainingJob:
    """A training that can start.

    ``record``: the user's recipe, as far as it counts, for the metrics file. ``summary(outcome)``: figures of the end,
    and words for the terminal. ``flops_per_token``: 0 if not known. ``evaluated``: as the loop's. ``remember()``: what
    a checkpoint holds beside the position in the data; ``recall`` gets it back when the run resumes.
    ``evaluate_first``: before the first step, too. ``note``: said to the user at the start, ``after`` at the end.
    """

    recipe: Recipe
    record: dict[str, Any]
    parameters: int
    engine: Engine
    batches: Source
    validation: Evaluation
    summary: Callable[[Outcome], tuple[dict[str, Any], str]]
    flops_per_token: float = 0.0
    evaluated: Callable[[int, EvalResult], None] | None = None
    remember: Callable[[], dict[str, Any]] = dict
    recall: Callable[[dict[str, Any]], None] | None = None
    evaluate_first: bool = True
    note: str = ""
    after: str = ""


R = TypeVar("R", bound=Run)
Prepare = Callable[[R, DistEnv, ExitStack], TrainingJob]
"""``prepare(recipe, place, stack)``: builds the job; what it leaves in ``stack`` is closed at the end."""


def train(read: Callable[[], R], check: Callable[[R], None], prepare: Prepare[R]) -> int:
    """Train what ``read`` returns, as one rank of whatever launcher started this process; return the exit code.

    0 when all steps are done, 75 after a signal to stop (a checkpoint is saved; the same command resumes), 65 if it
    diverged, 2 for what the user is to mend before it can begin, 130 after Ctrl-C before it began, 1 after another
    failure. If ``read`` or ``check`` of it raises, no rank starts; a process alone raises the same.
    """
    place = find_dist_env()
    log, recipe = _read(read, check, place)
    with environment(place), quiet_console(log) as terminal, stop_requests() as request:
        request.speaks, holds = place.rank == 0, False
        try:
            with process_group(place), ExitStack() as stack:
                request.at_once = place.world == 1
                agreed = together(recipe)
                if place.world > 1:
                    check_shared(log.parent, place.rank)
                together(lambda: _hold(log.parent, stack) if place.rank == 0 else None)
                holds = True
                if ended := _ended(agreed, place):
                    if place.rank == 0:
                        say(terminal, ended)
                    return 0
                with waiting("the data and the model, which are read or fetched", request.speaks):
                    job = prepare(agreed, place, stack)
                code = _train(job, terminal, request)
        except StoppedEarly as stop:
            say(terminal, f"Stopped before training began ({stop.name}); the same command starts it.")
            return stop.code
        except Exception as error:
            mistake = is_mistake(error) and not request.training
            code = 2 if mistake else 1
            if place.world == 1 and mistake and is_refusal(error):
                say(terminal, f"frugal-dist: error: {error}")
                return code
            traceback.print_exc(file=sys.stderr)
            if not isinstance(error, PeerFailed):
                text = failure_text(error, mistake, place, log)
                say(terminal, f"\n{text}")
                if holds:
                    _note_failure(log.parent, code, text)
            return code
        request.obeyed = code == STOPPED
    return code


def is_refusal(error: BaseException) -> bool:
    """Whether this package itself said no: the text is all there is to know. A library's error needs its traceback."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return isinstance(error, ValueError) and frames[-1][0].f_globals["__name__"].partition(".")[0] == "frugal_dist"


def failure_text(error: Exception, mistake: bool, place: DistEnv, log: Path) -> str:
    """What went wrong, on which rank if there are several, and where there is more about it."""
    what = str(error) if place.world == 1 and mistake else f"{type(error).__name__}: {error}"
    who = f"Rank {place.rank} failed" if place.world > 1 else "Failed"
    return f"{who}: {what}" + (f"\nDetails: {log}" if log != Path(os.devnull) else "")


def _hold(run: Path, stack: ExitStack) -> None:
    stack.enter_context(held(run, tell))
    with suppress(OSError):
        (run / FAILURE_FILE).unlink(missing_ok=True)


def _note_failure(run: Path, code: int, text: str) -> None:
    """Of the ranks that fail the first counts: others may fail for want of it."""
    with suppress(OSError), (run / FAILURE_FILE).open("x", encoding="utf-8") as file:
        file.write(f"{code}\n{text}\n")


def _read(read: Callable[[], R], check: Callable[[R], None], place: DistEnv) -> tuple[Path, Callable[[], R]]:
    """The file for what libraries print, and the recipe; an error is kept until all ranks can hear of it."""
    try:
        recipe = read()
        check(recipe)
        log = _writable(folder_of_a_run(recipe.folder), log_file(place.rank))
    except Exception as error:
        if place.world == 1:
            raise
        return Path(os.devnull), partial(_raise, error)
    return log, lambda: recipe


def folder_of_a_run(folder: str) -> Path:
    """ValueError for what is no folder of its own: nothing, or another run's checkpoints."""
    run = Path(folder)
    if not folder.strip():
        raise ValueError("folder is empty; name one for what the run leaves behind.")
    if (run / LATEST).is_file() or (run / INDEX).is_file():
        raise ValueError(f"folder is {folder!r}, which holds checkpoints; name the run's own folder, the one above.")
    return run


def _writable(run: Path, name: str) -> Path:
    """This file in the run's folder, there to be written: what this rank cannot write is said while all can hear it."""
    log = run / name
    try:
        run.mkdir(parents=True, exist_ok=True)
        log.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ValueError(f"{log} cannot be written: {error.strerror}. Choose another --folder.") from error
    return log


def _raise(error: Exception) -> NoReturn:
    raise error


@contextmanager
def environment(place: DistEnv) -> Iterator[None]:
    """The variables that torch and DeepSpeed read, for as long as the training runs."""
    before = dict(os.environ)
    os.environ.update(place.environment())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _ended(recipe: Run, place: DistEnv) -> str:
    """What to say if there is nothing to do, on all ranks; rank 0 looks. ValueError for a folder of another recipe."""
    from frugal_dist.training.engines.collectives import gathered

    def look() -> str:
        check_resumable(recipe)
        return already_ended(recipe)

    text: str = gathered(together(lambda: look() if place.rank == 0 else ""))[0]
    return text


def _train(job: TrainingJob, terminal: TextIO, request: StopRequest) -> int:
    from frugal_dist.training.loop import Diverged

    recipe, engine = job.recipe, job.engine
    start, seconds = resume(recipe, job.record, engine, job.batches, job.recall)
    if engine.rank == 0:
        idle = idle_gpus()
        loud = f"WARNING: this run trains on the CPU: {idle}." if idle else ""
        say(terminal, "\n".join([_headline(job, start), *filter(None, [loud, job.note])]))
    request.at_once, request.training = False, True
    try:
        outcome = _run(job, start, seconds, terminal, request)
    except Diverged as error:  # on all ranks: they leave together, and a comparison goes on with its next run
        if engine.rank == 0:
            say(terminal, f"The run diverged: {error}")
        return DIVERGED
    if not outcome.finished:
        if engine.rank == 0:
            why = request.name or "a signal to another rank"
            where = "" if outcome.saved else " from the last checkpoint that could be saved"
            say(terminal, f"Stopped after step {outcome.steps} ({why}); the same command resumes{where}.")
        return STOPPED
    if not outcome.saved:
        text = f"all steps are done, but the last checkpoint could not be saved in {recipe.folder}; see {LOG_FILE}."
        agree(OSError(text))
    return 0


def _headline(job: TrainingJob, start: int) -> str:
    from frugal_dist.training.optimizers import described

    recipe, engine = job.recipe, job.engine
    begins = f"resuming after step {start}" if start else f"{recipe.steps:,} steps"
    ranks = "one rank" if engine.world == 1 else f"{engine.world} ranks"
    return (
        f"{recipe.folder}: {job.parameters / 1e6:.2f} M parameters, {described(recipe.optimizer)}, {recipe.engine} on "
        f"{ranks}, {recipe.batch * job.batches.length:,} tokens a step, {begins}; {in_words()}"
    )


def _run(job: TrainingJob, start: int, seconds: float, terminal: TextIO, request: StopRequest) -> Outcome:
    from frugal_dist.training.loop import Diverged
    from frugal_dist.training.metrics.progress import Progress
    from frugal_dist.training.metrics.record import MetricsLog, Trackers

    recipe, engine = job.recipe, job.engine
    folder, first = Path(recipe.folder), engine.rank == 0
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(recipe.steps, terminal, first, start))
        stack.enter_context(information_to(progress.say))
        trackers = Trackers(recipe.trackers if first else [], folder, job.record, start, progress.say)
        stack.callback(trackers.close)
        path = folder / METRICS_FILE if first else None
        metrics = stack.enter_context(together(lambda: MetricsLog(path, start or None, trackers)))
        where = surroundings() if first else {}
        metrics.write("run", **job.record, start=start, ranks=engine.world, surroundings=where)
        try:
            outcome = _training(job, start, seconds, metrics, progress, request).run()
        except Diverged as error:
            metrics.write("diverged", step=error.step, reason=str(error), seconds=error.seconds, **_state(engine))
            raise
        if not outcome.finished:
            metrics.write("stopped", step=outcome.steps, signal=request.name)
        if not outcome.finished or not outcome.saved:  # without a summary the run does not count as finished
            return outcome
        state = _state(engine)
        figures, text = job.summary(outcome)
        metrics.write(
            "summary",
            steps=outcome.steps,
            tokens=outcome.tokens,
            seconds=round(outcome.seconds, 1),
            **state,
            validation_loss=outcome.last_loss,
            **figures,
        )
        progress.finish()
        own, adamw = max(state["state_bytes"]) / 1e6, state["adamw_state_bytes_per_rank"] / 1e6
        progress.say(f"{text}; optimizer state {own:,.1f} MB per rank (AdamW: {adamw:,.1f})")
        if job.after:
            progress.say(job.after)
    return outcome


def _state(engine: Engine) -> dict[str, Any]:
    """The optimizer state of every rank, and AdamW's on the rank where it would be most."""
    from frugal_dist.training.engines.collectives import gathered

    kinds = gathered(engine.state_kinds())
    return {
        "state_bytes": [sum(of_rank.values()) for of_rank in kinds],
        "state_kinds": kinds,
        "adamw_state_bytes_per_rank": max(gathered(engine.adamw_bytes())),
    }


def _training(
    job: TrainingJob, start: int, seconds: float, metrics: MetricsLog, progress: Progress, request: StopRequest
) -> Training:
    from frugal_dist.training.engines.collectives import gathered
    from frugal_dist.training.loop import Training
    from frugal_dist.training.metrics.device import peak_flops

    recipe = job.recipe
    peak = peak_flops(recipe.precision, recipe.peak_tflops)

    def save(step: int, seconds: float) -> bool:
        saving = recipe.saving
        options = {"keep_last": saving.keep_last, "keep_every": saving.keep_every}
        position = job.batches.state_dict()
        extra = {SECONDS: seconds, **({"data": gathered(position)} if position else {})}
        try:
            return job.engine.save(Path(recipe.folder) / CHECKPOINTS, step, {**extra, **job.remember()}, **options)
        except checkpoint.StorageError as error:  # on all ranks alike
            if saving.on_error == "raise":
                raise
            progress.say(f"Training goes on without this checkpoint: {error}")
            return False

    return Training(
        job.engine,
        job.batches,
        job.validation,
        metrics,
        progress,
        steps=recipe.steps,
        evaluate_every=recipe.evaluate_every,
        log_every=recipe.log_every,
        start=start,
        seconds=seconds,
        save=save,
        save_every=recipe.saving.every,
        stop=request,
        bad_steps=recipe.bad_steps,
        flop_share=job.flops_per_token / (peak * job.engine.world) if peak else 0.0,
        evaluated=job.evaluated,
        evaluate_first=job.evaluate_first,
    )
