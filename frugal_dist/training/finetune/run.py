"""Fine-tuning by recipe: a pretrained encoder on labelled texts. Started again, a run resumes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from frugal_dist.training.distributed.place import DistEnv
from frugal_dist.training.distributed.process import LOG_FILE
from frugal_dist.training.distributed.ranks import together
from frugal_dist.training.finetune.recipe import FinetuneRecipe, check_finetune
from frugal_dist.training.resume import record_of
from frugal_dist.training.run import TrainingJob, train

if TYPE_CHECKING:
    from torch import nn

    from frugal_dist.training.engines import Schedule
    from frugal_dist.training.finetune.classification import Classifier, ExampleRows
    from frugal_dist.training.loop import Outcome
    from frugal_dist.training.recipe import Recipe


def finetune(recipe: FinetuneRecipe) -> int:
    """Train as one rank of whatever launcher started this process; the exit code of ``run.train``.

    Raises ValueError, in a process alone, for a recipe that cannot be trained, before anything is started.
    """
    return finetune_from(lambda: recipe)


def finetune_from(read: Callable[[], FinetuneRecipe]) -> int:
    """As ``finetune``, with the recipe that ``read`` returns; if it raises on one rank, all of them stop."""
    return train(read, check_finetune, _prepare)


@dataclass(frozen=True)
class Materials:
    """What each rank makes for itself: most of what can be wrong shows here."""

    run: Recipe
    schedule: Schedule
    train: ExampleRows
    validation: ExampleRows
    metrics: tuple[str, ...]
    tokenizer: Any
    config: Any
    model: nn.Module
    classifier: Classifier


def materials(recipe: FinetuneRecipe, place: DistEnv) -> Materials:
    """What each rank makes for itself."""
    import torch

    from frugal_dist.training.engines import check_engine
    from frugal_dist.training.finetune.classification import Classifier, encode
    from frugal_dist.training.finetune.classifiers import build_classifier, read_config, read_tokenizer
    from frugal_dist.training.finetune.examples import read_examples
    from frugal_dist.training.models import check_positions
    from frugal_dist.training.schedule import build_schedule

    data = read_examples(recipe.data)
    tokenizer = read_tokenizer(recipe.model.path)
    config = read_config(recipe.model, data.classes)
    train, held_back = (encode(tokenizer, half, recipe.length) for half in (data.train, data.validation))
    run = recipe.as_run(train.count, config.hidden_size)
    check_engine(run, place)
    _check_batch(run, train.count, place)
    schedule = build_schedule(run.schedule, run.steps)
    torch.manual_seed(recipe.seed)
    model = build_classifier(recipe, config)
    check_positions(model, int(max(train.sizes.max(), held_back.sizes.max())))
    classifier = Classifier(tokenizer.pad_token_id, "token_type_ids" in tokenizer.model_input_names, not data.classes)
    return Materials(run, schedule, train, held_back, data.metrics, tokenizer, config, model, classifier)


def _prepare(recipe: FinetuneRecipe, place: DistEnv, stack: ExitStack) -> TrainingJob:
    from frugal_dist.training.data.batches import Batches
    from frugal_dist.training.engines import build_engine
    from frugal_dist.training.finetune.classifiers import TuningOptimizer, build_classifier, count
    from frugal_dist.training.finetune.scoring import Best, Scoring
    from frugal_dist.training.models import seed_masks

    made = together(partial(materials, recipe, place))
    run, model = made.run, made.model
    parameters, trained = count(model, trained=False), count(model, trained=True)
    seed_masks(recipe.seed, place.rank)
    optimizer = TuningOptimizer(recipe, made.config.hidden_size)
    engine = build_engine(model, run, made.schedule, place, made.classifier.losses, optimizer)
    build = partial(build_classifier, recipe, made.config)
    best = Best(Path(recipe.folder), engine, build, made.tokenizer, recipe.saving.on_error)

    def summary(outcome: Outcome) -> tuple[dict[str, Any], str]:
        stats: dict[str, Any] = {**best.last, "best": {"step": best.step, **best.metrics}}
        stats |= {"parameters": parameters, "trained": trained, "epochs": recipe.epochs, "asked": recipe.steps}
        score = best.metrics.get("score", nan)  # none if no checkpoint could be saved
        lost = f"; {best.lost} better model(s) could not be saved, see {LOG_FILE}" if best.lost else ""
        return stats, f"score {best.last['score']:.4f}, best {score:.4f} after step {best.step}{lost}"

    return TrainingJob(
        run,
        {**record_of(recipe), "examples": made.train.count, "validation_examples": made.validation.count},
        parameters,
        engine,
        Batches(made.train, recipe.batch, recipe.seed),
        Scoring(made.validation, made.classifier, made.metrics),
        summary,
        evaluated=best.evaluated,
        remember=best.remember,
        recall=best.recall,
        evaluate_first=False,  # an untrained head
        after=f"Next: frugal-dist plot {quote(recipe.folder)}, frugal-dist export {quote(recipe.folder)} --out DIR",
    )


def _check_batch(run: Recipe, examples: int, place: DistEnv) -> None:
    """ValueError, on all ranks alike, if the examples or the ranks do not make a batch."""
    if examples < run.batch:
        raise ValueError(f"there are {examples} training examples, fewer than a batch of {run.batch}; lower batch.")
    if run.batch % place.world:
        raise ValueError(f"batch is {run.batch}, which {place.world} ranks cannot share equally; change it.")
