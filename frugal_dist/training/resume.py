"""Resume of a run: under the same recipe, from its newest checkpoint, at the same position in the data.

A finished run of the same recipe is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal_dist import checkpoint
from frugal_dist.checkpoint.folder import latest_step
from frugal_dist.config import config_from
from frugal_dist.presets import BEHIND, LORA, WITHOUT_RANK, preset
from frugal_dist.training.distributed.ranks import agree, together
from frugal_dist.training.folders import CHECKPOINTS
from frugal_dist.training.metrics.record import METRICS_FILE, end_of, of_kind, read_metrics
from frugal_dist.training.optimizers import settled
from frugal_dist.training.recipe import Recipe, Run

if TYPE_CHECKING:
    from frugal_dist.training.data.batches import Source
    from frugal_dist.training.engines import Engine

SECONDS = "seconds"
"""In a checkpoint: how long the run has taken, in all the processes that trained it."""

FREE = (
    "folder", "engine", "tp", "deepspeed", "micro_batch", "log_every", "trackers", "peak_tflops", "bad_steps",
    "saving.*", "model.attention", "model.checkpointing", "model.compile", "data.workers", "data.epochs",
    "release_gradients", "optimizer.options.compute_layout",
)  # fmt: skip
"""Patterns of keys on which the result does not depend, but for rounding."""
FREE_ON_RESUME = (
    *FREE, "steps", "epochs", "spike", "evaluate_every", "evaluation_tokens", "validation_examples", "data.validation*",
    "data.metrics", "data.streams", "data.shuffle_buffer", "validation_tokens", "unigram_loss",
)  # fmt: skip
"""A resumed run may also become longer and be evaluated otherwise. Streams check their own keys."""
FREE_AT_THE_END = (*FREE, "spike", "evaluate_every", "data.streams", "data.shuffle_buffer")
"""A finished run is as it would be with other values of these."""


def resume(
    recipe: Recipe,
    record: dict[str, Any],
    engine: Engine,
    batches: Source,
    recall: Callable[[dict[str, Any]], None] | None,
) -> tuple[int, float]:
    """Continue the run in the recipe's folder, if there is one. Collective.

    The engine loads weights, optimizer, schedule and random states from the newest checkpoint, whichever engine and
    number of ranks wrote it; then the data continue where they were.

    Args:
        recipe: what is trained now.
        record: the same as metrics files keep it.
        engine: of this rank.
        batches: the source whose position is restored.
        recall: gets what the job's ``remember`` has put into the checkpoint.

    Returns:
        The steps that are done and the seconds they took; (0, 0.0) for a new run.

    Raises:
        ValueError: on all ranks alike, if the folder holds a run of another recipe, or one with more steps.
    """
    folder = Path(recipe.folder)

    def check() -> None:  # rank 0 writes the folder
        if engine.rank == 0 and has_checkpoint(folder):
            check_existing_run(folder, record, FREE_ON_RESUME)

    together(check)
    checkpointed = engine.resume(folder / CHECKPOINTS)
    if checkpointed is None:
        return 0, 0.0
    step, extra = checkpointed
    if step > recipe.steps:  # training would save these weights as an earlier step's
        text = f"steps is {recipe.steps}, but the run in {recipe.folder} has done {step}: raise it or change folder."
        agree(ValueError(text))
    batches.load_state_dict(extra.get("data", []), step)
    if recall is not None:
        recall(extra)
    return step, float(extra.get(SECONDS, 0.0))


def has_checkpoint(run: Path) -> bool:
    """Whether there is a run in this folder to be resumed; otherwise it starts anew."""
    return checkpoint.latest(run / CHECKPOINTS) is not None


def record_of(recipe: Run) -> dict[str, Any]:
    """The recipe as metrics files keep it."""
    return replace(recipe, optimizer=settled(recipe.optimizer)).record()


def check_resumable(recipe: Run) -> None:
    """ValueError if the recipe's folder holds a run of another one. Before anything is built."""
    if has_checkpoint(Path(recipe.folder)):
        check_existing_run(Path(recipe.folder), record_of(recipe), FREE_ON_RESUME)


def already_ended(recipe: Run) -> str:
    """What to say if the run has ended before, evaluated as it would be now; nothing if there is something to do.

    Whatever engine and number of ranks it ran on. Before anything is built.
    """
    folder = Path(recipe.folder)
    records = records_of(folder)
    end, runs = end_of(records), of_kind(records, "run")
    if end is None or end["kind"] != "summary" or end.get("steps") != latest_step(folder / CHECKPOINTS):
        return ""
    if _changed(_flat(runs[-1]), _as_recorded(record_of(recipe)), FREE_AT_THE_END):
        return ""
    (folder / METRICS_FILE).touch()  # launch scripts see that this start has found an end
    results = [f"{key} {end[key]:,.4g}" for key in ("perplexity", "score") if isinstance(end.get(key), float)]
    text = ", ".join([f"{folder}: already finished, all {end['steps']:,} steps are done", *results])
    return f"{text}. To train on, raise --steps; to train anew, choose another --folder."


def records_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run; none if nothing was begun there."""
    return read_metrics(run) if (run / METRICS_FILE).is_file() else []


def check_existing_run(run: Path, recipe: dict[str, Any], free: Collection[str]) -> None:
    """ValueError if the run in this folder was begun, or resumed, with other values of keys that are not ``free``.

    ``recipe``: the record of the recipe that is asked for now. Keys that only one of the two has are not compared.
    """
    now = _as_recorded(recipe)
    for record in of_kind(records_of(run), "run"):
        before = _flat(record)
        if changed := _changed(before, now, free):
            said = ", ".join(f"{key} {before[key]!r} (now {now[key]!r})" for key in changed)
            how = f"Set that back, or begin in another --folder.{_weights_alone(run, changed)}"
            raise ValueError(f"{run} holds a run with {said}. {how}")


def _as_recorded(recipe: dict[str, Any]) -> dict[str, Any]:
    """A record, flat, as if it were read from a file."""
    return _flat(json.loads(json.dumps(recipe)))


def _changed(before: dict[str, Any], now: dict[str, Any], free: Collection[str]) -> list[str]:
    """The keys that both have with another meaning, of those that are not ``free``."""
    changed = [
        key
        for key in now
        if key in before
        and before[key] != now[key]
        and not _fits(key, free)
        and not (_fits(key, _PATHS) and _same_place(before[key], now[key]))
    ]
    if changed == ["optimizer.name"] and not {before[changed[0]], now[changed[0]]} & BEHIND.keys():
        return []  # two names of the same settings
    return changed


def _weights_alone(run: Path, changed: list[str]) -> str:
    """How to train the same weights on with another optimizer, whose state must begin anew, or another schedule."""
    if not all(key.startswith(("optimizer.", "schedule.")) for key in changed):
        return ""
    return (
        f" To train its weights on under new settings: frugal-dist export {run}/checkpoints --out DIR, then the recipe "
        "with --model.llama null --model.path DIR --model.pretrained true --folder ANOTHER."
    )


_PATHS = ("model.path", "data.path", "data.tokenizer", "data.validation_path", "data.train", "data.validation")


def _same_place(before: object, now: object) -> bool:
    """Whether two paths are one, said from different folders: recipes find what lies beside them from anywhere.

    Of a path that was relative to another folder only its end is known: it counts if nothing else is there under it.
    """
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    old, new = Path(before), Path(now)
    if old.exists() and new.exists():
        return old.samefile(new)
    shorter, longer = sorted((old.parts, new.parts), key=len)
    return not old.exists() and not old.is_absolute() and bool(shorter) and longer[-len(shorter) :] == shorter


def _fits(key: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Every key with a meaning for the result, nested ones by their whole name; options of the optimizer in full."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        inner = _optimizer(value) if key == "optimizer" else value
        if isinstance(inner, dict):
            flat |= {f"{key}.{name}": one for name, one in inner.items()}
        else:
            flat[key] = inner
    if flat.get("optimizer.name") != LORA:
        flat = {key: value for key, value in flat.items() if not key.startswith("lora.")}
    return flat


def _optimizer(record: dict[str, Any]) -> dict[str, Any]:
    """The optimizer with every hyperparameter, also those that the recipe left to the optimizer's name."""
    settings = {key: value for key, value in record.items() if key != "options"}
    if settings["name"] in WITHOUT_RANK:
        settings = {key: value for key, value in settings.items() if key not in ("rank", "stateful")}
    plain = BEHIND.get(settings["name"], settings["name"])
    config = asdict(config_from(preset(plain, **record["options"])))
    options = {f"options.{key}": value for key, value in config.items() if key not in settings}
    return {**settings, **json.loads(json.dumps(options))}
