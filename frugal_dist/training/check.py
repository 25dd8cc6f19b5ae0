"""`frugal-dist recipe check`: all that a training does before its first step, on one process and without its ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from frugal_dist.checkpoint.folder import latest_step
from frugal_dist.training.distributed.place import DistEnv
from frugal_dist.training.distributed.run_lock import check_free
from frugal_dist.training.finetune.recipe import FinetuneRecipe, check_finetune
from frugal_dist.training.folders import CHECKPOINTS
from frugal_dist.training.optimizers import described, frugal_options, groups_of, settled
from frugal_dist.training.recipe import Recipe, Run, check_recipe, kind_of, read_recipe
from frugal_dist.training.resume import FREE_ON_RESUME, check_existing_run, has_checkpoint
from frugal_dist.training.run import folder_of_a_run

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Checked:
    """What was found of a recipe. ``run``: what engines and loop are told; ``notes``: what a run would say, too."""

    run: Recipe
    model: nn.Module
    data: str
    notes: str = ""


def _pretraining(recipe: Recipe, place: DistEnv) -> Checked:
    from frugal_dist.training.pretrain import materials

    _, data, model, longer = materials(recipe, place, weights=False)
    data.batches.close()
    groups_of(model, frugal_options(recipe.optimizer))  # patterns that fit no parameter
    words = f"{data.vocab_size:,} tokens in the vocabulary, {data.validation.tokens:,} to evaluate on"
    return Checked(recipe, model, words, longer)


def _finetuning(recipe: FinetuneRecipe, place: DistEnv) -> Checked:
    from frugal_dist.training.finetune.classifiers import TuningOptimizer
    from frugal_dist.training.finetune.run import materials

    made = materials(recipe, place)
    TuningOptimizer(recipe, made.config.hidden_size)(made.model)
    return Checked(made.run, made.model, f"{made.train.count:,} examples, {made.validation.count:,} to evaluate on")


KINDS: dict[type[Run], tuple[Callable[[Any], None], Callable[[Any, DistEnv], Checked]]] = {
    Recipe: (check_recipe, _pretraining),
    FinetuneRecipe: (check_finetune, _finetuning),
}
"""By the kind of recipe: what checks its values, and what makes of it all that a training needs."""


def check(name: str, changes: Sequence[str] = (), ranks: int | None = None) -> str:
    """Everything short of training: keys, values, packages, data, vocabulary, model, engine, batch, folder.

    ``ranks``: on how many; None is 1, for engines that need more the fewest they take. Returns what was found. Raises
    ValueError for the first thing that would end the training before it begins. Nothing is left behind.
    """
    kind = kind_of(name, list(KINDS))
    check_values, make = KINDS[kind]
    recipe: Any = read_recipe(name, changes, kind)
    check_values(recipe)
    if recipe.engine == "deepspeed" and find_spec("deepspeed") is None:
        raise ValueError("engine is deepspeed, whose package is missing: pip install 'frugal_dist[deepspeed]'.")
    folder = folder_of_a_run(recipe.folder)
    _check_writable(folder)
    check_free(folder, lambda text: print(text, file=sys.stderr))
    fewest = 2 * recipe.tp if recipe.engine in ("ddp", "fsdp2") else 1
    ranks = fewest if ranks is None else ranks
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1.")
    made = make(recipe, DistEnv(0, ranks, 0, ranks, "", 0, "none"))
    if existing := has_checkpoint(folder):
        done = latest_step(folder / CHECKPOINTS) or 0
        if made.run.steps < done:
            raise ValueError(f"steps is {made.run.steps}, but the run in {folder} has done {done}: raise it.")
        check_existing_run(folder, replace(recipe, optimizer=settled(recipe.optimizer)).record(), FREE_ON_RESUME)
    count = sum(parameter.numel() for parameter in made.model.parameters())
    lines = [
        f"{type(made.model).__name__}, {count / 1e6:,.2f} M parameters; {described(recipe.optimizer)}",
        f"Data: {made.data}",
        f"{made.run.steps:,} steps of {recipe.batch} sequences; {recipe.engine} on {ranks} rank{'s' * (ranks > 1)}",
        f"{folder}: {'resumes the run that is there' if existing else 'a new run'}",
        *filter(None, [made.notes]),
        "Nothing is wrong that shows before the first step.",
    ]
    return "\n".join(lines)


def _check_writable(folder: Path) -> None:
    """By trying, as rights alone do not say it of every file system; in what of the folder's path there is."""
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    try:
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"folder is {str(folder)!r}, which cannot be written: {error.strerror}.") from error
