"""How DeepSpeed finds Frugal: JSON's optimizer.type is looked up in torch.optim, so there it must be."""

from __future__ import annotations

from typing import Any

import torch


def register(optimizer_class: type[Any]) -> None:
    """Make ``"optimizer": {"type": "Frugal"}`` work in DeepSpeed JSON configs and in the HF Trainer's."""
    setattr(torch.optim, optimizer_class.__name__, optimizer_class)
