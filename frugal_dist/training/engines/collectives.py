"""The few things that ranks of a training tell each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from frugal_dist.sharding.collectives import gather_objects, ranks_of


def total(values: list[float], device: torch.device) -> list[float]:
    """Each value summed over the ranks, in double precision."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def gathered(value: Any) -> list[Any]:
    """A small plain value of each rank, on all ranks."""
    return gather_objects(ranks_of("auto"), value)


def leave() -> None:
    """Destroy the process group, if there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
