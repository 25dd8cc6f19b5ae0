"""`frugal-dist evaluate`: the loss of a run's model, or of an exported one, on validation data; on one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from frugal_dist import Frugal, split_parameters
from frugal_dist.training.card import RECIPE, recipe_in
from frugal_dist.training.check import KINDS
from frugal_dist.training.distributed.place import DistEnv
from frugal_dist.training.exported_model import Restored, open_model
from frugal_dist.training.finetune.recipe import FinetuneRecipe
from frugal_dist.training.folders import run_of
from frugal_dist.training.recipe import Recipe, Run, kind_of, read_recipe
from frugal_dist.training.resume import records_of

if TYPE_CHECKING:
    from torch import nn

    from frugal_dist.training.engines import Losses
    from frugal_dist.training.validation import EvalResult, Evaluation

ALONE = DistEnv(0, 1, 0, 1, "", 0, "none")


def evaluate(model: Path, changes: Sequence[str] = (), recipe: str | None = None, as_json: bool = False) -> str:
    """Loss and perplexity, of a classifier its metrics, for people or as JSON.

    ``model``: a run, a checkpoint of one, or a model folder. Data, length and precision are those of ``recipe``; None:
    of the run, or of the recipe that an export has beside it. ``changes``: its keys, such as ``--data.path DIR``.
    """
    restored = open_model(model)
    asked = _recipe(model, restored, changes, recipe)
    KINDS[type(asked)][0](asked)
    result, amount, more = (
        _classifier(asked, restored) if isinstance(asked, FinetuneRecipe) else _writer(cast("Recipe", asked), restored)
    )
    stats = {"loss": result.loss, **result.metrics, **more}
    if as_json:
        return json.dumps({"model": str(restored.source), "amount": amount, **stats}, indent=1)
    told = ", ".join(f"{name} {value:,.4f}" for name, value in stats.items())
    return f"{restored.source}: {told}; over {amount}"


def _recipe(model: Path, restored: Restored, changes: Sequence[str], named: str | None) -> Run:
    """What to evaluate on. ValueError if nothing says that, or it is for another kind of model."""
    if named is None and (model / RECIPE).is_file():
        named = str(model / RECIPE)
    if named is not None:
        asked: Run | None = read_recipe(named, changes, kind_of(named, list(KINDS)))
    else:
        run = run_of(model)
        asked = None if run is None else recipe_in(records_of(run), changes)
    if asked is None:
        raise ValueError(f"{model} says nothing of its data; name a recipe that does, with --recipe.")
    if isinstance(asked, FinetuneRecipe) == restored.model.can_generate():
        kind = "fine-tuning" if isinstance(asked, FinetuneRecipe) else "pre-training"
        raise ValueError(f"{model} is a {type(restored.model).__name__}, but the recipe is one of {kind}.")
    return asked


def _writer(recipe: Recipe, restored: Restored) -> tuple[EvalResult, str, dict[str, float]]:
    """The finding, over how much, and the loss of guessing every token by its frequency."""
    from frugal_dist.training.data.sources import open_data
    from frugal_dist.training.models import check_positions, token_losses

    data = open_data(replace(recipe, steps=1), 1)  # which asks for enough text to train on
    data.batches.close()
    size = restored.model.config.vocab_size
    if size < data.vocab_size:
        raise ValueError(f"the model has {size} tokens, the data {data.vocab_size}: they do not fit.")
    check_positions(restored.model, recipe.length - (recipe.data.rows == "truncated"))
    result = _measured(data.validation, restored.model, recipe, token_losses)
    return result, f"{data.validation.tokens:,} tokens", {"unigram_loss": data.validation.unigram_loss(data.vocab_size)}


def _classifier(recipe: FinetuneRecipe, restored: Restored) -> tuple[EvalResult, str, dict[str, float]]:
    from frugal_dist.training.finetune.classification import Classifier, encode
    from frugal_dist.training.finetune.examples import read_examples
    from frugal_dist.training.finetune.scoring import Scoring

    tokenizer, data = restored.tokenizer, read_examples(recipe.data)
    if tokenizer is None:
        raise ValueError(f"{restored.source} has no tokenizer beside it; evaluate the run or the export that has one.")
    known = tuple((restored.model.config.id2label or {}).values())
    if data.classes and known != data.classes:
        raise ValueError(f"the model knows the classes {', '.join(known)}, the data has {', '.join(data.classes)}.")
    rows = encode(tokenizer, data.validation, recipe.length)
    classifier = Classifier(tokenizer.pad_token_id, "token_type_ids" in tokenizer.model_input_names, not data.classes)
    run = recipe.as_run(rows.count, restored.model.config.hidden_size)
    result = _measured(Scoring(rows, classifier, data.metrics), restored.model, run, classifier.losses)
    return result, f"{rows.count:,} examples", {}


def _measured(evaluation: Evaluation, model: nn.Module, recipe: Recipe, losses: Losses) -> EvalResult:
    """As training measures it, in the recipe's precision."""
    from frugal_dist.training.engines import build_engine

    alone = replace(recipe, engine="single", deepspeed=None, tp=1)
    engine = build_engine(model, alone, lambda step: 1.0, ALONE, losses, _idle)
    result = evaluation.evaluate(engine, lambda: False)
    assert result is not None  # nobody tells it to stop
    return result


def _idle(model: nn.Module) -> Frugal:
    """An engine has an optimizer; one that takes no step has no state."""
    return Frugal(split_parameters(model), density=0)
