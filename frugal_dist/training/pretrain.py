"""Pre-training by recipe: on one process, DDP, FSDP2 or DeepSpeed. Started again, a run goes on where it was."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from frugal_dist.training.place import Place
from frugal_dist.training.recipe import Recipe, check_recipe
from frugal_dist.training.run import Job, run_rank

if TYPE_CHECKING:
    from frugal_dist.training.loop import Outcome


def pretrain(recipe: Recipe) -> int:
    """Train as one rank of whatever launcher started this process; the exit code of ``run_rank``.

    Raises ValueError for a recipe that cannot be trained, before anything is started.
    """
    check_recipe(recipe)
    return run_rank(recipe.folder, lambda place, stack: _prepare(recipe, place, stack))


def _prepare(recipe: Recipe, place: Place, stack: ExitStack) -> Job:
    import torch

    from frugal_dist.training.engines import build_engine
    from frugal_dist.training.flops import flops_per_token
    from frugal_dist.training.models import build_model
    from frugal_dist.training.schedule import build_schedule
    from frugal_dist.training.sources import open_data

    schedule = build_schedule(recipe.schedule, recipe.steps)
    data = open_data(recipe, place.world)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, data.vocab_size, recipe.length)
    flops = flops_per_token(model, recipe.length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = build_engine(model, recipe, schedule, place)
    stack.callback(engine.close)
    stack.callback(data.batches.close)
    return Job(recipe, recipe.record(), parameters, engine, data.batches, data.validation, _summary, flops)


def _summary(outcome: Outcome) -> tuple[dict[str, Any], str]:
    perplexity = math.exp(outcome.last_loss)
    return {"perplexity": perplexity}, f"validation perplexity {perplexity:,.2f}"
