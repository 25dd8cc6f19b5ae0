"""What ranks do together before a training. Runs inside each rank."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from frugal_dist.training import shared
from frugal_dist.training.ranks import together
from frugal_dist.training.rollcall import RollCall, own_name


def beginning(failing: dict[int, str]) -> str:
    """What becomes of an action that fails on some ranks with these words."""
    rank = dist.get_rank()

    def action() -> str:
        if rank in failing:
            raise ValueError(failing[rank])
        return f"made by {rank}"

    try:
        return together(action)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def sharing(folders: list[str]) -> str:
    """Whether ranks with these folders have the same one before them."""
    shared.PATIENCE = 0.3
    try:
        shared.check_shared(Path(folders[dist.get_rank()]), dist.get_rank())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def roll_call(silent: int, error: str) -> str:
    """What each rank makes of an error, when one of them says nothing."""
    rank = dist.get_rank()
    names = [
        own_name(0).replace("rank 0", f"rank {number}").split(",")[0] + ")" for number in range(dist.get_world_size())
    ]
    roll = RollCall(dist.distributed_c10d._get_default_store(), rank, names)
    dist.barrier()  # or the silent one may be gone before the others have met it
    if rank == silent:
        return ""
    found = roll.explained(RuntimeError(error))
    return f"{type(found).__name__}: {found}"
