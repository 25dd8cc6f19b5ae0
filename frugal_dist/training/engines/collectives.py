"""The few things that ranks of a training tell each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


def total(values: list[float], device: torch.device) -> list[float]:
    """Each value summed over the ranks, in double precision."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def gathered(value: Any) -> list[Any]:
    """A small plain value of each rank, on all ranks."""
    if not distributed.is_initialized():
        return [value]
    by_rank: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(by_rank, value)
    return by_rank


def leave() -> None:
    """Destroy the process group, if there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
