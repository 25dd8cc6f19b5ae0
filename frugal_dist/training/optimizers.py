"""The optimizer of a recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from frugal_dist.config import HYPERPARAMETERS, OLD_NAMES, check_keys, config_from
from frugal_dist.optimizer import Frugal
from frugal_dist.parameters.groups import without_foreign
from frugal_dist.parameters.split import split_parameters
from frugal_dist.presets import DEFINED, preset
from frugal_dist.training.finetune.recipe import Tuning
from frugal_dist.training.recipe import Optimizer

R = TypeVar("R", Optimizer, Tuning)

_WIDE = 1 << 20
"""A hidden size for any rank."""
PATTERNS = ("project", "skip", "no_decay")
OWN = ("lr", "weight_decay", *PATTERNS)
"""Keys that a recipe has of its own."""
KNOWN = tuple(key for key in (*HYPERPARAMETERS, *OLD_NAMES, "shard_state") if key not in OWN)


def frugal_options(recipe: Optimizer) -> dict[str, Any]:
    """Keyword arguments for Frugal, on any engine. Raises ValueError for an option that Frugal does not have."""
    for key in OWN:
        if key in recipe.options:
            raise ValueError(f"optimizer.options.{key}: set optimizer.{key} instead.")
    without_foreign(recipe.options, "optimizer.options")
    check_keys(recipe.options, KNOWN, "optimizer.options")
    options = preset(recipe.name, lr=recipe.lr, weight_decay=recipe.weight_decay, **settled(recipe).options)
    patterns = {key: getattr(recipe, key) for key in PATTERNS}
    return options | {key: value for key, value in patterns.items() if value is not None}


def check_optimizer(recipe: Optimizer) -> None:
    """ValueError for options or values that Frugal would refuse."""
    config_from(frugal_options(recipe))


def check_tuning(recipe: Tuning) -> None:
    """The same of a fine-tuning, whose model is not known yet."""
    check_optimizer(recipe.plain(_WIDE))


def settled(recipe: R) -> R:
    """The recipe without the options that its name leaves no choice of."""
    fixed = DEFINED[recipe.name]
    return replace(recipe, options={key: value for key, value in recipe.options.items() if key not in fixed})


def described(recipe: Optimizer) -> str:
    """The name and, where options were left out that say something else than the name, which."""
    own, given = config_from(preset(recipe.name)), recipe.options
    without = [key for key in DEFINED[recipe.name] if key in given and given[key] != getattr(own, key)]
    return f"{recipe.name} (without optimizer.options {', '.join(without)})" if without else recipe.name


def build_optimizer(recipe: Optimizer, model: nn.Module) -> Frugal:
    """Frugal for a model whose parameters may already be wrapped or sharded."""
    options = frugal_options(recipe)
    return Frugal(groups_of(model, options), **options)


def groups_of(model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups that the patterns among ``options`` make, which are taken out of there."""
    return split_parameters(model, **{key: options.pop(key, None) for key in PATTERNS})
