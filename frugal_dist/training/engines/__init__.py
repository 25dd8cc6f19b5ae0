"""What a training loop asks of an engine, and the engines: one process, DDP, FSDP2, DeepSpeed."""

from __future__ import annotations

from torch import nn

from frugal_dist.training.engines.protocol import Engine, Schedule
from frugal_dist.training.place import Place
from frugal_dist.training.recipe import Recipe


def build_engine(model: nn.Module, recipe: Recipe, schedule: Schedule, place: Place) -> Engine:
    """The engine that the recipe names. Raises ValueError if it does not fit the number of ranks."""
    if recipe.engine == "deepspeed":
        from frugal_dist.training.engines.deepspeed import DeepSpeedEngine, deepspeed_config

        return DeepSpeedEngine(model, deepspeed_config(recipe, place.world), schedule)
    from frugal_dist.training.engines.plain import PlainEngine

    return PlainEngine(model, recipe, schedule, place)


__all__ = ["Engine", "Schedule", "build_engine"]
