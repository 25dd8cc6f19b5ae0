"""The optimizer of a recipe: what can be said of it, and how it is built."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from frugal_dist.config import HYPERPARAMETERS, config_from
from frugal_dist.optimizer import Frugal
from frugal_dist.parameters.groups import without_foreign
from frugal_dist.parameters.split import split_parameters
from frugal_dist.presets import BEHIND, DEFINED, OptimizerName, preset

Number = bool | int | float | str | list[float] | list[str] | None
"""The first type that fits is taken: text stands after what would fit it as well, such as false and 1."""


@dataclass(frozen=True, kw_only=True)
class AnyOptimizer:
    """The optimizer of any recipe.

    Args:
        name: of ``frugal_dist.presets``.
        lr: learning rate.
        weight_decay: decoupled.
        project: name patterns of all parameters that are projected; null: all matrices but embeddings, heads, routers.
        skip: name patterns of parameters that are never projected.
        no_decay: name patterns of parameters without weight decay.
        options: any other hyperparameter of FrugalConfig, each as --optimizer.options.NAME: density, update_gap,
            projection (svd, dct, random, gaussian, randperm, columns, rows, randk, blockwise), side, block_order,
            state_full (adamw, lion, sgdm, muon, normalized_momentum), state_free (sign, sgd, none, softsign,
            normalized, normalized_columns, sinkhorn, scaled, racs), combine (add, scale, scale_matrix), growth_limit,
            betas, eps, momentum, moments (full, 8bit), projected_lr_scale, state_free_lr_scale, on_refresh (reset,
            keep, project), svd_method, basis_dtype, matmul, rounding, refresh_schedule, compute_layout,
            residual_threshold, seed, shard_state.
    """

    name: str = "frugal"
    lr: float = 1e-3
    weight_decay: float = 0.0
    project: list[str] | None = None
    skip: list[str] | None = None
    no_decay: list[str] | None = None
    options: dict[str, Number] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Optimizer(AnyOptimizer):
    """The optimizer.

    Args:
        name: one of ``PRESETS``.
    """

    name: OptimizerName = "frugal"


T = TypeVar("T", bound=AnyOptimizer)

PATTERNS = ("project", "skip", "no_decay")
OWN = ("lr", "weight_decay", *PATTERNS)
"""Keys that a recipe has of its own."""
KNOWN = tuple(key for key in (*HYPERPARAMETERS, "shard_state") if key not in OWN)


def frugal_options(recipe: AnyOptimizer) -> dict[str, Any]:
    """Keyword arguments for Frugal, on any engine. Raises ValueError for an option that Frugal does not have."""
    for key in OWN:
        if key in recipe.options:
            raise ValueError(f"optimizer.options.{key}: set optimizer.{key} instead.")
    without_foreign(recipe.options, KNOWN, "optimizer.options")
    name = BEHIND.get(recipe.name, recipe.name)
    options = preset(name, lr=recipe.lr, weight_decay=recipe.weight_decay, **settled(recipe).options)
    patterns = {key: getattr(recipe, key) for key in PATTERNS}
    return options | {key: value for key, value in patterns.items() if value is not None}


def check_optimizer(recipe: AnyOptimizer) -> None:
    """ValueError for options or values that Frugal would refuse."""
    config_from(frugal_options(recipe))


def settled(recipe: T) -> T:
    """The recipe without the options that its name leaves no choice of."""
    fixed = DEFINED[recipe.name]
    return replace(recipe, options={key: value for key, value in recipe.options.items() if key not in fixed})


def described(recipe: AnyOptimizer) -> str:
    """The name and, where options were left out that say something else than the name, which."""
    own, given = config_from(preset(BEHIND.get(recipe.name, recipe.name))), recipe.options
    without = [key for key in DEFINED[recipe.name] if key in given and given[key] != getattr(own, key)]
    return f"{recipe.name} (without optimizer.options {', '.join(without)})" if without else recipe.name


def build_optimizer(recipe: AnyOptimizer, model: nn.Module) -> Frugal:
    """Frugal for a model whose parameters may already be wrapped or sharded."""
    options = frugal_options(recipe)
    return Frugal(groups_of(model, options), **options)


def groups_of(model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups that the patterns among ``options`` make, which are taken out of there."""
    return split_parameters(model, **{key: options.pop(key, None) for key in PATTERNS})
