"""The optimizer of a recipe."""

from __future__ import annotations

from typing import Any

from torch import nn

from frugal_dist.config import HYPERPARAMETERS, check_keys, preset
from frugal_dist.optimizer import Frugal
from frugal_dist.parameters import split_parameters
from frugal_dist.training.recipe import Optimizer

OWN = ("lr", "weight_decay", "no_decay")
"""Keys that a recipe has of its own."""
KNOWN = tuple(key for key in (*HYPERPARAMETERS, "shard_state") if key not in OWN)


def frugal_options(recipe: Optimizer) -> dict[str, Any]:
    """Keyword arguments for Frugal, on any engine. Raises ValueError for an option that Frugal does not have."""
    for key in OWN:
        if key in recipe.options:
            raise ValueError(f"optimizer.options.{key}: set optimizer.{key} instead.")
    check_keys(recipe.options, KNOWN, "optimizer.options")
    options = preset(recipe.name, lr=recipe.lr, weight_decay=recipe.weight_decay, **recipe.options)
    return options if recipe.no_decay is None else {**options, "no_decay": recipe.no_decay}


def build_optimizer(recipe: Optimizer, model: nn.Module) -> Frugal:
    """Frugal for a model whose parameters may already be wrapped or sharded."""
    options = frugal_options(recipe)
    return Frugal(split_parameters(model, no_decay=options.pop("no_decay", None)), **options)
