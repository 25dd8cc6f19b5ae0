"""The few things that ranks of a training tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from frugal_dist.sharding.collectives import gather_objects, ranks_of


def total(values: list[float], device: torch.device) -> list[float]:
    """Each value summed over the ranks, in double precision."""
    return begin_total(values, device)()


def begin_total(values: list[float], device: torch.device) -> Callable[[], list[float]]:
    """The same in two calls: the second, of what is returned, waits for nothing that a GPU was given in between."""
    if ranks_of("auto").alone:
        return lambda: values
    on_gpu = device.type == "cuda"
    tensor = torch.tensor(values, dtype=torch.float64, pin_memory=on_gpu).to(device, non_blocking=True)
    distributed.all_reduce(tensor)
    if not on_gpu:
        return tensor.tolist
    here = torch.empty(len(values), dtype=torch.float64, pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def answer() -> list[float]:
        event.synchronize()
        sums: list[float] = here.tolist()
        return sums

    return answer


class Told:
    """Whether any rank was told something; all of them get the same answer.

    Among several GPUs it is the answer to the call before, of which at most the step before is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: Callable[[], list[float]] | None = None

    def anyone(self, me: bool) -> bool:
        """Collective."""
        asked = begin_total([float(me)], self._device)
        if self._device.type != "cuda" or ranks_of("auto").alone:
            return asked()[0] > 0
        before, self._before = self._before, asked
        return before is not None and before()[0] > 0


def sendable(rows: Tensor, device: torch.device) -> Tensor:
    """Rows in memory from which a copy to the GPU makes nobody wait."""
    return rows.pin_memory() if device.type == "cuda" else rows


def gathered(value: Any) -> list[Any]:
    """A small plain value of each rank, on all ranks."""
    return gather_objects(ranks_of("auto"), value)


def leave() -> None:
    """Destroy the process group, if there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
