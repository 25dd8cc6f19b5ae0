"""Pre-training by recipe: on one process, DDP, FSDP2 or DeepSpeed. Started again, a run resumes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Any

from frugal_dist.training.distributed.place import DistEnv
from frugal_dist.training.distributed.ranks import together
from frugal_dist.training.recipe import Recipe, check_recipe
from frugal_dist.training.resume import record_of
from frugal_dist.training.run import TrainingJob, train

if TYPE_CHECKING:
    from torch import nn

    from frugal_dist.training.data.sources import OpenData
    from frugal_dist.training.engines import Schedule
    from frugal_dist.training.loop import Outcome


def pretrain(recipe: Recipe) -> int:
    """Train as one rank of whatever launcher started this process; the exit code of ``run.train``.

    Raises ValueError, in a process alone, for a recipe that cannot be trained, before anything is started.
    """
    return pretrain_from(lambda: recipe)


def pretrain_from(read: Callable[[], Recipe]) -> int:
    """As ``pretrain``, with the recipe that ``read`` returns; if it raises on one rank, all of them stop."""
    return train(read, check_recipe, _prepare)


def _prepare(recipe: Recipe, place: DistEnv, stack: ExitStack) -> TrainingJob:
    from frugal_dist.training.engines import build_engine, engine_share
    from frugal_dist.training.metrics.device import flops_per_token
    from frugal_dist.training.models import has_dropout, seed_masks

    schedule, data, model, longer = together(partial(materials, recipe, place))
    if has_dropout(model):
        seed_masks(recipe.seed, engine_share(recipe, place)[0])
    flops = flops_per_token(model, recipe.length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = build_engine(model, recipe, schedule, place)
    stack.callback(data.batches.close)
    tokens, unigram = data.validation.tokens, data.validation.unigram_loss(data.vocab_size)
    record = record_of(recipe) | {"validation_tokens": tokens, "unigram_loss": unigram}
    less = f"There are only {tokens:,} tokens for validation; evaluation_tokens is {recipe.evaluation_tokens:,}."
    note = "\n".join(filter(None, [longer, less if data.validation.short else ""]))
    summary = partial(_summary, unigram)
    run = quote(recipe.folder)
    after = f"Next: frugal-dist plot {run}, frugal-dist generate {run}, frugal-dist export {run} --out DIR"
    return TrainingJob(
        recipe, record, parameters, engine, data.batches, data.validation, summary, flops, note=note, after=after
    )


def materials(recipe: Recipe, place: DistEnv, weights: bool = True) -> tuple[Schedule, OpenData, nn.Module, str]:
    """What each rank makes for itself, and a remark on it: most of what can be wrong shows here.

    ``weights``: False leaves fresh ones on the meta device, where they take neither time nor memory.
    """
    import torch

    from frugal_dist.training.data.sources import open_data
    from frugal_dist.training.engines import check_engine, engine_share
    from frugal_dist.training.models import build_model, check_positions
    from frugal_dist.training.schedule import build_schedule

    check_engine(recipe, place)
    schedule = build_schedule(recipe.schedule, recipe.steps)
    data = open_data(recipe, engine_share(recipe, place)[1])
    torch.manual_seed(recipe.seed)
    with torch.device("cpu" if weights or recipe.model.pretrained else "meta"):
        model = build_model(recipe.model, data.vocab_size, recipe.length, data.separator)
    # Of a row per document the model reads all tokens but the last.
    longer = check_positions(model, recipe.length - (recipe.data.rows == "truncated"))
    return schedule, data, model, longer


def _summary(unigram_loss: float, outcome: Outcome) -> tuple[dict[str, Any], str]:
    from frugal_dist.training.validation import perplexity_of

    perplexity, unigram = perplexity_of(outcome.last_loss), perplexity_of(unigram_loss)
    guessing = f"guessing by frequency: {unigram:,.1f}"
    if not perplexity < unigram:
        guessing = f"not yet better than guessing by frequency, {unigram:,.1f}: train longer"
    return {"perplexity": perplexity}, f"validation perplexity {perplexity:,.2f} ({guessing})"
