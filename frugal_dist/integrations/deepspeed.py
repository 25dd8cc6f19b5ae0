"""How DeepSpeed finds Frugal: JSON's optimizer.type is looked up in torch.optim, so there it must be."""

from __future__ import annotations

from typing import Any

from frugal_dist.engines.hooks import register_in_torch
from frugal_dist.integrations.build_locks import clear_stale_locks


def register(optimizer_class: type[Any]) -> None:
    """Make ``"optimizer": {"type": "Frugal"}`` work in DeepSpeed JSON configs and in the HF Trainer's.

    DeepSpeed's own names may be written in any case ("adamw"), so ours is there in the cases that people write.

    And keep DeepSpeed from waiting for a build that was killed: it builds its operation before it calls anything of
    ours, in the HF Trainer as soon as the arguments are made.
    """
    register_in_torch(optimizer_class)
    clear_stale_locks()
