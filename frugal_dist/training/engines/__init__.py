"""What a training loop asks of an engine, and the engines: one process, DDP, FSDP2, DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from frugal_dist.optimizer import Frugal
from frugal_dist.training.distributed.place import DistEnv
from frugal_dist.training.engines.protocol import Engine, Losses, Schedule
from frugal_dist.training.models import token_losses
from frugal_dist.training.recipe import Recipe, Run
from frugal_dist.update.kernels import chosen


def check_engine(recipe: Recipe, place: DistEnv) -> None:
    """Raises ValueError if the recipe's engine does not fit the number of ranks, or its JSON cannot be used.

    Or if FRUGAL_KERNELS asks for what this rank does not have: a step would find out while other ranks wait.
    """
    chosen()
    if recipe.engine == "deepspeed":
        from frugal_dist.training.engines.deepspeed import deepspeed_config

        deepspeed_config(recipe, place.world)
    else:
        from frugal_dist.training.engines.plain import check_world

        check_world(recipe, place.world)


def engine_share(recipe: Run, place: DistEnv) -> tuple[int, int]:
    """Which part of every batch is this rank's, of how many: ranks of tensor parallelism have the same."""
    return place.rank // recipe.tp, max(place.world // recipe.tp, 1)


def build_engine(
    model: nn.Module,
    recipe: Recipe,
    schedule: Schedule,
    place: DistEnv,
    losses: Losses = token_losses,
    optimizer: Callable[[nn.Module], Frugal] | None = None,
) -> Engine:
    """The engine that the recipe names, called by all ranks. Raises ValueError as ``check_engine``.

    ``optimizer``: builds it for the model as the engine wraps it; None: the recipe's.
    """
    if recipe.engine == "deepspeed":
        from frugal_dist.training.engines.deepspeed import DeepSpeedEngine, deepspeed_config

        return DeepSpeedEngine(model, deepspeed_config(recipe, place.world), schedule, losses, optimizer)
    from frugal_dist.training.engines.plain import PlainEngine, check_world

    check_world(recipe, place.world)
    return PlainEngine(model, recipe, schedule, place, losses, optimizer)


__all__ = ["Engine", "Losses", "Schedule", "build_engine", "check_engine", "engine_share"]
