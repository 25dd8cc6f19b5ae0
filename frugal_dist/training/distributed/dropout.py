"""Dropout on several ranks: each draws masks of its own, or all would drop the same places of their sequences."""

from __future__ import annotations

import torch
from torch import nn

_RANKS_APART = 1_000_003
"""Between the seeds of the ranks."""


def seed_masks(seed: int, rank: int) -> None:
    """Let this rank draw its own masks from here on. Weights that must be equal are made before."""
    torch.manual_seed(seed + _RANKS_APART * (1 + rank))


def has_dropout(model: nn.Module) -> bool:
    """Whether a model drops anything in training, by its modules and by what its configuration says of itself."""
    if any(module.p > 0 for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)):
        return True
    # Some models call the function instead of a module, with a share from the configuration.
    config = getattr(model, "config", None)
    told = {} if config is None else vars(config)
    return any("drop" in key and isinstance(share, int | float) and share > 0 for key, share in told.items())
