"""What to train, on what, with which optimizer and engine: declared keys, and how files and command lines are read."""

from frugal_dist.training.optimizers import Optimizer
from frugal_dist.training.recipe.declared import (
    Data,
    Model,
    Recipe,
    Run,
    Saving,
    check_recipe,
    check_released_share,
    check_run,
)
from frugal_dist.training.recipe.reading import (
    as_yaml,
    copy_recipe,
    kind_of,
    list_recipes,
    read_recipe,
    recipe_of,
    shipped,
)
from frugal_dist.training.schedule import Schedule

__all__ = [
    "Data",
    "Model",
    "Optimizer",
    "Recipe",
    "Run",
    "Saving",
    "Schedule",
    "as_yaml",
    "check_recipe",
    "check_released_share",
    "check_run",
    "copy_recipe",
    "kind_of",
    "list_recipes",
    "read_recipe",
    "recipe_of",
    "shipped",
]
